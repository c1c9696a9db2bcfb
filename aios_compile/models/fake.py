"""Build a module whose parameters have a shape and a dtype and no memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def build_fake(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Return build() with fake CPU parameters of `dtype`; buffers are real and keep their dtype.

    Fake, not meta: code that mixes parameters with real buffers then sees one device, as it will
    when it runs, and no `device=meta` is captured.
    """
    with torch.device("meta"):
        module = build().eval()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    replaced: dict[int, nn.Parameter] = {}  # by identity, so that tied weights stay tied
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                with mode:
                    fake = torch.empty(parameter.shape, dtype=dtype)
                    replaced[id(parameter)] = nn.Parameter(fake, requires_grad=False)
            child._parameters[name] = replaced[id(parameter)]
    return module
