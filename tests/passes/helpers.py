"""Trace plain functions and small models into IRModules, apply one pass, compare in float64."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from aios_compile.capture.capture import capture
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule, drop_dead, placeholders
from aios_compile.ir.quantized import LARGEST_CODE
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import Decoder
from aios_compile.passes.context import PassContext, PassOptions
from aios_compile.study.fuzz.trace_function import FLOATS, SIZES, Annotation, random, trace

torch.set_num_threads(1)
SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# The stem of a class of transformers -> arguments of its config.
HUGGING_FACE = {
    "GPT2": {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": SMALL,
    "Llama": {**SMALL, "num_key_value_heads": 2},
    "Phi": SMALL,
}


@dataclass(frozen=True)
class Applied:
    """What one pass did: rewrites by graph name ("" is the outer graph), and its refusals."""

    hits: dict[str, int]
    refusals: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.hits.values())


def apply(
    function: Callable[[fx.Graph, PassContext], int],
    module: IRModule,
    target: str = "cpp",
    options: PassOptions | None = None,
) -> Applied:
    """Run a pass on every graph as the runner does, without its proofs."""
    hits: dict[str, int] = {}
    refusals: list[str] = []
    for name in module.graphs():
        context = PassContext(module, name, options or PassOptions(target=target))
        hits[name] = function(context.graph_module.graph, context)
        refusals += [r.reason for r in context.refusals]
        drop_dead(module)
    for graph_module in module.graphs().values():
        graph_module.graph.lint()
    return Applied(hits, tuple(refusals))


class InFloat64(fx.Interpreter):
    """Run a graph with every floating-point dtype written in it replaced by float64."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {k: torch.float64 if v in FLOATS else v for k, v in kwargs.items()}
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return InFloat64(self.module.get_submodule(target)).run(*args, **kwargs)


def evaluate(
    module: IRModule, values: dict[str, Tensor] | None = None, num_tokens: int = 7, seed: int = 1
) -> list[Tensor]:
    """Run a program in float64 on seeded values; `values` fixes placeholders or inputs by name."""
    given = dict(values or {})
    sizes = {**SIZES, "T": num_tokens}
    arguments = []
    for node in placeholders(module.root.graph):
        generator = torch.Generator().manual_seed(seed)
        name = module.inputs.get(node.name, node.name)
        if name in given:
            value = given[name]
        elif node.name in module.weights:
            recipe = module.weights[node.name]
            sources = [double(module.tensors[n]) for n in recipe.names]
            value = InFloat64(fx.GraphModule(nn.Module(), recipe.graph)).run(*sources)
        elif name == "positions":
            value = torch.arange(num_tokens).reshape(
                [_size(s, sizes) for s in node.meta["val"].shape]
            )
        elif name == "sequence_lengths":
            value = torch.full((num_tokens,), num_tokens)
        else:
            fake = node.meta["val"]
            shape = tuple(_size(s, sizes) for s in fake.shape)
            dtype = torch.float64 if fake.dtype in FLOATS else fake.dtype
            value = random(Annotation("activation", dtype, shape), generator)
        arguments.append(double(value))
    with torch.no_grad():
        result = InFloat64(module.root).run(*arguments)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def double(value: Tensor) -> Tensor:
    widens = value.is_floating_point() and value.dtype not in LARGEST_CODE
    return value.double() if widens else value


def _size(size: Any, sizes: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    names = size.node.shape_env.aios_size_names
    return sizes[names[str(size.node.expr)]]


def assert_same(before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Compare two evaluations; the tolerance is relative to the largest value."""
    assert len(before) == len(after)
    for x, y in zip(before, after):
        assert x.shape == y.shape, f"{x.shape} became {y.shape}"
        scale = max(1.0, float(x.abs().max())) if x.numel() else 1.0
        error = float((x - y).abs().max()) if x.numel() else 0.0
        assert error <= tolerance * scale, f"differs by {error:.3g} of {scale:.3g}"


def targets(module: IRModule, region: str = "") -> list[str]:
    """Return the names of the functions that a graph calls, in order: "mul", "aios.linear"."""
    graph = module.graphs()[region].graph
    found = [str(n.target).removesuffix(".default") for n in graph.nodes if n.op == "call_function"]
    return [re.sub(r"^aten\.(\w+)\..*|^aten\.(\w+)$", r"\1\2", name) for name in found]


def check(
    function: Callable[[fx.Graph, PassContext], int],
    example: Callable[..., Any] | IRModule,
    hits: int | None = 1,
    *,
    reason: str = "",
    values: dict[str, Tensor] | None = None,
) -> IRModule:
    """Apply a pass: it must fire `hits` times (None: at least once), keep the
    values, and find nothing the second time.

    With `reason`, a refusal must contain that text. Return the rewritten module.
    """
    module = example if isinstance(example, IRModule) else trace(example)
    before = [evaluate(module, values, n) for n in (1, 7)]
    applied = apply(function, module)
    wrong = applied.total == 0 if hits is None else applied.total != hits
    assert not wrong, f"{applied} instead of {hits}\n{module.root.graph}"
    assert not reason or any(reason in r for r in applied.refusals), applied.refusals
    for n, want in zip((1, 7), before):
        assert_same(want, evaluate(module, values, n))
    assert apply(function, module).total == 0, "a second run still fires"
    return module


def decoder_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return a tiny config.json of one of the four families."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = {
        "architectures": [f"{names[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }
    return {**config, **changes}


def captured(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> IRModule:
    """Return level 1 of a tiny decoder with seeded weights of about unit gain.

    A decoder is captured once a process; each call returns a copy (the weights are shared).
    """
    config = decoder_config(model_type, **changes)
    return snapshot.take(_captured(json.dumps(config), dtype))


@functools.cache
def _captured(config: str, dtype: torch.dtype) -> IRModule:
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_dict(json.loads(config)))
    return captured_module(model, dtype, flat=True)


def hugging_face(stem: str) -> IRModule:
    """Return level 1 of a tiny model of transformers, captured once a process: a copy each call."""
    return snapshot.take(_hugging_face(stem))


@functools.cache
def _hugging_face(stem: str) -> IRModule:
    import transformers

    config = getattr(transformers, f"{stem}Config")(**HUGGING_FACE[stem])
    head = "LMHeadModel" if stem == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    return captured_module(getattr(transformers, stem + head)(config))


def captured_module(
    model: nn.Module, dtype: torch.dtype = torch.float32, flat: bool | None = None
) -> IRModule:
    """Return level 1 of any module after scaling its weights away from their trivial values."""
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.3
        parameter.data.copy_(noise * gain + (parameter.dim() == 1))
    module = capture(model.to(dtype), flat=flat)
    module.tensors.update(model.named_parameters(remove_duplicate=False))
    return module
