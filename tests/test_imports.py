"""What a start imports: no torch for the package and the command line; how long `--help` takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Raises on an import of torch or transformers, as on a machine that has neither.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""
MODULES = (
    "aios_compile",
    "aios_compile.config",
    "aios_compile.sampling_params",
    "aios_compile.codegen.artefact",
    "aios_compile.codegen.cache",
    "aios_compile.codegen.cpp.build",
    "aios_compile.cli.main",
)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", MODULES)
def test_it_imports_where_torch_cannot_be_imported(module: str) -> None:
    result = run(f"{BLOCK}\nimport {module}\nassert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_the_whole_runtime_and_checkpoint_import_without_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for part in ("runtime", "checkpoint", "cli")
        for path in sorted((ROOT / "aios_compile" / part).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    result = run(BLOCK + "\n".join(f"import {name}" for name in names))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_command_line_answers_without_torch_in_no_time(flag: str) -> None:
    """Under 0.3 s more than a bare interpreter.

    Of processor time, the best of three: it is what an idle machine shows, and a busy one too.
    """
    code = "import sys; sys.argv[0] = 'aios'\nfrom aios_compile.cli.main import main; main()"
    answer = run(BLOCK + code, flag)
    assert answer.returncode == 0 and "aios" in answer.stdout, answer.stderr

    def seconds(program: str, *arguments: str) -> float:
        times = []
        for _ in range(3):
            before = os.times()
            run(program, *arguments)
            after = os.times()
            user = after.children_user - before.children_user
            times.append(user + after.children_system - before.children_system)
        return min(times)

    assert seconds(code, flag) - seconds("pass") < 0.3
