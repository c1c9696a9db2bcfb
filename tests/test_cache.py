"""The artefact cache: found, missed with a reason, shared, limited, private, never half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aios_compile.codegen import cache_key, private_folder
from aios_compile.codegen.artefact import ArtefactWriter, verify_weights
from aios_compile.codegen.cache import STORE, ArtefactCache, Miss, default_root
from aios_compile.codegen.cache_key import CacheKey, HashMemo, compute_key, hash_files, model_files
from aios_compile.config import CompileOptions
from aios_compile.errors import CacheError, ConfigError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtefactCache]:
    """A cache of its own; the compiler's code stands still, whoever edits it meanwhile."""
    monkeypatch.setattr(cache_key, "compiler_digest", lambda: "one")
    cache = ArtefactCache(tmp_path / "cache")
    yield cache
    cache.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("not part of the key")
    return folder


def key_of(cache: ArtefactCache, model: Path, **options: object) -> CacheKey:
    memo = cache.memo()
    hashes = hash_files(model_files(model), memo)
    return compute_key(str(model), hashes, CompileOptions.parse(options), memo)


def build(staging: Path, size: int = 100) -> None:
    writer = ArtefactWriter(staging)
    writer.add_tensor("w", np.full(size, 7, np.uint8))
    writer.write_json("program.json", {})
    writer.write_bytes("lib.so", b"\x7fELF")
    writer.finish()


def staged(cache: ArtefactCache) -> list[str]:
    return os.listdir(cache.root / "staging")


def test_a_published_artefact_is_found_and_read_only(cache: ArtefactCache, model: Path) -> None:
    key = key_of(cache, model)
    assert cache.lookup(key) == Miss("never compiled")
    told: list[Miss] = []
    path, miss = cache.obtain(key, build, on_miss=told.append)
    assert told == [miss] == [Miss("never compiled")] and cache.lookup(key) == path
    assert all(p.stat().st_mode & 0o777 == 0o400 for p in path.rglob("*") if p.is_file())
    assert cache.root.stat().st_mode & 0o777 == 0o700
    verify_weights(path)
    assert not staged(cache)


