"""What reaches each linear layer on calibration text, a decoder layer at a time.

S windows of T tokens run through one layer after another in float32; only one layer's weights are
in memory. A Hessian is the mean of x x^T over all tokens, what GPTQ and AWQ need of the inputs x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from aios_compile.errors import ConfigError
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import DecoderLayer
from aios_compile.models.rope import RotaryEmbedding

Read = Callable[[str], Tensor]  # parameter name -> float32
LEAST_TOKENS = 128
TOKENS_AT_ONCE = 2048


def windows_of(ids: Sequence[int], length: int, most: int) -> Tensor:
    """Return calibration windows int64 [S, length] spread evenly over a text.

    Raises ConfigError for a text that is too short to say anything.
    """
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, expected {LEAST_TOKENS} or more",
            advice="give a text of the kind that the model will read, some 10,000 words",
        )
    length = min(length, len(ids))
    count = min(most, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long()
    return torch.tensor(ids)[starts[:, None] + torch.arange(length)]


class HiddenStates:
    """The windows' hidden states float32 [S, T, D] on their way through the layers."""

    def __init__(self, config: ModelConfig, windows: Tensor, embedding: Tensor) -> None:
        self.config = config
        self._x = embedding[windows]
        self._positions = torch.arange(windows.shape[1])
        rotary = RotaryEmbedding(config.rope)
        self._tables = rotary(self._positions, torch.float32)

    def advance(self, layer: DecoderLayer) -> None:
        """Replace the states by what a layer makes of them."""
        for part in self._batches():
            self._x[part] = layer(self._x[part], *self._tables, self._positions)

    def hessians(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """Return mean x x^T float64 [K, K] of each linear's inputs x by its name.

        Linears that read the same tensor share one Hessian.
        """
        found: dict[str, Tensor] = {}
        same: dict[int, str] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                first = same.setdefault(id(given[0]), name)
                if first != name:
                    found[name] = found[first]
                    return
                rows = given[0].reshape(-1, given[0].shape[-1])
                kept.append(given[0])  # ids are unique while the tensor lives
                product = (rows.T @ rows).double()
                found[name] = found[name].add_(product) if name in found else product

            return hook

        kept: list[Tensor] = []
        handles = [
            module.register_forward_pre_hook(watch(name))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        for part in self._batches():
            layer(self._x[part], *self._tables, self._positions)
            same.clear()
            kept.clear()
        for handle in handles:
            handle.remove()
        tokens = self._x.shape[0] * self._x.shape[1]
        for hessian in {id(h): h for h in found.values()}.values():
            hessian /= tokens
        return found

    def _batches(self) -> list[slice]:
        step = max(1, TOKENS_AT_ONCE // self._x.shape[1])
        return [slice(i, i + step) for i in range(0, len(self._x), step)]


def load_layer(config: ModelConfig, index: int, read: Read) -> DecoderLayer:
    """Return a decoder layer with its weights in float32."""
    with torch.device("meta"):
        layer = DecoderLayer(config, list(config.windows)[index])
    names = layer.state_dict()
    values = {name: read(f"model.layers.{index}.{name}") for name in names}
    layer.load_state_dict(values, assign=True)
    return layer.eval().requires_grad_(False)
