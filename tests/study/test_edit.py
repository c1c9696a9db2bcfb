"""Edited kernels: used only if right, part of the key, kept over a restart, taken back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aios_compile.cli import kernels as command
from aios_compile.cli.main import app
from aios_compile.codegen import overrides
from aios_compile.codegen.cache import ArtefactCache
from aios_compile.codegen.cache_key import HashMemo, compute_key
from aios_compile.codegen.cpp.emitters import EMITTERS
from aios_compile.codegen.emit_kernels import Emitted, emit_kernels
from aios_compile.codegen.source import Candidate
from aios_compile.config import CompileOptions
from aios_compile.errors import CacheError, ConfigError
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.ir.refresh import refresh
from aios_compile.passes.context import PassOptions
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.runner import run_pipeline
from aios_compile.study.kernel_table import KernelRow
from aios_compile.study.verify_override import Verdict, _of_other_texts, apply_overrides
from tests.planted import programs

CANDIDATES = (Candidate("other", "Other", 1, 1, ""),)


@pytest.fixture(scope="module")
def lowered() -> tuple[IRModule, Emitted, RandomWeights]:
    captured = programs.level_1("qwen3")
    module = snapshot.take(captured)
    run_pipeline(module, STAGES, PassOptions(), verify=0)
    refresh(module)
    return module, emit_kernels(module, EMITTERS), RandomWeights.of(captured, 0)


def tried(lowered: Any, change: Any, folder: Path) -> tuple[Verdict, bool]:
    """Edit add_rms_norm; return the verdict and whether the text was replaced."""
    module, emitted, weights = lowered
    emitted = dataclasses.replace(emitted, sources=list(emitted.sources))
    index = next(i for i, s in enumerate(emitted.sources) if s.name.startswith("add_rms_norm"))
    source = dataclasses.replace(emitted.sources[index], candidates=CANDIDATES)
    emitted.sources[index] = source
    edits = {source.name: change(source.text), "of_another_model": "int x;"}
    (verdict,) = apply_overrides(module, emitted, edits, weights, 8, folder)
    kept = emitted.sources[index].candidates
    assert kept == (() if verdict.used else CANDIDATES), "no candidate in an edit's place"
    return verdict, edits[source.name] in [s.text for s in emitted.sources]


def body(text: str, line: str) -> str:
    """Add a line at the begin of the kernel."""
    head, brace, rest = text.rpartition("int64_t begin, int64_t end) {\n")
    assert brace
    return f"{head}{brace}{line}\n{rest}"


def test_a_right_edit_is_used_and_timed(lowered: Any, tmp_path: Path) -> None:
    verdict, replaced = tried(lowered, lambda text: body(text, "// by hand"), tmp_path)
    assert verdict.used and replaced and 0 < verdict.error <= verdict.budget
    assert 0.2 < verdict.times < 5 and "times as long as the generated" in str(verdict)
    quick, slow = (str(dataclasses.replace(verdict, times=t)) for t in (0.9, 1.5))
    assert "1.50 times" in slow and "slower, --revert" in slow and "slower" not in quick


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("1e-06", "1e-03"), "error .* against float64 at T=1"),
        (lambda text: body(text, "this is not C++;"), "does not compile"),
        (lambda text: text.replace("add_rms_norm", "another"), "does not define"),
        (lambda text: body(text, "*(volatile int*)nullptr = 1;"), "crashes"),
        (lambda text: body(text, "if (begin) return;"), "error inf|error|depends"),
    ],
)
def test_a_wrong_edit_is_not_used(lowered: Any, tmp_path: Path, change: Any, reason: str) -> None:
    verdict, replaced = tried(lowered, change, tmp_path)
    assert not verdict.used and not replaced
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(verdict.reason)


def test_an_edit_of_another_text_is_told() -> None:
    """A file that was named without the digits, or whose kernel the compiler changed."""
    names = ["add_rms_norm_dfd468cd", "linear_00000001", "linear_00000002"]
    edits = ["add_rms_norm", "linear_12345678", "linear_00000001", "rope_12345678", "linear_add"]
    told = [str(v) for v in _of_other_texts(edits, names)]
    begin = "is not used: it is of another text; this model has"
    assert told == [
        f"the edit of add_rms_norm {begin} add_rms_norm_dfd468cd",
        f"the edit of linear_12345678 {begin} linear_00000001, linear_00000002",
    ]


def test_edits_are_files_of_a_private_folder_and_part_of_the_key(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    memo = HashMemo(tmp_path / "hashes.json")

    def key() -> Any:
        found = overrides.digests(root)
        return compute_key("m", {"config.json": "0"}, CompileOptions(), memo, found)

    keys = [key().digest]
    overrides.write(root, "linear_1a", "// one")
    keys.append(key().digest)
    overrides.write(root, "linear_1a", "// two")
    keys.append(key().digest)
    assert len(set(keys)) == 3 and key().parts["overrides"].keys() == {"linear_1a"}
    assert overrides.texts(root) == {"linear_1a": "// two"}
    with pytest.raises(ConfigError, match="no name"):
        overrides.write(root, "../x", "")
    overrides.folder_of(root).chmod(0o777)
    with pytest.raises(CacheError, match="written by others"):
        overrides.texts(root)
    overrides.folder_of(root).chmod(0o700)
    assert overrides.remove(root, "linear_1a") and not overrides.remove(root, "linear_1a")
    assert key().digest == keys[0]


class Loaded:
    """A loaded model of which only the artefact's folder is looked at."""

    def __init__(self, folder: Path) -> None:
        self.artefact_path = folder

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_the_commands_on_an_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a real model, from the editor to the next start, is a nightly test."""
    cache, store = tmp_path / "cache", ArtefactCache(tmp_path / "cache")
    entry = store.root / "entries" / ("0" * 64)
    (entry / "kernels").mkdir(parents=True)
    row = KernelRow("linear_1a2b", "linear_1a2b", 3, 10, 2, 1, ("layer 4",), ("m.py:3 in f",))
    (entry / "kernels.json").write_text(json.dumps([row.as_dict()]))
    (entry / "kernels" / "linear_1a2b.cpp").write_text("// generated\n")
    monkeypatch.setattr(command, "load", lambda model, options: Loaded(entry))
    monkeypatch.setattr(command, "_generated", lambda root: command_files(entry))
    (tmp_path / "mine.cpp").write_text("// by hand\n")

    def aios(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*arguments, "--cache-dir", str(cache)])
        assert done.exit_code == code, done.output
        return done.stdout

    table = aios("kernels", "m")
    assert "13" in table and "layer 4" in table and "m.py:3 in f" in table
    assert aios("kernels", "m", "--show", "lin") == "// generated\n\n"
    aios("edit", "linear", "--file", str(tmp_path / "mine.cpp"))
    assert overrides.texts(cache) == {"linear_1a2b": "// by hand\n"}
    assert "(edited)" not in aios("kernels", "m"), "the artefact has the generated text"
    assert json.loads(aios("edit", "linear_1a2b", "--revert", "--json"))["reverted"]
    assert not overrides.texts(cache)
    other = entry.with_name("1" * 64) / "kernels"
    other.mkdir(parents=True)
    (other / "linear_3c4d.cpp").write_text("// of another model\n")
    monkeypatch.setattr(command, "_verdicts", lambda *_: [])
    monkeypatch.setattr(command, "_generated", lambda root: command_files(entry, other.parent))
    mine = ("--file", str(tmp_path / "mine.cpp"))
    ambiguous = CliRunner().invoke(app, ["edit", "linear", *mine, "--cache-dir", str(cache)])
    assert ambiguous.exit_code == 1 and "2 kernels named linear" in ambiguous.output
    aios("edit", "linear", *mine, "--model", "m")
    assert overrides.texts(cache) == {"linear_1a2b": "// by hand\n"}, "the model's own"
    aios("edit", "linear", "--revert")
    missing = ["edit", "linear_1a2b", "--file", "nowhere.cpp", "--cache-dir", str(cache)]
    assert "--file nowhere.cpp" in CliRunner().invoke(app, missing).output
    assert "no edit named norm" in CliRunner().invoke(
        app, ["edit", "norm", "--revert", "--cache-dir", str(cache)]
    ).output  # fmt: skip


def command_files(*entries: Path) -> dict[str, Path]:
    return {path.stem: path for e in entries for path in (e / "kernels").glob("*.cpp")}
