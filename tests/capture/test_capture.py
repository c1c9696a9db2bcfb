"""What capture accepts, what it refuses by line, and that it leaves nothing behind."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aios_compile.capture import foreign
from aios_compile.capture.capture import capture
from aios_compile.capture.compare import compare_with_eager
from aios_compile.errors import CaptureError, UnsupportedModelError
from aios_compile.passes.raise_attention import raise_attention
from aios_compile.passes.token_mixing import mixing_nodes
from tests.foreign import families, modules
from tests.foreign.modules import Model, blocks, causal
from tests.passes.helpers import apply
from tests.variants import nightly


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
    assert "at test_capture.py:" in str(caught.value)


def test_a_branch_for_one_token_differs_from_eager():
    """Dynamo bakes in the branch for many tokens without a guard: running with one token tells."""
    model = modules.build(lambda: Single(blocks(causal)))
    with pytest.raises(CaptureError, match="at T=1"):
        compare_with_eager(model, capture(model))


def test_no_logits():
    model = modules.build(lambda: Tuple(blocks(causal)))
    with pytest.raises(CaptureError, match="returns a dict, expected the logits"):
        compare_with_eager(model, capture(model))


class Ending(Model):
    """What `end` makes of the logits."""

    def __init__(self, end):
        super().__init__(blocks(causal, 1))
        self.end = end

    def forward(self, input_ids, position_ids):
        return self.end(super().forward(input_ids, position_ids))


class OtherNames(Model):
    def forward(self, ids, place):
        return super().forward(ids, place)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Ending(lambda y: y[:, :1]),
            r"float32 \[1, 61\], expected.*[^\0]*test_capture.py",
        ),
        (lambda: Ending(lambda y: y[:, 0]), r"float32 \[1, 61\], expected float logits"),
        (lambda: Ending(lambda y: y.long()), r"int64 \[T, 61\], expected float logits"),
        (lambda: Ending(lambda y: None), "forward computes no tensor"),
        (lambda: Ending(lambda y: F.dropout(y)), r"random numbers[^\0]*test_capture.py.*dropout"),
        (lambda: OtherNames(blocks(causal, 1)), r"takes \(ids, place\), expected \(input_ids"),
    ],
)
def test_what_is_no_logits(make, message):
    with pytest.raises(CaptureError, match=message):
        capture(modules.build(make))


class Before(Model):
    """Something that torch's core operators do not have, before the blocks; [1, T, D]."""

    def __init__(self, before):
        super().__init__(blocks(causal, 1))
        self.before = before

    def forward(self, input_ids, position_ids):
        x = F.embedding(input_ids, self.head.weight)
        x = x + self.before(x)
        return self.head(self.norm(self.blocks[0](x, position_ids)))


class OverChannels(nn.Module):
    """A module that wants [N, C, T]; tokens that padding added are cut off."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Rolled(nn.Module):
    def forward(self, x):
        return x.roll(1, 1) + x.roll(-1, 1) + x.roll(3, 2)


class PyTorchsAttention(nn.Module):
    """nn.MultiheadAttention, and nn.TransformerEncoder, whose quick paths are single operators."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 24, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return self.encoder(x, mask=mask) + self.encoder(x, mask=mask, is_causal=True) + y


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 32)), nn.Tanh())


@pytest.mark.parametrize(
    "make, mixes",
    [
        (lambda: OverChannels(nn.Conv1d(32, 32, 3, padding=4, dilation=2, groups=4)), True),
        (PyTorchsAttention, False),
        *nightly(
            (lambda: OverChannels(nn.Conv1d(32, 32, 3, padding=2, groups=32)), True),
            (lambda: OverChannels(nn.GroupNorm(4, 32)), True),
            (lambda: OverChannels(nn.BatchNorm1d(32)), False),
            (Rolled, True),
            (weight_normed, False),
        ),
    ],
)
def test_modules_of_pytorch(make, mixes):
    """Captured equals eager; attention within a module of PyTorch is attention."""
    torch.manual_seed(0)
    model = modules.build(lambda: Before(make()))
    module = capture(model, flat=False)
    compare_with_eager(model, module)
    apply(raise_attention, module)
    assert bool(mixing_nodes(module)) == mixes


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, *nightly(torch.float16)])
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


@pytest.mark.nightly  # one class in two settings: test_compare.py has a decoder that is so
def test_one_region_a_setting():
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


def test_refusal_inside_the_adapter(monkeypatch):
    monkeypatch.setattr(foreign, "_KNOWN_ARGUMENTS", set())
    message = r"attention of LlamaAttention with [^\n]*dropout[^\n]*\n.*attention_interface\("
    with pytest.raises(UnsupportedModelError, match=message):
        capture(families.build("llama"))


class Picky(modules.Block):
    """Takes only what is [T, D], and says so."""

    def forward(self, x, positions):
        if x.dim() != 2:
            raise ValueError("I take tokens, not batches")
        return super().forward(x, positions)


def test_what_a_layer_says_is_told_and_tokens_alone_are_tried():
    model = modules.build(lambda: Model([Picky(causal()), Picky(causal())]))
    told = r"it raises ValueError\('I take tokens, not batches'\)\n  at test_capture\.py"
    with pytest.raises(CaptureError, match=told):
        capture(model, flat=False)
    compare_with_eager(model, capture(model))


class Same(modules.Block):
    """Gives out what it got, which no region may."""

    def forward(self, x, positions):
        return x


def test_a_layer_that_gives_out_what_it_got_is_no_region():
    model = modules.build(lambda: Model([*blocks(causal, 1), Same(causal())]))
    module = capture(model)
    assert not module.regions()
    compare_with_eager(model, module)


class Counted(Model):
    """nanoGPT's positions: it counts the tokens itself."""

    def forward(self, input_ids, position_ids):
        place = torch.arange(input_ids.shape[1])
        return super().forward(input_ids, place)


class FirstRows(Model):
    """The first rows of a table of 90, one further; and a branch that a sequence of 520 takes."""

    def __init__(self, blocks):
        super().__init__(blocks, learned=False)
        self.table = nn.Parameter(torch.zeros(1, 90, modules.HIDDEN))

    def forward(self, input_ids, position_ids):
        tokens = input_ids.shape[1]
        logits = super().forward(input_ids, position_ids)
        row = self.table[:, 1 : tokens + 1].sum(-1, keepdim=True)
        return logits + row if tokens < 520 else logits


@pytest.mark.parametrize(
    "make, limit, line",
    [
        (lambda: Counted(blocks(causal)), 96, "modules.py:.*self.positions"),
        *nightly(
            (lambda: FirstRows(blocks(causal, 1)), 89, "test_capture.py:.*self.table"),
            (lambda: Model(blocks(causal)), 96, "modules.py:.*self.positions"),
            (lambda: Model(blocks(causal), learned=False), None, None),
        ),
    ],
)
def test_tables_and_branches_limit_the_length(make, limit, line):
    module = capture(modules.build(make), flat=False, max_tokens=512)
    found = module.length_limit
    assert (found and found.num_tokens) == limit
    assert line is None or re.search(line, found.source_line)
