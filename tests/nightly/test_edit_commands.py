"""`aios kernels` and `aios edit` on a real model: an edit is used, survives a start, goes again."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from aios_compile.cli.main import app
from tests import zoo


def test_the_commands(tmp_path: Path) -> None:
    model, cache = str(zoo.make("llama_mqa", tmp_path)), str(tmp_path / "cache")

    def aios(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*arguments, "--cache-dir", cache])
        assert done.exit_code == code, done.output
        return done.stdout

    rows = json.loads(aios("kernels", model, "--json"))["kernels"]
    sizes = [row["bytes_a_token"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and rows[0]["model_lines"] and rows[0]["phases"]
    assert not any(row["edited"] for row in rows)
    text = aios("kernels", model, "--show", "add_rms_norm")
    (tmp_path / "mine.cpp").write_text(f"// by hand\n{text}")
    edit = ("edit", "add_rms_norm", "--file", str(tmp_path / "mine.cpp"), "--model", model)
    assert "is edited: error" in aios(*edit)
    for _ in range(2):  # the second start finds the artefact in the cache
        assert "// by hand" in aios("kernels", model, "--show", "add_rms_norm")
    edited = [
        r["name"] for r in json.loads(aios("kernels", model, "--json"))["kernels"] if r["edited"]
    ]
    assert len(edited) == 1 and edited[0].startswith("add_rms_norm")
    assert "what the compiler writes" in aios("edit", "add_rms_norm", "--revert")
    assert "// by hand" not in aios("kernels", model, "--show", "add_rms_norm")
    aios("edit", "nonsense", "--file", str(tmp_path / "mine.cpp"), code=1)
