"""Find the repeated layers of a model and make each layer class one compile region."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from aios_compile.capture import torch_private


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost ModuleLists whose children share one class, by path.

    The rule needs no list of models: decoders keep their layers in one list of one class.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if inside or not isinstance(module, nn.ModuleList):
            continue
        if isinstance(module, parametrize.ParametrizationList):
            continue  # how one weight is computed
        if any(layer._forward_hooks or layer._forward_pre_hooks for layer in module):
            continue  # a region is a layer's forward, and hooks run around it
        if len({type(child) for child in module}) == 1:
            found[path] = module
    return found


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[dict[str, nn.ModuleList]]:
    """Patch the forward of every layer class to be a region; restore it afterwards.

    The class is patched because a bound method cannot be marked.
    """
    lists = layer_lists(model)
    sizes: dict[type[nn.Module], int] = {}
    for layers in lists.values():
        layer_class = type(layers[0])
        sizes[layer_class] = sizes.get(layer_class, 0) + len(layers)
    originals = {c: c.forward for c in sizes}
    own = {c for c in sizes if "forward" in c.__dict__}
    for c, count in sizes.items():
        c.forward = torch_private.compile_region(originals[c], max(8, count + 1))
    try:
        yield lists
    finally:
        for c, forward in originals.items():
            if c in own:
                c.forward = forward
            else:
                del c.forward
