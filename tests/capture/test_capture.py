"""What capture accepts, what it refuses by line, and that it leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

from aios_compile.capture.capture import capture
from aios_compile.capture.compare import compare_with_eager
from aios_compile.errors import CaptureError, UnsupportedModelError
from tests.foreign import families, modules
from tests.foreign.modules import Model, blocks, causal


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def small(count: int = 2, **options) -> nn.Module:
    return modules.build(lambda: Model(blocks(causal, count), **options))


class Item(Model):
    def forward(self, input_ids, position_ids):
        last = int(position_ids.max().item())
        return super().forward(input_ids, position_ids) * last


class Loop(Model):
    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids)
        rows = [x[:, t].sin() for t in range(x.shape[1])]
        return self.head(torch.stack(rows, 1))


class Single(Model):
    def forward(self, input_ids, position_ids):
        logits = super().forward(input_ids, position_ids)
        return logits * 2 if input_ids.shape[1] == 1 else logits


class Long(Model):
    def forward(self, input_ids, position_ids):
        logits = super().forward(input_ids, position_ids)
        return logits * 2 if input_ids.shape[1] > 100 else logits


class Tuple(Model):
    def forward(self, input_ids, position_ids):
        return {"hidden": self.embed(input_ids)}


@pytest.mark.parametrize(
    "kind, line", [(Item, "item()"), (Loop, "for t in range"), (Long, "> 100")]
)
def test_python_over_tokens_is_refused_by_line(kind, line):
    model = modules.build(lambda: kind(blocks(causal)))
    with pytest.raises(CaptureError) as caught:
        capture(model)
    assert line in str(caught.value)
    assert "test_capture.py" in str(caught.value)


def test_a_branch_for_one_token_differs_from_eager():
    """Dynamo bakes in the branch for many tokens without a guard: running with one token tells."""
    model = modules.build(lambda: Single(blocks(causal)))
    with pytest.raises(CaptureError, match="at T=1"):
        compare_with_eager(model, capture(model))


def test_no_logits():
    model = modules.build(lambda: Tuple(blocks(causal)))
    with pytest.raises(CaptureError, match="returns a dict, expected the logits"):
        compare_with_eager(model, capture(model))


def test_nothing_is_left_behind():
    model = families.build("gemma2")
    layer = type(model.model.layers[0])
    space = layer.forward.__globals__
    before = (layer.forward, set(space), copy.deepcopy(model.config.__dict__))
    state = torch.get_rng_state()
    capture(model)
    assert layer.forward is before[0]
    assert set(space) == before[1]
    assert model.config.__dict__ == before[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not any("hook" in k and v for k, v in vars(model).items() if isinstance(v, dict))


def test_a_failed_capture_restores_too():
    model = modules.build(lambda: Loop(blocks(causal)))
    forward, space = modules.Block.forward, set(modules.Block.forward.__globals__)
    with pytest.raises(CaptureError):
        capture(model)
    assert modules.Block.forward is forward
    assert set(vars(modules)) == space


class Layer(nn.Module):
    """Least work for the capture: nine of them are captured below."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(modules.HIDDEN, modules.HIDDEN)

    def forward(self, x, positions):
        return x + torch.tanh(self.linear(x))


def test_nine_models_of_one_class():
    """torch.compile gives up on the ninth module of one class in a process."""
    captured = [capture(modules.build(lambda: Model([Layer()]))) for _ in range(9)]
    assert len({len(module.root.graph.nodes) for module in captured}) == 1
    assert all(len(module.regions()) == 1 for module in captured)


def test_modes_and_gradients():
    model = small()
    model.train()
    model.blocks[0].first.eval()
    assert all(p.requires_grad for p in model.parameters())
    module = capture(model)
    assert compare_with_eager(model, module) < 1e-6
    assert model.training
    assert not model.blocks[0].first.training
    with torch.no_grad():
        assert len(capture(model).root.graph.nodes) == len(module.root.graph.nodes)
        assert not torch.is_grad_enabled()


def test_dropout_of_a_model_in_train_mode():
    model = families.build("gpt2").train()
    assert compare_with_eager(model, capture(model)) < 1e-6
    assert model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = families.build("llama").to(dtype)
    assert compare_with_eager(model, capture(model)) <= 16 * torch.finfo(dtype).eps


def test_shapes_of_tokens():
    batched, flat = (
        capture(small()),
        capture(modules.build(lambda: modules.Flat(Model(blocks(causal))))),
    )
    for module in (batched, flat):
        ids = next(n for n in module.root.graph.nodes if n.name in module.inputs)
        assert ids.meta["val"].dim() == 1
        assert module.root.graph.output_node().args[0][0].meta["val"].dim() == 2


def test_one_region_a_kind():
    assert [len(capture(small(n)).regions()) for n in (1, 3)] == [1, 1]
    kinds = capture(modules.build(modules.GENERATABLE["two_kinds"]))
    assert len(kinds.regions()) == 2
    assert len(capture(families.build("gemma3")).regions()) == 2


def test_unused_positions_bring_no_second_size():
    module = capture(small(learned=False))
    assert list(module.inputs.values()) == ["token_ids"]


def test_an_operator_of_a_stranger():
    library = torch.library.Library("stranger", "DEF")
    library.define("twice(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("stranger::twice", torch.empty_like, lib=library)
    model = modules.build(
        lambda: Model(blocks(causal, activation=lambda x: torch.ops.stranger.twice(x)))
    )
    with pytest.raises(CaptureError, match=r"stranger.twice.*\n.*test_capture.py"):
        capture(model)


def test_refusal_inside_the_adapter():
    model = families.build("llama")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="tokens that see later ones"):
        capture(model)
