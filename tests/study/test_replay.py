"""Replay: equal trees give an empty diff, a changed kernel shows by its place and name."""

from __future__ import annotations

from pathlib import Path

from tests.replay import NAMED, differences, summary, write_sources


def test_sources_are_the_same_twice_and_a_change_shows(tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_sources(tmp_path / name, ["llama_mqa", "no_such_model"])
    old, new = tmp_path / "old", tmp_path / "new"
    assert [p.name for p in old.iterdir()] == ["llama_mqa"]
    assert differences(old, new) == [] and "0 changed, 0 new, 0 gone" in summary(old, new)
    kernel = next((new / "llama_mqa").glob("*_add_rms_norm.cpp"))
    kernel.write_text(kernel.read_text().replace("1e-05", "1e-06"))
    lines = differences(old, new)
    assert any(line.startswith("+") and "1e-06" in line for line in lines)
    assert f"--- a/llama_mqa/{kernel.name}" in lines


def test_a_change_that_many_models_have_is_shown_once(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for i in range(NAMED + 2):
        for folder, text in ((old, "one\ntwo\n"), (new, "one\nTWO\n")):
            (folder / f"m{i}").mkdir(parents=True)
            (folder / f"m{i}" / "00_k.cpp").write_text("first\n" * i + text)
    (new / "m0" / "refused.txt").write_text("no kernel\n")
    (old / "only_there").mkdir()
    lines = differences(old, new)
    assert [line for line in lines if line[0] in "+-"] == [
        "--- a/m0/00_k.cpp", "+++ b/m0/00_k.cpp", "-two", "+TWO",
        "--- a/m0/refused.txt", "+++ b/m0/refused.txt", "+no kernel",
    ]  # fmt: skip
    assert lines[0].startswith(f"the same in {NAMED + 2} files: m0/00_k.cpp, m1/00_k.cpp")
    assert lines[0].endswith("m5/00_k.cpp and 2 more")
    assert summary(old, new) == "8 models, 9 files: 8 changed, 1 new, 0 gone, 0 the same"
