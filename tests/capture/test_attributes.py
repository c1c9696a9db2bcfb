"""What a model keeps in its attributes: tensors beside buffers, and what earlier calls left."""

import pytest
import torch

from aios_compile.capture.capture import capture
from aios_compile.capture.compare import compare_with_eager
from aios_compile.errors import CaptureError
from aios_compile.passes.token_mixing import mixing_nodes
from tests.foreign import families, modules
from tests.foreign.modules import Model, blocks, causal
from tests.variants import nightly


class Plain(Model):
    """A tensor that is an attribute: neither parameter nor buffer."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.gain = torch.rand(modules.HIDDEN)

    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids) * self.gain
        return self.head(self.norm(self.blocks[0](x, position_ids)))


def test_a_plain_tensor_keeps_its_sizes():
    """Dynamo took its size for one that may change, and the model for one that asks for it."""
    model = modules.build(lambda: Plain(blocks(causal, 1)))
    assert compare_with_eager(model, capture(model)) < 1e-6


ROPES = {
    "phi3_long": {},
    "llama": {"rope_scaling": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
}


@pytest.mark.parametrize("name, trained", [("llama", 128), *nightly(("phi3_long", 16))])
def test_frequencies_that_no_sequence_can_change(name, trained):
    """The longest sequence chooses them; up to the trained length it has no choice."""
    model = families.build(name, **ROPES[name])
    tables = [m for m in model.modules() if hasattr(m, "rope_type")]
    families.run(model, trained)  # what the model keeps from it is no size that may change
    before = [{**vars(m), **m._buffers} for m in tables]
    module = capture(model, flat=False, max_length=trained)
    text = module.root.print_readable(print_output=False)
    assert "amax" not in text and "max.default" not in text
    assert compare_with_eager(model, module) < 1e-6
    after = [{**vars(m), **m._buffers} for m in tables]
    assert all(b[k] is a[k] for b, a in zip(before, after) for k in b)
    if name == "llama" or families.longrope_branches():
        with pytest.raises(CaptureError, match=r"modeling_rope_utils\.py:.*seq_len >"):
            capture(model, flat=False, max_length=trained + 1)
    else:
        longer = capture(model, flat=False, max_length=trained + 1)
        assert mixing_nodes(longer)


def test_the_mask_says_who_sees_whom():
    """BigBird-Pegasus calls its decoder's attention not causal, and gives it a causal mask."""
    model = families.build("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.is_causal = False
    assert compare_with_eager(model, capture(model, flat=False)) < 1e-6
