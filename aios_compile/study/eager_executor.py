"""Run level 3 in eager PyTorch behind the engine's step interface (AIOS_EAGER=1).

The oracle of the whole C++ target: the same graph, batches, pages and sampler, with each kernel
replaced by its body's reference. Slow; keeps every weight in memory unpacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aios_compile.codegen.pack_weights import CheckpointTensors
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.runtime.batch import Batch, Limits, StepResult


class EagerExecutor:
    """An Executor over an IRModule at any level after paging. Owns its KV caches.

    read: checkpoint name -> tensor or KeyError, as the weight recipes ask for them.
    """

    usable = True

    def __init__(self, module: IRModule, read: Callable[[str], Tensor], limits: Limits) -> None:
        self.limits = limits
        self.module = module
        self._values: dict[str, Any] = {}
        tensors = CheckpointTensors(module, read)
        values = {n.name: n.meta["val"] for n in placeholders(module.root.graph)}
        with torch.no_grad():
            for name, recipe in module.weights.items():
                self._values[name] = recipe.run(tensors).to(values[name].dtype)
        for name in module.states:
            shape = [limits.num_pages, *map(int, values[name].shape[1:])]
            self._values[name] = torch.zeros(shape, dtype=values[name].dtype)

    def step(self, batch: Batch) -> StepResult:
        """Run the graph on the batch; update the caches; return its outputs as arrays."""
        arguments = []
        for node in placeholders(self.module.root.graph):
            source = self.module.inputs.get(node.name)
            arguments.append(
                self._values[node.name]
                if source is None
                else torch.from_numpy(np.array(getattr(batch, source)))
            )
        with torch.no_grad():
            results = self.module.root(*arguments)
        for name, index in self.module.states.items():
            self._values[name] = results[index]
        arrays = {name: r.numpy() for name, r in zip(self.module.outputs, results)}
        return StepResult(**arrays)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages (source, target) in all layers, in the order given."""
        for name in self.module.states:
            for source, target in pairs:
                self._values[name][target] = self._values[name][source]

    def close(self) -> None:
        """Drop the tensors. Idempotent."""
        self._values.clear()
