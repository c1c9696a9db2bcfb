"""What no emitter can write is refused with the model's line, whoever in the emitter finds out."""

import pytest
import torch

from aios_compile.capture.capture import capture
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.emit_kernels import emit_kernels
from aios_compile.errors import CodegenError
from aios_compile.ir.module import Level
from aios_compile.passes.form_kernels import form_kernels
from tests.passes.helpers import apply


class Wide(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids[..., None].double().rsqrt()


def test_a_function_that_the_dialect_lacks_names_the_line() -> None:
    module = capture(Wide())
    apply(form_kernels, module)
    module.level = Level.KERNELS
    with pytest.raises(CodegenError, match=r"rsqrt in float64[^\0]*test_emit_kernels\.py:.*rsqrt"):
        emit_kernels(module, EMITTERS)