def test_a_miss_names_what_changed(
    cache: ArtefactCache, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.obtain(key_of(cache, model), build)

    def reason(**options: object) -> str:
        found = cache.lookup(key_of(cache, model, **options))
        assert isinstance(found, Miss)
        return found.reason

    assert reason(dtype="float32") == "options changed: dtype (auto -> float32)"
    monkeypatch.setenv("AIOS_BISECT", "3")
    assert reason() == "environment changed: AIOS_BISECT ( -> 3)"
    monkeypatch.delenv("AIOS_BISECT")
    with monkeypatch.context() as patch:
        patch.setattr(cache_key, "compiler_digest", lambda: "other")
        assert reason() == "compiler code changed"
    with monkeypatch.context() as patch:
        patch.setattr(cache_key, "installed_version", lambda name: "0.0")
        assert reason().startswith("versions changed: numpy (")
    with monkeypatch.context() as patch:
        patch.setattr(cache_key, "compiler_version", lambda: "tcc")
        assert "machine changed: c++ (" in reason()
    (model / "config.json").write_text('{"hidden_size": 16}')
    assert reason() == "model files changed: config.json"


def test_the_nearest_entry_explains_the_miss(cache: ArtefactCache, model: Path) -> None:
    cache.obtain(key_of(cache, model, max_num_seqs=2, dtype="float32"), build)
    cache.obtain(key_of(cache, model, dtype="float32"), build)
    found = cache.lookup(key_of(cache, model, dtype="float32", max_model_len=64))
    assert found == Miss("options changed: max_model_len (None -> 64)")


def test_files_that_are_not_compiled_do_not_count(cache: ArtefactCache, model: Path) -> None:
    before = key_of(cache, model)
    (model / "README.md").write_text("other")
    assert key_of(cache, model).digest == before.digest
    assert key_of(cache, model, progress=False, seed=5).digest == before.digest


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, store = tmp_path / "f", tmp_path / "memo.json"
    file.write_bytes(b"one")
    memo = HashMemo(store)
    first = memo.sha256(file)
    memo.save()
    assert not store.exists(), "a file that may still change within a clock tick is not remembered"
    known = [*cache_key._stamp(file), "remembered"]
    store.write_text(json.dumps({str(file): known}))
    assert HashMemo(store).sha256(file) == "remembered"
    file.write_bytes(b"two")
    assert HashMemo(store).sha256(file) not in (first, "remembered")
    store.write_text("damaged")
    assert HashMemo(store).sha256(file) != first


def test_a_damaged_entry_is_removed_and_is_the_reason(cache: ArtefactCache, model: Path) -> None:
    key = key_of(cache, model)
    path, _ = cache.obtain(key, build)
    library = path / "lib.so"
    library.chmod(0o600)
    library.write_bytes(b"\x7fELG")
    found = cache.lookup(key)
    assert isinstance(found, Miss) and found.damaged and "lib.so: differs" in found.reason
    assert not path.exists()
    path, _ = cache.obtain(key, build)
    cache.discard(key)
    assert not path.exists() and not staged(cache)


def test_the_least_recently_used_go_first_and_never_one_in_use(
    cache: ArtefactCache, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key_of(cache, model, max_num_seqs=n) for n in (1, 2, 3, 4)]
    for age, key in zip((40, 30, 20, 10), keys):
        cache.obtain(key, lambda staging: build(staging, 100_000))
        lock = cache.root / "locks" / f"{key.digest}.use"
        os.utime(lock, (time.time() - age, time.time() - age))
    monkeypatch.setenv("AIOS_CACHE_LIMIT_BYTES", "250000")
    assert not cache.enforce_limit(), "all are in use"
    for key in keys[1:]:
        cache.release(key)
    assert [entry.key for entry in cache.enforce_limit()] == [keys[1].digest, keys[2].digest]
    left = cache.entries()
    assert [(e.key, e.in_use) for e in left] == [(keys[3].digest, False), (keys[0].digest, True)]
    gone, kept = cache.remove()
    assert [e.key for e in gone] == [keys[3].digest] and [e.key for e in kept] == [keys[0].digest]


def test_publishing_enforces_the_limit(
    cache: ArtefactCache, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOS_CACHE_LIMIT_BYTES", "1000")
    first, second = (key_of(cache, model, max_num_seqs=n) for n in (1, 2))
    cache.obtain(first, lambda staging: build(staging, 2000))
    cache.release(first)
    path, _ = cache.obtain(second, lambda staging: build(staging, 2000))
    assert [entry.path for entry in cache.entries()] == [path]


@pytest.mark.parametrize("where", ["write", "sync", "rename"])
def test_a_full_disk_leaves_nothing(
    cache: ArtefactCache, model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    key = key_of(cache, model)
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(Path, "write_bytes", full)
        elif where == "sync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(os, "rename", full)
        with pytest.raises(CacheError, match="no space left") as caught:
            cache.obtain(key, build)
    assert "aios cache rm" in str(caught.value)
    assert cache.lookup(key) == Miss("never compiled") and not staged(cache)
    assert cache.obtain(key, build)[0].exists()


def test_a_build_that_fails_leaves_nothing(cache: ArtefactCache, model: Path) -> None:
    def fails(staging: Path) -> None:
        build(staging)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.obtain(key_of(cache, model), fails)
    assert not staged(cache) and not cache.entries()


def test_foreign_shared_linked_and_unusable_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(root: Path, match: str) -> None:
        with pytest.raises(CacheError, match=match) as caught:
            ArtefactCache(root)
        assert "AIOS_CACHE_DIR" in str(caught.value)

    shared = tmp_path / "shared"
    (shared / STORE).mkdir(parents=True)
    (shared / STORE).chmod(0o770)
    refused(shared, "can be written by others")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / STORE).symlink_to(tmp_path)
    refused(linked, "is a link or no folder")
    open_parent = tmp_path / "open"
    open_parent.mkdir()
    open_parent.chmod(0o777)
    refused(open_parent, "can be written by others")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "cannot use the cache")
    readable = tmp_path / "readable"
    (readable / STORE).mkdir(parents=True, mode=0o755)
    ArtefactCache(readable).close()
    assert (readable / STORE).stat().st_mode & 0o777 == 0o700, "closed to others"
    monkeypatch.setattr(private_folder.os, "access", lambda *a: False)
    refused(readable, "is read-only")
    monkeypatch.undo()
    monkeypatch.setattr(private_folder.os, "geteuid", lambda: 54321)
    refused(readable, "belongs to user")


def test_the_root_is_the_option_then_the_variable_then_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIOS_CACHE_DIR", "/v")
    assert default_root("/o") == Path("/o") and default_root() == Path("/v")
    monkeypatch.delenv("AIOS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "aios"


_CHILD = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from aios_compile.codegen.artefact import ArtefactWriter, Artefact
    from aios_compile.codegen.cache import ArtefactCache
    from aios_compile.codegen.cache_key import CacheKey

    root, log, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def build(staging):
        with open(log, "a") as file:
            file.write("built\\n")
        writer = ArtefactWriter(staging)
        for index in range(40):
            writer.add_tensor(f"w{index}", np.full(1000, os.getpid() % 251, np.uint8))
            if mode == "slow":
                time.sleep(0.01)
        writer.write_json("program.json", {"pid": os.getpid()})
        writer.write_bytes("lib.so", str(os.getpid()).encode())
        writer.finish()

    cache = ArtefactCache(root)
    path, miss = cache.obtain(CacheKey("m", {"model": {"a": "b"}}), build)
    artefact = Artefact.open(path)
    artefact.verify_weights(1)
    pid = artefact.program["pid"]
    assert artefact.library.read_text() == str(pid), "a mixed entry"
    assert all((artefact.tensor(f"w{i}") == pid % 251).all() for i in range(40)), "a mixed entry"
    print(pid)
"""


def _spawn(root: Path, log: Path, mode: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(_CHILD)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root), str(log), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_of_eight_processes_one_compiles_and_all_use_it(tmp_path: Path) -> None:
    """Two processes once mixed one's binary with the other's metadata (pytorch#92664)."""
    log = tmp_path / "log"
    children = [_spawn(tmp_path / "cache", log, "slow") for _ in range(8)]
    results = [child.communicate(timeout=60) for child in children]
    assert all(child.returncode == 0 for child in children), results
    assert len({out for out, _ in results}) == 1
    assert log.read_text() == "built\n"


def test_kill_9_at_any_moment_leaves_a_cache_that_works(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cache = ArtefactCache(tmp_path / "cache")
    key = CacheKey("m", {"model": {"a": "b"}})
    for round_number in range(12):
        child = _spawn(tmp_path / "cache", log, "slow")
        deadline = time.monotonic() + 20
        while not staged(cache) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.04 * round_number)
        child.kill()
        child.communicate()
        found = cache.lookup(key)
        if isinstance(found, Path):
            verify_weights(found)
            cache.release(key)
            cache.remove()
        else:
            assert not found.damaged, found.reason
    assert cache.obtain(key, build)[0].exists()
    assert not staged(cache), "what killed processes left was collected"
    cache.close()


def test_a_large_artefact_is_looked_up_in_no_time(cache: ArtefactCache, model: Path) -> None:
    """The weights (here 200 MB, sparse) are not read by lookup: well under 150 ms at any size."""
    key = key_of(cache, model)

    def large(staging: Path) -> None:
        build(staging)
        os.truncate(staging / "weights.bin", 200 << 20)

    cache.obtain(key, large)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert isinstance(cache.lookup(key), Path)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.1


def test_the_compiler_digest_covers_every_source_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "codegen").mkdir()
    (tmp_path / "codegen" / "a.py").write_text("1")
    (tmp_path / "b.h").write_text("2")
    monkeypatch.setattr(cache_key, "_PACKAGE", tmp_path)
    digests = {cache_key.compiler_digest()}
    for name, text in (("b.h", "3"), ("codegen/a.py", "4"), ("c.py", ""), ("b.md", "no source")):
        (tmp_path / name).write_text(text)
        digests.add(cache_key.compiler_digest())
    assert len(digests) == 4


def test_a_scratch_folder_goes_with_its_process(cache: ArtefactCache, model: Path) -> None:
    folder = cache.scratch()
    other = ArtefactCache(cache.root.parent)
    other.obtain(key_of(cache, model), build)
    assert folder.exists(), "another process collects what is stale, and this is not"
    other.close()
    cache.close()
    assert not folder.exists() and not list((cache.root / "locks").glob("scratch*"))
    stale = cache.root / "staging" / "scratch-0.0"
    stale.mkdir()
    cache.scratch()
    assert not stale.exists()


def test_a_bad_limit_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOS_CACHE_LIMIT_BYTES", "20GB")
    with pytest.raises(ConfigError, match="AIOS_CACHE_LIMIT_BYTES"):
        ArtefactCache(tmp_path / "c")
