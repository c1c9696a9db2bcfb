"""Modules that name their tokens otherwise, count positions, or give the last token's logits."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from aios_compile.capture.assemble import LAST_ONLY
from aios_compile.capture.capture import capture
from aios_compile.capture.compare import compare_with_eager
from aios_compile.errors import CaptureError
from aios_compile.ir.verifier import verify
from tests.foreign.modules import Model, blocks, build
from tests.variants import nightly


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(101, 16), nn.Linear(16, 101)

    def hidden(self, tokens, positions=None):
        positions = torch.arange(tokens.shape[-1]) if positions is None else positions
        return torch.tanh(self.table(tokens)) + positions[..., None] / 9


class Idx(Base):
    def forward(self, idx, targets=None):
        return self.head(self.hidden(idx)[:, [-1], :]), None


class Placed(Base):
    def forward(self, mask=None, input_pos=None, tokens=None):
        return {"loss": None, "logits": self.head(self.hidden(tokens, input_pos))[:, -1]}


class AnyName(Base):
    def forward(self, x):
        return self.head(self.hidden(x)[..., -1:, :])


class AskingMore(Base):
    def forward(self, tokens, image):
        return self.head(self.hidden(tokens))


class Nothing(Base):
    def forward(self):
        return self.head(self.table.weight)


@pytest.mark.parametrize(
    "make, inputs",
    [(Idx, {"token_ids"}), (Placed, {"token_ids", "positions"}), (AnyName, {"token_ids"})],
)
def test_called_by_its_own_names(make, inputs):
    model = make().eval()
    module = capture(model)
    assert set(module.inputs.values()) == inputs and module.root.meta[LAST_ONLY]
    assert compare_with_eager(model, module) <= 1e-6


@pytest.mark.parametrize(
    "make, missing", [(AskingMore, "nothing is known of image"), (Nothing, "")]
)
def test_a_forward_that_cannot_be_called(make, missing):
    with pytest.raises(CaptureError, match=rf"forward of {make.__name__} takes \(.*{missing}"):
        capture(make().eval())


def test_a_class_without_a_file_is_captured():
    """Typed into a prompt, or after python -c: no node has a line, which is not a lost one."""
    space = {"Base": Base}
    exec(  # as a prompt does
        "class Typed(Base):\n"
        "    def forward(self, input_ids, position_ids):\n"
        "        return self.head(self.hidden(input_ids, position_ids))\n",
        space,
    )
    model = space["Typed"]().eval()
    module = capture(model)
    assert compare_with_eager(model, module) <= 1e-6
    verify(module)


def test_a_scripted_part_is_named():
    model = Base()
    model.head = torch.jit.script(model.head)
    with pytest.raises(CaptureError, match="head is scripted"):
        capture(model.eval())


class Flex(nn.Module):
    def __init__(self, score: bool) -> None:
        super().__init__()
        self.score = score

    def forward(self, q, k, v, positions):
        def later(batch, head, query, key):
            return query >= key

        def fall(score, batch, head, query, key):
            return torch.where(query >= key, score - (query - key) * 0.5, -float("inf"))

        if self.score:
            return flex_attention(q, k, v, score_mod=fall)
        tokens = q.shape[-2]
        mask = create_block_mask(later, None, None, tokens, tokens, device="cpu")
        return flex_attention(q, k, v, block_mask=mask, scale=0.3)


@pytest.mark.parametrize("score", [False, *nightly(True)])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_attention_spelled_out(score):
    model = build(lambda: Model(blocks(lambda: Flex(score), 1)))
    assert compare_with_eager(model, capture(model)) <= 1e-6
