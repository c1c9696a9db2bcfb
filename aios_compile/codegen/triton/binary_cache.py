"""Triton's compiled kernels in the artefact: put there when it is made, found there by a start.

Triton looks a kernel up by a hash of its text, signature, options and target before it compiles.
`keep` copies what such a look-up reads; `use` makes Triton look into the artefact first; and
`Compilations` counts what was compiled all the same, which after a start must be nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "triton"  # of the artefact
KEPT = (".json", ".cubin", ".hsaco")


def keep(cache: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (relative path, bytes) of what a start needs of a folder that Triton cached into."""
    for path in sorted(cache.rglob("*")):
        if path.suffix in KEPT and path.is_file():
            yield f"{FOLDER}/{path.parent.name}/{path.name}", path.read_bytes()


def use(artefact: Path) -> None:
    """Let Triton find the kernels of an artefact; others go to its own cache, as ever.

    The setting is the process's: models that were used before stay known.
    """
    from triton import knobs

    folders: list[Path] = getattr(knobs.cache.manager_class, "folders", [])
    folders = [artefact / FOLDER, *(f for f in folders if f != artefact / FOLDER)]
    knobs.cache.manager_class = _manager(folders)


def settle_keys(module: Any) -> None:
    """Let Triton hash a module's functions in the order in which they stand.

    With triton 3.6 the hash of a kernel depends on whether what it calls was hashed before.
    """
    for value in list(vars(module).values()):
        getattr(value, "cache_key", None)


@dataclass(frozen=True)
class Known:
    """One launch of a loaded module: of the variant for `most` rows, or of its `candidate`."""

    most: int | None
    candidate: str
    launch: dict[str, Any]


def every_launch(module: Any) -> Iterator[Known]:
    """Yield everything that a loaded module may ever run, candidates included."""
    for variant in module.VARIANTS:
        listed = {"": variant["launches"], **variant.get("candidates", {})}
        for name, launches in listed.items():
            yield from (Known(variant["most"], name, launch) for launch in launches)


def _manager(found: list[Path]) -> Any:
    from triton.runtime.cache import FileCacheManager

    class ArtefactCache(FileCacheManager):  # type: ignore[misc]
        """Triton's cache of one kernel, in the first artefact that has it."""

        folders = found

        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override, dump)
            self.kept = None
            if not (override or dump):
                self.kept = next((f / key for f in self.folders if (f / key).is_dir()), None)

        def get_group(self, filename: str) -> Any:
            """Return {name: path}; Triton's own list has the paths of where it was compiled."""
            group = None if self.kept is None else self.kept / f"__grp__{filename}"
            if group is None or not group.is_file():
                return super().get_group(filename)
            names = json.loads(group.read_bytes())["child_paths"]
            return {n: str(group.with_name(n)) for n in names if group.with_name(n).is_file()}

    return ArtefactCache


class Compilations:
    """Counts the kernels that Triton compiles in this process from now on, by name."""

    def __init__(self) -> None:
        from triton import knobs

        self.names: list[str] = []
        self._before: Callable[..., None] | None = knobs.compilation.listener
        knobs.compilation.listener = self._heard

    def _heard(self, *, src: Any, cache_hit: bool, **others: Any) -> None:
        if not cache_hit:
            self.names.append(str(src.name))
        if self._before is not None:
            self._before(src=src, cache_hit=cache_hit, **others)

    def close(self) -> None:
        """Stop counting, if nobody has begun to listen since."""
        from triton import knobs

        if knobs.compilation.listener == self._heard:
            knobs.compilation.listener = self._before
