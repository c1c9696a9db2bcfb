"""Real models through their lives: two at once, threads, fork, Ctrl-C, close, modules in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import aios_compile
from aios_compile.errors import EngineClosedError
from tests import zoo
from tests.compiled.conftest import SMALL_STEPS, Load

ROOT = Path(__file__).parents[2]
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
LOAD = f"""
import json, os, sys, time
import aios_compile
from aios_compile.errors import EngineClosedError
model = aios_compile.load_and_compile(sys.argv[1], **{SMALL_STEPS!r}, num_threads=2, progress=False)
ids = json.loads(sys.argv[2])
def greedy():
    done = model.generate([ids], max_tokens=12, temperature=0, ignore_eos=True)[0]
    return done.outputs[0].token_ids
"""
FORK = (
    LOAD
    + """
first = greedy()
child = os.fork()
if child == 0:
    try:
        greedy()
    except EngineClosedError as error:
        assert "fork" in str(error)
        model.close()  # frees nothing of the parent's, and does not hang
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert greedy() == first
model.close()
print(json.dumps(first))
"""
)
INTERRUPT = (
    LOAD
    + """
first = greedy()
print("ready", flush=True)
try:
    model.generate([[1, 2, 3]] * 4000, max_tokens=200, temperature=0, ignore_eos=True)
    print("not interrupted")
except KeyboardInterrupt:
    assert greedy() == first
    pool = model.engine._core.state.pool
    deadline = time.time() + 5
    while pool.num_free < pool.num_pages - 1 and time.time() < deadline:
        time.sleep(0.01)
    assert pool.num_free == pool.num_pages - 1
    model.close()
    print(json.dumps(first))
"""
)
UNCAUGHT = (
    LOAD
    + """
print("ready", flush=True)
model.generate([[1, 2, 3]] * 4000, max_tokens=200, temperature=0, ignore_eos=True)
"""
)


@pytest.fixture
def prepared(load: Load, zoo_folder: Path) -> tuple[str, list[int], list[int]]:
    """Compile a model for child processes; return its folder, a prompt and its greedy tokens."""
    path = zoo.make("qwen3_gqa", zoo_folder)
    ids = zoo.token_ids(path)[:20]
    return str(path), ids, load("qwen3_gqa").generate([ids], **GREEDY)[0].outputs[0].token_ids


def start(script: str, path: str, ids: list[int]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, path, json.dumps(ids)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a test run in a shell's background ignores Ctrl-C, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str, float]:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    return out, err, time.monotonic() - sent


def test_a_forked_child_is_told(prepared: tuple[str, list[int], list[int]]) -> None:
    path, ids, expected = prepared
    out, err = start(FORK, path, ids).communicate(timeout=30)
    assert out and json.loads(out) == expected, err


def test_an_interrupted_model_works_on(prepared: tuple[str, list[int], list[int]]) -> None:
    path, ids, expected = prepared
    out, err, _ = interrupt(start(INTERRUPT, path, ids))
    assert out and json.loads(out) == expected, err


def test_ctrl_c_ends_the_process_at_once(prepared: tuple[str, list[int], list[int]]) -> None:
    path, ids, _ = prepared
    process = start(UNCAUGHT, path, ids)
    _, err, seconds = interrupt(process)
    assert "KeyboardInterrupt" in err and process.returncode != 0
    assert seconds < 5


def test_two_models_at_once_and_several_threads(load: Load) -> None:
    models = [load("qwen3_gqa", num_threads=2), load("llama_gqa", num_threads=2)]
    prompts = [[i, i + 1, 50 - i] for i in range(4)]
    expected = [[m.generate([p], **GREEDY)[0].outputs[0].token_ids for p in prompts]
                for m in models]  # fmt: skip
    assert expected[0] != expected[1]
    found: dict[tuple[int, int], list[int]] = {}

    def work(which: int, prompt: int) -> None:
        for _ in range(3):
            stream = models[which].stream(prompts[prompt], **GREEDY)
            found[which, prompt] = [t for chunk in stream for t in chunk.token_ids]

    threads = [threading.Thread(target=work, args=(i, j)) for i in range(2) for j in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {(i, j): expected[i][j] for i in range(2) for j in range(4)}


def held() -> tuple[int, int, int]:
    """Return this process's mappings, threads and open files."""
    self = Path("/proc/self")
    maps = len(self.joinpath("maps").read_text().splitlines())
    return maps, len(os.listdir(self / "task")), len(os.listdir(self / "fd"))


def test_close_frees_everything(load: Load) -> None:
    with load("qwen3_gqa") as model:
        path = Path(model.program.settings["name"])

    def cycle() -> str:
        model = aios_compile.load_and_compile(path, **SMALL_STEPS, num_threads=3, progress=False)
        model.generate([[1, 2, 3]], **GREEDY)
        assert str(model.artefact_path) in Path("/proc/self/maps").read_text()
        model.close()
        model.close()
        for call in (lambda: model.generate([[1]]), lambda: model([1, 2])):
            with pytest.raises(EngineClosedError, match="load the model again"):
                call()
        return str(model.artefact_path)

    alive = load("llama_gqa")  # another model is not touched
    cycle()
    before = held()
    for _ in range(10):
        artefact = cycle()
    deadline = time.monotonic() + 5
    while held()[1] > before[1] and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread says that it is done just before it ends
    maps, threads, files = held()
    assert threads <= before[1] and files <= before[2]
    assert maps <= before[0] + 3  # the allocator's own
    assert artefact not in Path("/proc/self/maps").read_text()
    assert len(alive.generate([[1, 2]], **GREEDY)[0].outputs[0].token_ids) == 12


def test_a_module_in_memory(zoo_folder: Path, load: Load) -> None:
    path = zoo.make("llama_tied", zoo_folder)
    module, ids = zoo.decoder(path), zoo.token_ids(path)
    with torch.no_grad():
        expected = module(torch.tensor(ids), torch.arange(len(ids)))
    with aios_compile.load_and_compile(
        module, **SMALL_STEPS, num_threads=1, progress=False, max_model_len=128
    ) as model:
        assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
        folder = model.artefact_path
        tokens = model.generate([ids[:8]], **GREEDY)[0].outputs[0].token_ids
    assert not folder.exists()
    from_folder = load("llama_tied")
    assert from_folder.generate([ids[:8]], **GREEDY)[0].outputs[0].token_ids == tokens
