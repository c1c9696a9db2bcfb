"""Process replay: the generated sources of the model zoo, this tree against another commit.

    python tests/replay.py [--against COMMIT] [--models llama_gqa,qwen3_tied]    (make replay)

A refactor shows an empty diff; a change shows what it changed. Kernels are named by their place and
what they compute, not by the digest of their text, so that a changed text is a changed line. The
other commit is checked out aside; models that it does not have are left out. Exit code 1: differs,
2: nothing to compare, the commit is too old.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUANTISED = ("qwen3_gqa+int8", "qwen3_gqa+int4")
LONGEST = 400  # lines of diff that are printed


def write_sources(folder: Path, models: list[str]) -> None:
    """Write kernels, step and plan of each zoo model below `folder`, for bf16 weights.

    models: names of the zoo, with "+int8" and the like quantised.
    """
    from aios_compile.codegen.cpp.step import emit_step
    from aios_compile.config import CompileOptions
    from aios_compile.study.plan_model import open_without_weights, plan_model
    from tests import zoo

    for name in models or (*zoo.ZOO, *QUANTISED):
        base, _, quantization = name.partition("+")
        if base not in zoo.ZOO:
            continue
        out = folder / name
        out.mkdir(parents=True)
        config = out / "config.json"
        config.write_text(json.dumps(zoo.config_of(base, "bfloat16")))
        options = CompileOptions(quantization=quantization or None)
        planned = plan_model(open_without_weights(config, options), options)
        sources = planned.emitted.sources
        titles = {s.symbol: re.sub(r"_[0-9a-f]{8}$", "", s.symbol) for s in sources}
        step = emit_step(planned.program, tuple(sources))
        texts = {f"{i:02d}_{titles[s.symbol]}.cpp": s.text for i, s in enumerate(sources)}
        for file, text in {**texts, "step.cpp": step}.items():
            for symbol, title in titles.items():
                text = text.replace(symbol, title)
            (out / file).write_text(text)
        plan = [f"{b.name} {b.bytes} {b.offset}" for b in planned.program.plan.buffers]
        (out / "plan.txt").write_text("\n".join([*plan, ""]))
        print(f"{name}: {len(sources)} kernels", file=sys.stderr)


def differences(old: Path, new: Path) -> list[str]:
    """Return the unified diff of two folders of sources, over the models that both have."""
    lines: list[str] = []
    for model in sorted({p.name for p in old.iterdir()} & {p.name for p in new.iterdir()}):
        files = {p.name for folder in (old, new) for p in (folder / model).iterdir()}
        for file in sorted(files):
            texts = [f / model / file for f in (old, new)]
            before, after = (t.read_text().splitlines() if t.exists() else [] for t in texts)
            lines += difflib.unified_diff(
                before, after, f"a/{model}/{file}", f"b/{model}/{file}", lineterm="", n=1
            )
    return lines


def main() -> int:
    """Compare the two trees; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare generated sources with another commit's.")
    parser.add_argument("--against", default="HEAD", help="the other commit")
    parser.add_argument("--models", default="", help="names of zoo models; none takes all")
    parser.add_argument("--write", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    models = [m for m in chosen.models.split(",") if m]
    if chosen.write:
        write_sources(Path(chosen.write), models)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        tree, old, new = (Path(temporary) / name for name in ("tree", "old", "new"))
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), chosen.against], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        old.mkdir()
        new.mkdir()
        try:
            for root, folder in ((tree, old), (ROOT, new)):
                script = root / "tests" / "replay.py"  # its own: functions move between commits
                if not script.exists():
                    print(f"{chosen.against} is too old: it has no tests/replay.py")
                    return 2
                command = [sys.executable, str(script), "--write", str(folder)]
                environment = {**os.environ, "PYTHONPATH": str(root)}
                arguments = ["--models", ",".join(models)] if models else []
                subprocess.run([*command, *arguments], cwd=root, env=environment, check=True)
            lines = differences(old, new)
            if not {p.name for p in old.iterdir()} & {p.name for p in new.iterdir()}:
                print(f"no model that both this tree and {chosen.against} know")
                return 2
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    print("\n".join(lines[:LONGEST]) or f"no difference from {chosen.against}")
    if len(lines) > LONGEST:
        print(f"... {len(lines) - LONGEST} lines more")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
