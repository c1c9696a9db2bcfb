"""Which configuration of a kernel was the fastest on a GPU: measured once, kept, read at starts.

One JSON file a GPU in `ledgers/` ships with the package; `python -m benchmarks.gpu ledger` writes
it from what select_kernels measured there (docs/gpu.md). A start on that GPU then times nothing and
compiles only what is chosen. An entry counts for one GPU by name, one minor version of Triton (its
compiler decides what a configuration becomes), one signature (Problem.signature: sizes and dtypes)
and one range of rows; and only while its choice is among the configurations that are enumerated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aios_compile.errors import CodegenError

FOLDER = Path(__file__).parent / "ledgers"
FORMAT = 1
MEASURED = "measured, "  # begins the reason of what a ledger decided
Rows = Mapping[str, "Entry"]  # the largest number of rows, or "any"


@dataclass(frozen=True)
class Entry:
    """What was best for a range of rows: Config.text() of it.

    speedup: of a whole step of `tokens` tokens and step_us microseconds with what the model would
    have chosen, 1.0 where that is the best; rounds: pairs that say so.
    """

    choice: str
    tokens: int
    step_us: float
    speedup: float
    rounds: int

    def text(self) -> str:
        """Return the reason in words."""
        return (
            f"{MEASURED}{self.speedup:.3f}x of a step of {self.tokens} tokens and "
            f"{self.step_us:.0f} us"
        )


@dataclass(frozen=True)
class KernelLedger:
    """What was measured on one GPU. gpu: its name as the driver tells it; target: "cuda:90";
    triton: major and minor version; measured: when and at which commit. entries: by signature.
    """

    gpu: str
    target: str
    triton: str
    measured: str = ""
    entries: Mapping[str, Rows] = field(default_factory=dict)

    def entry(self, signature: str, most: int | None) -> Entry | None:
        """Return the entry of a kernel for up to `most` rows (None: any number)."""
        return self.entries.get(signature, {}).get(rows_name(most))

    def merged(self, other: KernelLedger) -> KernelLedger:
        """Return both; what `other` has measured anew counts. They are of one GPU and compiler."""
        assert (self.gpu, self.target, self.triton) == (other.gpu, other.target, other.triton)
        names = sorted({*self.entries, *other.entries})
        entries = {n: {**self.entries.get(n, {}), **other.entries.get(n, {})} for n in names}
        return KernelLedger(self.gpu, self.target, self.triton, other.measured, entries)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> KernelLedger:
        """Read what to_json wrote. Raises KeyError, TypeError or ValueError for anything else."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, expected {FORMAT}")
        entries = {
            str(signature): {str(most): Entry(**entry) for most, entry in rows.items()}
            for signature, rows in data["entries"].items()
        }
        names = {name: str(data[name]) for name in ("gpu", "target", "triton", "measured")}
        return KernelLedger(**names, entries=entries)

    def write(self, folder: Path = FOLDER) -> Path:
        """Write the file of this GPU; return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = path_of(self.gpu, folder)
        path.write_text(json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n")
        return path


def rows_name(most: int | None) -> str:
    """Return the key of a range of rows."""
    return "any" if most is None else str(most)


def path_of(gpu: str, folder: Path = FOLDER) -> Path:
    """Return the file of a GPU: nvidia_h200.json."""
    return folder / (re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json")


def minor_version(version: str) -> str:
    """Return "3.6" of "3.6.0"."""
    return ".".join(version.split(".")[:2])


def shipped(
    gpu: str, target: str, triton: str, folder: Path = FOLDER
) -> tuple[KernelLedger | None, str]:
    """Return the ledger of a GPU for this version of Triton, and a line for the report.

    Raises CodegenError for a file that cannot be read: it came with the package.
    """
    path = path_of(gpu, folder)
    if not path.exists():
        return None, f"no ledger of kernels for {gpu}"
    found = _read(path)
    if (found.gpu, found.target) != (gpu, target):
        return None, f"{path.name} is of {found.gpu}, {found.target}: not used on {gpu}, {target}"
    return _for_version(found, path, triton)


def of_card(
    target: str, name: str, triton: str, folder: Path = FOLDER
) -> tuple[KernelLedger | None, str]:
    """Return the ledger of a GPU that is not here, and a line that says which: of the GPUs of a
    target the one that the card is named after ("H200"), else the first.

    Raises CodegenError for a file that cannot be read.
    """
    every = [(path, _read(path)) for path in sorted(folder.glob("*.json"))]
    mine = [(path, ledger) for path, ledger in every if ledger.target == target]
    if not mine:
        return None, f"the ledger of kernels is empty for {target}: no GPU of it was measured"
    path, found = min(mine, key=lambda x: name not in x[1].gpu)
    return _for_version(found, path, triton)


def _for_version(found: KernelLedger, path: Path, triton: str) -> tuple[KernelLedger | None, str]:
    if found.triton != minor_version(triton):
        return None, f"{path.name} was measured with triton {found.triton}: not used with {triton}"
    return found, f"{path.name}, measured {found.measured}: {len(found.entries)} kernels"


def _read(path: Path) -> KernelLedger:
    try:
        return KernelLedger.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CodegenError(
            f"{path} is not a ledger of kernels ({error})", advice="install the package again"
        ) from error
