"""Process replay: the generated sources of the model zoo, this tree against another commit.

    python tests/replay.py [--against COMMIT] [--models llama_gqa,qwen3_tied]    (make replay)

A refactor shows an empty diff; a change shows what it changed: each distinct change once, with the
models that have it. Kernels are named by their place and what they compute, not by the digest of
their text, so that a changed text is a changed line. The other commit is checked out aside; models
that it does not have are left out. Exit code 1: differs, 2: nothing to compare, the commit is too
old.
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
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Models of the zoo with other options, by name: what follows the first "+" is for people.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3_gqa+int8": {"quantization": "int8"},
    "qwen3_gqa+int4": {"quantization": "int4"},
    "mistral_window+int8_kv": {"kv_cache_dtype": "int8"},
    "llama_gqa+fp8_kv": {"kv_cache_dtype": "fp8"},
    "qwen3_gqa+sm_90": {"device": "cuda", "card": "cuda:90"},
    "qwen2_gqa+sm_80": {"device": "cuda", "card": "cuda:80"},
    "qwen3_gqa+sm_90_fp8": {"device": "cuda", "card": "cuda:90", "quantization": "fp8"},
    "mistral_window+sm_90_int4": {"device": "cuda", "card": "cuda:90", "quantization": "int4"},
}
# Modules of transformers, from tests/foreign; --models every takes all of them.
FOREIGN = (
    "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "cohere", "falcon_alibi", "olmo2", "gpt_oss",
    "llama4", "mixtral", "deepseek_v3",
)  # fmt: skip
LONGEST = 400  # lines of diff that are printed
NAMED = 6  # models that are named where more have the same change


def write_sources(folder: Path, models: list[str]) -> None:
    """Write kernels, launches and plan of each model below `folder`; of one that is refused, why.

    models: names of the zoo, of VARIANTS and of tests/foreign; others are passed over. None: all of
    the zoo and VARIANTS, and FOREIGN. Zoo models have bf16 weights.
    """
    from aios_compile.errors import AiosError
    from tests import zoo
    from tests.foreign import families

    everything = (*zoo.ZOO, *VARIANTS)
    if models == ["every"]:
        models = [*everything, *families.FAMILIES]
    for name in models or (*everything, *FOREIGN):
        if name.split("+")[0] not in zoo.ZOO and name not in families.FAMILIES:
            continue
        out = folder / name
        out.mkdir(parents=True)
        try:
            texts = _texts(name, out)
        except AiosError as error:
            texts = {"refused.txt": f"{error}\n"}
        for file, text in texts.items():
            (out / file).write_text(text)
        print(f"{name}: {len(texts)} files", file=sys.stderr)


def _texts(name: str, out: Path) -> dict[str, str]:
    """Return {file name: text} of a model; its config.json is written to `out`."""
    from aios_compile.codegen.cpp.step import emit_step
    from aios_compile.config import CompileOptions
    from aios_compile.study.plan_model import open_without_weights, plan_model
    from tests import zoo
    from tests.foreign import families

    keywords = dict(VARIANTS.get(name, {}))
    card = keywords.pop("card", "")
    options = CompileOptions.parse(keywords)
    model: Any = out / "config.json"
    base = name.split("+")[0]
    if base in zoo.ZOO:
        model.write_text(json.dumps(zoo.config_of(base, "bfloat16")))
    else:
        model = families.build(name)
    planned = plan_model(open_without_weights(model, options), options, card=card)
    program, sources = planned.program, planned.emitted.sources
    titles = {s.symbol: re.sub(r"_[0-9a-f]{8,10}$", "", s.symbol) for s in sources}
    kind = "py" if card else "cpp"
    texts = {f"{i:02d}_{titles[s.symbol]}.{kind}": s.text for i, s in enumerate(sources)}
    if card:
        calls = [f"{f.name}: {_call(item)}" for f in program.functions for item in f.items]
        texts["launches.txt"] = "\n".join([*calls, ""])
    else:
        texts["step.cpp"] = emit_step(program, tuple(sources))
    rows = [f"{b.name} {b.bytes} {b.offset}" for b in program.plan.buffers]
    texts["plan.txt"] = "\n".join([*rows, ""])
    for symbol, title in titles.items():
        texts = {file: text.replace(symbol, title) for file, text in texts.items()}
    return texts


def _call(item: Any) -> str:
    """Return a launch, or the call of a region, as a line."""
    if not hasattr(item, "operands"):
        return f"{item.region} x {item.count}, phase {item.phase}"
    operands = [f"{r.space} {r.index}" + f" + {r.shift}" * bool(r.shift) for r in item.operands]
    return f"{item.label}, phase {item.phase}: {', '.join(operands)}"


def differences(old: Path, new: Path) -> list[str]:
    """Return the unified diff of two folders of sources, over the models that both have.

    A change that several models have is given once, as that of the first of them.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    places: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for model in sorted({p.name for p in old.iterdir()} & {p.name for p in new.iterdir()}):
        files = {p.name for folder in (old, new) for p in (folder / model).iterdir()}
        for file in sorted(files):
            texts = [f / model / file for f in (old, new)]
            before, after = (t.read_text().splitlines() if t.exists() else [] for t in texts)
            a, b = f"a/{model}/{file}", f"b/{model}/{file}"
            lines = list(difflib.unified_diff(before, after, a, b, lineterm="", n=1))
            changed = tuple(line for line in lines[2:] if line[0] in "+-")
            if changed:
                found.setdefault(changed, lines)
                places[changed].append(f"{model}/{file}")
    return [line for key, lines in found.items() for line in [*_same(places[key]), *lines]]


