"""A cached start and generation where torch and transformers cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from aios_compile.codegen.cache import ArtefactCache, default_root
from tests import zoo
from tests.compiled.conftest import Load

ROOT = Path(__file__).parents[2]
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "triton", "networkx"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import json
import aios_compile
"""
GENERATE = (
    BLOCK
    + """
path, ids = sys.argv[1], json.loads(sys.argv[2])
model = aios_compile.load_and_compile(
    path, max_num_batched_tokens=21, max_num_seqs=8, num_threads=1, progress=False)
assert "cache hit" in model.progress.notes, model.progress.notes
result = model.generate([ids], max_tokens=12, temperature=0, ignore_eos=True)[0]
streamed = [t for c in model.stream(ids, max_tokens=12, temperature=0, ignore_eos=True)
            for t in c.token_ids]
print(json.dumps([result.outputs[0].token_ids, streamed, str(model.report())]))
model.close()
assert not {"torch", "transformers"} & set(sys.modules)
"""
)


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_no_torch() -> None:
    run(BLOCK + "assert aios_compile.SamplingParams(max_tokens=3).max_tokens == 3")


def test_cached_start_and_generation_need_no_torch(load: Load, zoo_folder: Path) -> None:
    model = load("qwen3_gqa")
    path = zoo.make("qwen3_gqa", zoo_folder)
    entries = ArtefactCache(default_root()).entries()
    assert model.artefact_path in [entry.path for entry in entries]
    ids = zoo.token_ids(path)[:20]
    expected = model.generate([ids], max_tokens=12, temperature=0, ignore_eos=True)[0]
    tokens, streamed, report = json.loads(run(GENERATE, str(path), json.dumps(ids)))
    assert tokens == streamed == expected.outputs[0].token_ids
    assert report == str(model.report())


def test_the_first_start_says_why_and_the_second_that_it_hit(load: Load, tmp_path: Path) -> None:
    path = zoo.make("qwen3_gqa", tmp_path, seed=1)  # the cache knows files by their content
    first = load(path)
    assert any("cache miss" in note for note in first.progress.notes)
    assert "capture" in first.progress.seconds
    second = load(path)
    assert "cache hit" in second.progress.notes and "capture" not in second.progress.seconds
    assert second.artefact_path == first.artefact_path
    ids = zoo.token_ids(path)
    assert bool((first(ids) == second(ids)).all())
