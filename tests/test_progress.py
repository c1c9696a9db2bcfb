"""Progress: parts add up to the total; a line a stage, rewritten where somebody watches."""

from __future__ import annotations

import io
import time

import pytest

from aios_compile.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_parts_and_unaccounted_seconds_add_up_to_the_total() -> None:
    progress = Progress(show=False)
    with progress.stage("load"):
        time.sleep(0.02)
        with progress.stage("pack"):
            time.sleep(0.03)
    time.sleep(0.01)
    with progress.stage("load"):
        time.sleep(0.02)
    progress.finish()
    summary = progress.summary()
    assert sum(summary.seconds.values()) + summary.unaccounted == pytest.approx(summary.total)
    assert summary.seconds["load"] >= 0.04 and summary.seconds["pack"] >= 0.03
    assert summary.seconds["load"] < summary.total - 0.03, "the inner stage is not counted twice"
    assert summary.unaccounted >= 0.01
    assert str(summary).splitlines()[-1].split()[0] == "total"
    assert progress.summary().total == summary.total, "the clock stands still after finish"


def test_without_a_terminal_each_stage_is_one_plain_line() -> None:
    out = io.StringIO()
    progress = Progress(stream=out)
    progress.note("cache: miss, never compiled")
    with progress.stage("build", total=3):
        progress.update(1)
        progress.update(3)
    lines = out.getvalue().splitlines()
    assert lines[0] == "cache: miss, never compiled" and progress.notes == [lines[0]]
    assert len(lines) == 2 and lines[1].startswith("build 3/3") and lines[1].endswith(" s")
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_the_running_stage_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    progress = Progress(stream=out)
    with progress.stage("capture"):
        time.sleep(0.25)
    assert out.getvalue().count("\r\x1b[2Kcapture") >= 3 and out.getvalue().count("\n") == 1


def test_a_stage_that_fails_is_counted_too() -> None:
    progress = Progress(show=False)
    with pytest.raises(KeyError), progress.stage("load"):
        raise KeyError
    with progress.stage("next"):
        pass
    assert set(progress.summary().seconds) == {"load", "next"}
