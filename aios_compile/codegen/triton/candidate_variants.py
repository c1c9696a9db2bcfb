"""The variants of a linear's module: of each range of rows the choice, and its candidates.

Candidates give the bits of the choice (Config.bits) and are there only while a GPU has to choose:
runtime/select_gpu_kernels.py times them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aios_compile.codegen.source import Candidate
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.frame import Launch, Variant
from aios_compile.codegen.triton.kernel_ledger import rows_name

ANY_TOKENS = 1 << 30
Chosen = Sequence[tuple[int | None, Config]]  # row bound, what serves it
Others = Mapping[int | None, tuple[Config, ...]]  # row bound, what the clock may choose instead
Build = Callable[[Config, str], tuple[list[str], tuple[Launch, ...]]]


def used(chosen: Chosen, others: Others) -> list[Config]:
    """Return all configurations of a module: workspace and counters are for every one of them."""
    return [config for most, first in chosen for config in (first, *others.get(most, ()))]


def variants(
    symbol: str, chosen: Chosen, others: Others, build: Build
) -> tuple[list[str], list[Variant]]:
    """Return the texts of the kernels, each once, and the variants.

    build: the texts and the launches of a configuration, given the name of its kernel.
    """
    texts: dict[str, None] = {}
    found = []
    for most, config in chosen:
        rows = rows_name(most)
        made, launches = build(config, f"{symbol}_{config.kind}_{rows}")
        texts.update(dict.fromkeys(made))
        listed = []
        for number, other in enumerate(others.get(most, ())):
            made, theirs = build(other, f"{symbol}_{other.kind}{number}_{rows}")
            texts.update(dict.fromkeys(made))
            listed.append((other.text(), theirs))
        found.append(Variant(most, launches, tuple(listed), config.text()))
    return list(texts), found


def candidates(others: Others, signature: str) -> tuple[Candidate, ...]:
    """Return a module's candidates for select_kernels, each name once: a range of rows that lacks
    one runs what it would run. type: the signature that the ledger keeps them under.
    """
    names = dict.fromkeys(config.text() for found in others.values() for config in found)
    return tuple(Candidate(name, signature, 1, ANY_TOKENS, name) for name in names)
