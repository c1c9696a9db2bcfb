"""Captured equals eager, at once: what differs is found and named, for meta modules too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from aios_compile.capture.capture import capture
from aios_compile.capture.compare import compare_with_eager
from aios_compile.errors import CaptureError
from aios_compile.ir.module import IRModule
from aios_compile.models.config import ModelConfig
from aios_compile.models.decoder import Decoder
from tests.foreign import modules
from tests.foreign.modules import Block, Model, causal
from tests.passes.helpers import decoder_config

aten = torch.ops.aten


def model(model_type: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = ModelConfig.from_dict(decoder_config(model_type, **changes))
    return Decoder(config).eval().requires_grad_(False).to(dtype)


@pytest.fixture(scope="module")
def decoder() -> Any:
    return model(num_hidden_layers=3)


@pytest.fixture
def module(decoder: Any) -> IRModule:
    return capture(decoder, flat=True)


def test_a_decoder_is_bit_equal(decoder: Any, module: IRModule) -> None:
    assert compare_with_eager(decoder, module) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_too(dtype: torch.dtype) -> None:
    half = model("llama", dtype)
    assert compare_with_eager(half, capture(half, flat=True)) <= 4 * torch.finfo(dtype).eps


def test_parameters_are_never_read(decoder: Any, module: IRModule) -> None:
    """A module on the meta device has no values; only its buffers are real."""
    copy = model(num_hidden_layers=3)
    for name, parameter in list(copy.named_parameters()):
        owner = copy.get_submodule(name.rpartition(".")[0])
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], empty)
    assert compare_with_eager(copy, module) == 0.0


def test_a_wrong_region_is_named(decoder: Any, module: IRModule) -> None:
    region = module.regions()["layer"]
    norm = next(n for n in region.graph.nodes if n.args[1:] == (1e-6,))
    norm.args = (norm.args[0], 1e-3)
    with pytest.raises(CaptureError, match="region layer: the captured graph differs"):
        compare_with_eager(decoder, module)


def test_wrong_outer_code_is_named(decoder: Any, module: IRModule) -> None:
    graph = module.root.graph
    norm = [n for n in graph.nodes if n.args[1:] == (1e-6,)][-1]
    norm.args = (norm.args[0], 1e-3)
    with pytest.raises(CaptureError, match="the logits: the captured graph differs"):
        compare_with_eager(decoder, module)


def test_the_model_is_left_as_it_was(decoder: Any, module: IRModule) -> None:
    before = {name: id(p) for name, p in decoder.named_parameters()}
    compare_with_eager(decoder, module)
    assert {name: id(p) for name, p in decoder.named_parameters()} == before
    assert all("forward" not in m.__dict__ for m in decoder.modules())
    assert all(not m._forward_hooks for m in decoder.modules())


def test_each_kind_of_layer_is_checked() -> None:
    mixed = model(
        "qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=3, max_window_layers=2
    )
    module = capture(mixed, flat=True)
    assert len(module.regions()) == 2
    assert compare_with_eager(mixed, module) <= 1e-6


class OneBatch(nn.Module):
    """[1, T] token ids, no layers at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(101, 16)
        self.head = nn.Linear(16, 101)

    def forward(self, input_ids: Any, position_ids: Any) -> Any:
        return self.head(torch.tanh(self.table(input_ids)) + position_ids[..., None])


def test_a_module_without_layers_and_with_a_batch_dimension() -> None:
    plain = OneBatch().eval().requires_grad_(False)
    assert compare_with_eager(plain, capture(plain, flat=False)) <= 1e-6


class Listing(Block):
    """A layer that returns a list, as OpenAI's first GPT does in transformers."""

    def forward(self, x, positions):
        return [super().forward(x, positions)]


class OfLists(Model):
    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, position_ids)[0]
        return self.head(self.norm(x))


def test_layers_that_return_lists():
    lists = modules.build(lambda: OfLists([Listing(causal()) for _ in range(3)], learned=False))
    assert compare_with_eager(lists, capture(lists, flat=False)) <= 1e-5


def test_one_layer_in_several_places():
    """It was skipped and compared at once, and its forward taken away twice."""
    shared = modules.build(lambda: modules.Model(modules.blocks(modules.causal, 1) * 3))
    assert compare_with_eager(shared, capture(shared, flat=False)) <= 1e-6


@pytest.mark.parametrize("whole", [True, False])
def test_a_module_in_several_places_keeps_its_parameters(whole: bool) -> None:
    """They were put in under each name, and the second time the random ones were taken for them."""

    def layers() -> list[Block]:
        found = modules.blocks(causal, 1 if whole else 2)
        found[-1].qkv = found[0].qkv  # one linear in two layers
        return found * 2 if whole else found

    shared = modules.build(lambda: Model(layers()))
    before = {name: (id(p), p.clone()) for name, p in shared.named_parameters()}
    assert compare_with_eager(shared, capture(shared, flat=False)) <= 1e-6
    after = dict(shared.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in after.items())


class Pairing(Block):
    """A layer that returns something beside its result."""

    def forward(self, x, positions):
        return super().forward(x, positions), None


class OfPairs(Model):
    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x, _ = block(x, position_ids)
        return self.head(self.norm(x))


def test_layers_that_return_a_pair():
    pairs = modules.build(lambda: OfPairs([Pairing(causal()) for _ in range(3)], learned=False))
    assert compare_with_eager(pairs, capture(pairs, flat=False)) <= 1e-5


class Several(Model):
    """As nanoGPT: the logits, and a loss that nobody asked for."""

    def forward(self, input_ids, position_ids):
        return super().forward(input_ids, position_ids), None


def test_the_first_of_several_results_is_the_logits():
    model = modules.build(lambda: Several(modules.blocks(causal, 1)))
    assert compare_with_eager(model, capture(model, flat=False)) <= 1e-6
