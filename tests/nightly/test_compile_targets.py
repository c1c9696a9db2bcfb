"""`aios compile MODEL --target ... --dump ...` for every card, without a GPU (minutes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import zoo

pytest.importorskip("triton")


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_a_model_compiles_for_a_card(target: str, tmp_path: Path) -> None:
    path, out = zoo.make("qwen3_gqa", tmp_path, "bfloat16"), tmp_path / "out"
    command = [sys.executable, "-m", "aios_compile.cli.main", "compile", str(path)]
    command += ["--target", target, "--dump", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment)
    report = json.loads((out / "report.json").read_text())
    assert report["predicted_us"] > report["floor_us"] > 0
    for kernel in report["kernels"]:
        page = (out / f"{kernel['name']}.html").read_text()
        assert "href='#L" in page
        source = next(out.glob(f"*{kernel['name']}*.py")).read_text()
        if kernel["model_lines"]:  # from a line of the binary to Triton, to a node, to the model
            assert "href='#N" in page and "<span id='N" in page and "href='#M1'" in page
            assert "# <- " in source and kernel["model_lines"][0].partition(" in ")[0] in source
            assert "' title='" in page, "links of assembly tell of nodes and the model"
        for binary in kernel["binaries"]:
            assert Path(binary["text"]).exists() and Path(binary["binary"]).stat().st_size
