"""Random checkpoint tensors by name, cheap enough to prove every pass on real models' shapes.

All tensors of a dtype are windows of one random buffer, at an offset that depends on the name: a
layer of 15 million weights costs nothing to make. Values known before loading (buffers, folded
constants) are used as they are; parameters never are, because fresh ones are ones and zeros that
hide mistakes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aios_compile.ir.module import IRModule, Recipe, outputs, placeholders
from aios_compile.ir.quant_format import QuantFormat
from aios_compile.ir.quantized import dequantize
from aios_compile.ir.stored_weights import random_rows, split_name, stored_rows

VOCABULARY_ROWS = 64
_SLACK = 1 << 16  # offsets are spread over this many elements
_LIMIT = 1 << 26  # larger tensors repeat the buffer
_KEPT_BYTES = 512 << 20
ROW_BY_ROW = frozenset(
    {
        *(torch.ops.aios.quantize_rows.default, torch.ops.aios.dequantize_rows.default),
        *(torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype),
    }
)


@dataclass
class RandomWeights:
    """Seeded values for checkpoint names.

    vocabulary: tensors of that many rows keep VOCABULARY_ROWS of them; 0 keeps every tensor whole.
    quantized: text of a recipe -> the recipe that quantises its result; such a weight is given out
    dequantised (float32), so that a program before quantisation has the weights of the one after.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    known: Mapping[str, Tensor]
    seed: int
    vocabulary: int = 0
    quantized: Mapping[str, Recipe] = field(default_factory=dict)
    _buffers: dict[tuple[torch.dtype, torch.dtype], Tensor] = field(default_factory=dict)
    _built: dict[tuple[str, bool], Tensor] = field(default_factory=dict)
    _wide: dict[tuple[int, torch.Size], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(module: IRModule, seed: int, vocabulary: int = 0) -> RandomWeights:
        """Read names, shapes and dtypes off a program whose recipes are identities or whose tensors
        are known."""
        shapes, dtypes = {}, {}
        for name, tensor in module.tensors.items():
            shapes[name], dtypes[name] = tuple(tensor.shape), tensor.dtype
        for node in placeholders(module.root.graph):
            recipe = module.weights.get(node.name)
            value = node.meta["val"]
            if recipe is not None and recipe.is_identity():
                shapes[recipe.names[0]] = tuple(int(s) for s in value.shape)
                dtypes[recipe.names[0]] = value.dtype
            elif recipe is not None and (stored := stored_rows(recipe)) is not None:
                rows, depth = map(int, value.shape)
                shapes[stored.name] = (rows, QuantFormat.parse(stored.form).row_bytes(depth))
                dtypes[stored.name] = torch.uint8
                if stored.order:
                    shapes[stored.order], dtypes[stored.order] = (depth,), torch.int32
        known = {n: t for n, t in module.tensors.items() if not isinstance(t, nn.Parameter)}
        return RandomWeights(shapes, dtypes, known, seed, vocabulary)

    def learn(self, module: IRModule) -> None:
        """Take over values that a pass has computed since (folded constants)."""
        known = {n: t for n, t in module.tensors.items() if not isinstance(t, nn.Parameter)}
        self.known = {**self.known, **known}

    def weight(self, recipe: Recipe, in_float64: bool = False) -> Tensor:
        """Return what a recipe makes of the random checkpoint; the oracle's is upcast."""
        if self.quantized and (after := self.quantized.get(recipe.text())):
            form = str(outputs(after.graph)[0].args[1])
            value = self.widened(self.weight(after), form)
            return _upcast(value) if in_float64 else value
        if recipe.is_identity():
            return self.tensor(recipe.names[0], in_float64)
        key = (recipe.text(), in_float64)
        if key not in self._built:
            with torch.no_grad():
                value = recipe.run({n: self.tensor(n) for n in recipe.names})
            self._built[key] = _upcast(value) if in_float64 else value
        return self._built[key]

    def widened(self, weight: Tensor, form: str = "") -> Tensor:
        """Return the float32 copy of a half precision weight that this object gave out.

        form: the format of quantised rows, which are dequantised.
        """
        if form:
            key = (weight.data_ptr(), weight.shape)
            if key not in self._wide:
                self._wide[key] = dequantize(weight, QuantFormat.parse(form))
            return self._wide[key]
        if not weight.is_contiguous():
            return weight.float()
        for (stored, dtype), buffer in list(self._buffers.items()):
            offset = (weight.data_ptr() - buffer.data_ptr()) // weight.element_size()
            end = offset + weight.numel()
            if stored == dtype == weight.dtype and offset >= 0 and end <= len(buffer):
                return self._buffer(stored, torch.float32)[offset:end].view(weight.shape)
        key = (weight.data_ptr(), weight.shape)
        if key not in self._wide:
            self._wide[key] = weight.float()
        return self._wide[key]

    def forget(self) -> None:
        """Free the results of recipes when they have become large."""
        kept = (*self._built.values(), *self._wide.values())
        if sum(t.numel() * t.element_size() for t in kept) > _KEPT_BYTES:
            self._built.clear()
            self._wide.clear()

    def tensor(self, name: str, in_float64: bool = False) -> Tensor:
        """Return a checkpoint tensor in its own dtype, or the same values in float64."""
        if name in self.known:
            value = self.known[name]
            value = value[:VOCABULARY_ROWS] if self._is_table(tuple(value.shape)) else value
            return _upcast(value) if in_float64 else value
        shape, dtype = self.shapes[name], self.dtypes[name]
        if self._is_table(shape):
            shape = (VOCABULARY_ROWS, *shape[1:])
        if split_name(name)[1]:
            return self._rows(name, shape)
        if not dtype.is_floating_point:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randint(0, 2, shape, generator=generator).to(dtype)
        count = math.prod(shape)
        start = zlib.crc32(f"{self.seed} {name}".encode()) % (_SLACK // 16) * 16
        if len(shape) > 1:
            return self._window(dtype, in_float64, start, count).view(shape)
        vector = 1 + 5 * self._window(dtype, False, start, count).view(shape)
        return _upcast(vector) if in_float64 else vector

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        key = (f"{name} {shape[0]}", False)
        if key not in self._built:
            self._built[key] = random_rows(name, shape, self.seed)
        return self._built[key]

    def _is_table(self, shape: tuple[int, ...]) -> bool:
        return bool(self.vocabulary and shape and shape[0] == self.vocabulary)

    def _window(self, dtype: torch.dtype, in_float64: bool, start: int, count: int) -> Tensor:
        buffer = self._buffer(dtype, torch.float64 if in_float64 else dtype)
        if start + count > len(buffer):
            return buffer.repeat(-(-(start + count) // len(buffer)))[start : start + count]
        return buffer[start : start + count]

    def _buffer(self, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Return the buffer of values that `stored` can hold, as `dtype`."""
        if (stored, dtype) not in self._buffers:
            if (torch.float32, torch.float32) not in self._buffers:
                sizes = [math.prod(s) for s in self.shapes.values() if not self._is_table(s)]
                length = min(max(sizes, default=0), _LIMIT) + _SLACK
                generator = torch.Generator().manual_seed(self.seed)
                base = torch.randn(length, generator=generator) * 0.05
                self._buffers[torch.float32, torch.float32] = base
            base = self._buffers[torch.float32, torch.float32]
            self._buffers[stored, dtype] = base.to(stored).to(dtype)
        return self._buffers[stored, dtype]


def _upcast(value: Tensor) -> Tensor:
    return value.to(torch.float64) if value.is_floating_point() else value


def quantized_recipes(before: IRModule, after: IRModule) -> dict[str, Recipe]:
    """Return, by the text of a weight's recipe before a pass, the recipe that quantises it."""
    known = {recipe.text() for recipe in before.weights.values()}
    found = {}
    for recipe in after.weights.values():
        result = outputs(recipe.graph)[0]
        if result.target is torch.ops.aios.quantize_rows.default:
            source = recipe.until(result.args[0])
            if source.text() in known:
                found[source.text()] = recipe
    return found


def shrinkable_vocabulary(*modules: IRModule) -> int:
    """Return the vocabulary size when it can be cut to a few rows in all these programs, else 0.

    It can where only the outer graph's own nodes read tables of that many rows, none of which is
    made of others but row by row, and no node has the number as an argument.
    """
    sizes = {_vocabulary(module) for module in modules}
    return sizes.pop() if len(sizes) == 1 else 0


def _vocabulary(module: IRModule) -> int:
    graph = module.root.graph
    tables = [
        n
        for n in placeholders(graph)
        if n.name in module.weights
        and any("embedding" in str(u.target) for u in n.users)
        and n.meta["val"].dim() == 2
    ]
    if not tables:
        return 0
    rows = int(tables[0].meta["val"].shape[0])
    if rows <= VOCABULARY_ROWS:
        return 0
    for node in placeholders(graph):
        value, recipe = node.meta["val"], module.weights.get(node.name)
        if recipe is not None and value.dim() and value.shape[0] == rows and _mixes_rows(recipe):
            return 0
    for name, graph_module in module.graphs().items():
        for node in graph_module.graph.nodes:
            if _mentions(node.args, rows) or _mentions(tuple(node.kwargs.values()), rows):
                return 0
            value = node.meta.get("val")
            inside = name and node.op == "placeholder" and isinstance(value, Tensor)
            if inside and value.dim() and value.shape[0] == rows:
                return 0
    return rows


def _mixes_rows(recipe: Recipe) -> bool:
    """Return whether a recipe holds anything that is not known to make each row of one row."""
    calls = [n for n in recipe.graph.nodes if n.op not in ("placeholder", "output")]
    return any(n.target not in ROW_BY_ROW for n in calls)


def _mentions(value: object, number: int) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_mentions(v, number) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value == number
