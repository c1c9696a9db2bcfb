"""Where the parts of a campaign leave their counts, for study/fuzz/report.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

from aios_compile.cli.output import plain
from aios_compile.study.fuzz.campaign import Tally


def write_part(tally: Tally, first: int, part: int) -> None:
    """Write a part's counts below FUZZ_REPORT, if that is set, and print them."""
    text = json.dumps(plain(tally), indent=2)
    folder = os.environ.get("FUZZ_REPORT")
    if folder:
        path = Path(folder) / f"{tally.target}_{tally.seed}_{first}_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(text)
