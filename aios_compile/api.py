"""The main path: a model in, a running engine out. Read this first.

open the source -> look in the cache -> (capture -> passes -> code -> build -> pack) -> start
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_compile import env
from aios_compile.codegen import overrides
from aios_compile.codegen.artefact import ArtefactWriter, verify_weights
from aios_compile.codegen.cache import ArtefactCache, default_root
from aios_compile.codegen.cache_key import CacheKey, compute_key, hash_files
from aios_compile.codegen.manifest import write_manifest
from aios_compile.config import CompileOptions
from aios_compile.errors import CacheError
from aios_compile.model_source import ModelSource, open_source
from aios_compile.progress import Progress
from aios_compile.runtime.torch_device import card_name, gpu_name, require_cuda

if TYPE_CHECKING:
    from aios_compile.compiled_model import CompiledModel, MakeExecutor


def load_and_compile(model: Any, **keywords: Any) -> CompiledModel:
    """Return a running model from a folder, a hub id or an nn.Module.

    keywords: the fields of config.CompileOptions (device, dtype, max_model_len, max_num_seqs,
    max_num_batched_tokens, kv_cache_memory_bytes, disable_passes, ...). An artefact that was
    compiled before is mapped without importing torch. Raises AiosError: what, where, what to do.
    """
    options = CompileOptions.parse(keywords)
    if options.device.startswith("cuda"):
        require_cuda(options.device)  # before anything is captured or compiled
    progress = Progress(show=options.progress)
    with progress.stage("load"):
        source = open_source(model, options)
        root = default_root(options.cache_dir)
        cache = ArtefactCache(root)

    def build(staging: Path) -> Any:
        return compile_into(staging, source, options, progress, root)

    eager: MakeExecutor | None = None
    if env.EAGER.get_int(0, 1):
        path, release, eager = _eager_artefact(cache, source, build)
    elif not source.files:  # a module in memory has no files to be keyed by: used once
        path, release = _private_artefact(cache, build)
    else:
        path, release = _cached_artefact(cache, source, options, progress, build)
    draft = _load_draft(options)
    loaded = _start(path, options, progress, release, eager, draft)
    try:
        with progress.stage("warm up"):
            loaded.warm_up()
        if env.VERIFY.get_int(0, 2) == 2:
            _verify(loaded, source, progress)
    except BaseException:
        loaded.close()
        raise
    if env.DUMP.get():
        loaded.dump(env.DUMP.get())
    progress.finish()
    return loaded


def _load_draft(options: CompileOptions) -> CompiledModel | None:
    """Return the model that drafts tokens, if one was asked for; with the target's step sizes."""
    config = options.speculation
    if config is None or config.model is None:
        return None
    names = ["device", "max_num_seqs", "max_num_batched_tokens", "num_threads", "cache_dir"]
    names += ["local_files_only", "progress"]
    return load_and_compile(config.model, **{name: getattr(options, name) for name in names})


def compile_into(
    staging: Path, source: ModelSource, options: CompileOptions, progress: Progress, root: Path
) -> Any:
    """Fill an artefact folder, return compiler.Compiled; torch is imported here, not before."""
    from aios_compile.codegen.cpp import build

    with progress.stage("load"):
        _ = source.tokenizer  # a damaged one is told before anything is compiled
    with ThreadPoolExecutor(1) as aside:
        if options.device in ("auto", "cpu") and not env.EAGER.get_int(0, 1):
            # One core waits for the other until kernels are built; an error comes again there.
            aside.submit(build.prepare, root / "objects", build.Target.host())
        with progress.stage("import torch"):
            from aios_compile.compiler import compile_model
            from aios_compile.kernel_selection import choose_kernels

    writer = ArtefactWriter(staging)
    try:
        compiled = compile_model(source, options, writer, progress, root)
        choose_kernels(staging, options, progress)
        return compiled
    except BaseException:
        if env.DUMP.get():  # what was reached is what one wants to see when a pass fails
            shutil.copytree(staging, env.DUMP.get(), dirs_exist_ok=True)
        raise
    finally:
        writer.close()


def _cached_artefact(
    cache: ArtefactCache,
    source: ModelSource,
    options: CompileOptions,
    progress: Progress,
    build: Callable[[Path], None],
) -> tuple[Path, Callable[[], None]]:
    with progress.stage("cache"):
        memo = cache.memo()
        files, edits = hash_files(source.files, memo), overrides.digests(cache.root.parent)
        name = options.device
        card = f"{card_name(name)} {gpu_name(name)}" if name.startswith("cuda") else ""
        key: CacheKey = compute_key(source.name, files, options, memo, edits, card)
    path, miss = cache.obtain(
        key,
        build,
        on_wait=lambda: progress.note("another process compiles this model: waiting"),
        on_miss=lambda found: progress.note(f"cache miss: {found.reason}"),
    )
    if miss is None:
        progress.note("cache hit")
    try:
        verify_weights(path, options.threads())
    except CacheError as error:  # found on the second look only: the lookup hashes all but these
        progress.note(f"{error.message}: compiling again")
        cache.discard(key)
        path, _ = cache.obtain(key, build)
    return path, cache.close


def _private_artefact(
    cache: ArtefactCache, build: Callable[[Path], Any]
) -> tuple[Path, Callable[[], None]]:
    folder = cache.scratch()  # goes with the cache object; a later process collects a dead one's
    build(folder)
    write_manifest(folder, "module", {"source": "nn.Module"})
    return folder, cache.close


def _eager_artefact(
    cache: ArtefactCache, source: ModelSource, build: Callable[[Path], Any]
) -> tuple[Path, Callable[[], None], MakeExecutor]:
    """Compile up to the last level; the executor runs it in PyTorch. Never from the cache."""
    found: list[Any] = []
    path, release = _private_artefact(cache, lambda folder: found.append(build(folder)))
    from aios_compile.study.eager_executor import EagerExecutor

    return path, release, lambda limits: EagerExecutor(found[0].module, source.read, limits)


def _verify(model: CompiledModel, source: ModelSource, progress: Progress) -> None:
    with progress.stage("verify"):
        from aios_compile.study.verify_logits import verify_logits

        progress.note(verify_logits(model, source))


def _start(
    path: Path,
    options: CompileOptions,
    progress: Progress,
    release: Callable[[], None],
    eager: MakeExecutor | None,
    draft: CompiledModel | None,
) -> CompiledModel:
    try:
        with progress.stage("load"):
            from aios_compile.compiled_model import CompiledModel

        model = CompiledModel(path, options, progress, eager, draft)
    except BaseException:
        release()
        if draft is not None:
            draft.close()
        raise
    model.on_close(release)
    if draft is not None:
        model.on_close(draft.close)
    return model
