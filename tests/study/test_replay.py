"""Replay: equal trees give an empty diff, a changed kernel shows by its place and name."""

from __future__ import annotations

from pathlib import Path

from tests.replay import differences, write_sources


def test_sources_are_the_same_twice_and_a_change_shows(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_sources(tmp_path / name, ["llama_mqa", "no_such_model"])
    old, new = tmp_path / "old", tmp_path / "new"
    assert [p.name for p in old.iterdir()] == ["llama_mqa"]
    assert differences(old, new) == []
    kernel = next((new / "llama_mqa").glob("*_add_rms_norm.cpp"))
    kernel.write_text(kernel.read_text().replace("1e-05", "1e-06"))
    lines = differences(old, new)
    assert any(line.startswith("+") and "1e-06" in line for line in lines)
    assert f"--- a/llama_mqa/{kernel.name}" in lines