def _same(places: list[str]) -> list[str]:
    """Return a line that names the files with the same change, if there are more than one."""
    if len(places) == 1:
        return []
    more = len(places) - NAMED
    named = ", ".join(places[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return [f"the same in {len(places)} files: {named}"]


def summary(old: Path, new: Path) -> str:
    """Return a line: models and files that were compared, how many files differ."""
    both = sorted({p.name for p in old.iterdir()} & {p.name for p in new.iterdir()})
    files = {f"{m}/{p.name}" for m in both for folder in (old, new) for p in (folder / m).iterdir()}
    pairs = [(old / f, new / f) for f in files]
    gone = sum(not b.exists() for _, b in pairs)
    added = sum(not a.exists() for a, _ in pairs)
    shared = [(a, b) for a, b in pairs if a.exists() and b.exists()]
    changed = sum(a.read_bytes() != b.read_bytes() for a, b in shared)
    return (
        f"{len(both)} models, {len(files)} files: {changed} changed, {added} new, {gone} gone, "
        f"{len(shared) - changed} the same"
    )


def _written(trees: dict[Path, Path], models: str) -> None:
    """Let each tree write its own sources, side by side: functions move between commits."""
    running = []
    for root, folder in trees.items():
        command = [sys.executable, str(root / "tests" / "replay.py"), "--write", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        arguments = ["--models", models] if models else []
        running.append(subprocess.Popen([*command, *arguments], cwd=root, env=environment))
    failed = [process.args for process in running if process.wait()]
    if failed:
        sys.exit(f"failed: {failed[0]}")


def main() -> int:
    """Compare the two trees; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare generated sources with another commit's.")
    parser.add_argument("--against", default="HEAD", help="the other commit")
    parser.add_argument("--models", default="", help="names of models, or: every")
    parser.add_argument("--write", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.write:
        write_sources(Path(chosen.write), [m for m in chosen.models.split(",") if m])
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        tree, old, new = (Path(temporary) / name for name in ("tree", "old", "new"))
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), chosen.against], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            if not (tree / "tests" / "replay.py").exists():
                print(f"{chosen.against} is too old: it has no tests/replay.py")
                return 2
            old.mkdir()
            new.mkdir()
            _written({tree: old, ROOT: new}, chosen.models)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        if not {p.name for p in old.iterdir()} & {p.name for p in new.iterdir()}:
            print(f"no model that both this tree and {chosen.against} know")
            return 2
        lines, told = differences(old, new), summary(old, new)
    print("\n".join(lines[:LONGEST]) or f"no difference from {chosen.against}")
    if len(lines) > LONGEST:
        print(f"... {len(lines) - LONGEST} lines more")
    print(told)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
