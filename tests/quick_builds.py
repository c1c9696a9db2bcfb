"""Quick builds for tests about meaning, of kernels and of models: -Og takes a third of -O3's time.

The generated text leaves a compiler no choice that shows: no product is fused with a sum, and none
is reordered, unless the text says so. So quick builds have the bits of the shipped ones, which
tests/compiled/test_batches.py holds them to. As shipped are in `make test`: that model, the example
in bf16 and in int4 with its perplexity, speculation and servers, what tests/codegen/kernels.py
builds, and what is timed, disassembled or inspected; at night everything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aios_compile.codegen.cpp import build, precompiled

QUICK = ("-Og",)
OWN = "-quick"


def quick_flags() -> tuple[str, ...]:
    """Return the flags to add: none at night."""
    return () if "NIGHTLY" in os.environ else QUICK


def quick_link_flags(target: build.Target | None = None) -> tuple[str, ...]:
    """Return the flag for gold where it is there: 0.03 s a library, GNU ld takes 0.08 s."""
    there = shutil.which("ld.gold") and not (target and target.foreign)
    return ("-fuse-ld=gold",) if there and "NIGHTLY" not in os.environ else ()


def build_quickly(patch: pytest.MonkeyPatch) -> None:
    """Compile models with QUICK until the patch is undone; not at night.

    Artefacts do not know of it: they go to a cache of their own.
    """
    flags = quick_flags()
    build_objects, link = build.build_objects, build.link

    def quick(*args: Any, **keywords: Any) -> Any:
        given = {**keywords, "extra_flags": flags, "many_programs": True}
        return build_objects(*args, **given)

    def quick_link(objects: Any, out_path: Path, target: Any = None, extra_flags: Any = ()) -> Path:
        return link(objects, out_path, target, (*extra_flags, *quick_link_flags(target)))

    patch.setattr(build, "build_objects", quick)
    patch.setattr(build, "link", quick_link)
    patch.setenv("AIOS_CACHE_DIR", os.environ["AIOS_CACHE_DIR"].removesuffix(OWN) + OWN)


def precompile_once(folder: Path) -> Callable[..., list[str]]:
    """Return `precompile` with one place for all folders of objects: a prelude takes a second."""

    def precompile(_: Path, *rest: Any) -> list[str]:
        return precompiled.precompile(folder, *rest)

    return precompile
