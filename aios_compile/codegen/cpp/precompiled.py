"""The prelude, parsed once: most of a small kernel's compilation is reading the intrinsics' header.

g++ 12, one core: 0.33 s to compile a file that only includes the prelude, 0.03 s with the
precompiled one (27 MB, 0.8 s to make). A step also reads the runtime, 0.1 s and more: one model
does not pay for precompiling that (33 MB, 1 s), many programs do. g++ looks for prelude.h.gch
before prelude.h in each include folder and passes it over when the compiler or the flags differ, so
it can only save time; headers that it holds besides are not read again (#pragma once).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

PRELUDE = "prelude.h"
STEP = "step_line.h"
PROGRAM = (PRELUDE, STEP, "products.h", "tiles.h")  # what most whole programs include
Run = Callable[[list[str], str, str], None]


def precompile(
    folder: Path,
    headers: Sequence[Path],
    compiler: str,
    version: str,
    flags: Sequence[str],
    key: str,
    run: Run,
) -> list[str]:
    """Return the compiler's arguments that let it find the precompiled `headers` below `folder`.

    The first of them is the prelude. `key` names all headers' text. Made on the first call for this
    compiler and these flags, and moved into place in one step; with a compiler other than g++ there
    are none. Errors are `run`'s.
    """
    if "clang" in version:
        return []
    names = (header.name for header in headers)
    digest = hashlib.sha256("\0".join((key, version, *flags, *names)).encode()).hexdigest()
    place = folder / f"prelude-{digest[:16]}"
    if not (place / f"{PRELUDE}.gch").exists():
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as aside:
            built, text = Path(aside) / f"{PRELUDE}.gch", Path(aside) / "headers.h"
            text.write_text("".join(f'#include "{header}"\n' for header in headers))
            command = [compiler, *flags, "-w", "-x", "c++-header", str(text), "-o", str(built)]
            run(command, "the prelude", "the generated code's header must compile: report it")
            os.replace(built, place / built.name)
    return ["-I", str(place)]
