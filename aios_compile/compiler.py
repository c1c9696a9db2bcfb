"""The compiler as one function: a model source in, a filled artefact folder out.

capture -> passes (raise, rewrite, fuse) -> emit -> plan -> step -> build and pack, side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from aios_compile import env
from aios_compile.capture.compare import compare_with_eager
from aios_compile.capture.regions import layer_lists
from aios_compile.codegen import artefact, overrides
from aios_compile.codegen.artefact import ArtefactWriter
from aios_compile.codegen.cpp import build
from aios_compile.codegen.cpp.step import emit_step
from aios_compile.codegen.emit_kernels import Emitted
from aios_compile.codegen.pack_weights import CheckpointTensors, pack_weights
from aios_compile.codegen.program import Program
from aios_compile.codegen.quantized_weights import QuantizedWeight, kv_remarks, remarks
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.targets import SUFFIXES, emit, lower_for
from aios_compile.compile_settings import (
    capture_for,
    gpu_card,
    limits_of,
    page_table_width,
    pass_options,
    settings_of,
    within,
)
from aios_compile.config import CompileOptions, ResolvedSizes
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.quantization_error import Measured, measure
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.ir.refresh import refresh
from aios_compile.ir.stored_weights import bind_stored_weights
from aios_compile.kernel_tuning import tuning_for
from aios_compile.model_source import ModelSource
from aios_compile.passes.certificate import CertificateCache
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.plan_memory import plan_memory
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import run_pipeline
from aios_compile.progress import Progress
from aios_compile.runtime.launch_list import launch_list, launch_text
from aios_compile.study import debug
from aios_compile.study.dump import Dumper
from aios_compile.study.kernel_table import KERNEL_TABLE, KernelRow, kernel_rows
from aios_compile.study.verify_override import apply_overrides


@dataclass(frozen=True)
class Compiled:
    """What stays in memory after compiling: level 3 (for AIOS_EAGER and checks) and the program."""

    module: IRModule
    program: Program


def compile_model(
    source: ModelSource,
    options: CompileOptions,
    writer: ArtefactWriter,
    progress: Progress,
    cache_root: Path,
) -> Compiled:
    """Compile `source` into the writer's folder. Raises AiosError; the folder is then of no use."""
    dumper = Dumper(writer.folder / "levels")
    with progress.stage("capture"):
        sizes, model = options.resolve_sizes(source.max_model_len), source.build()
        module = capture_for(model, source, sizes)
        sizes = within(module, sizes, options)
        dumper.level("captured", module)
        weights = RandomWeights.of(module, options.seed)
        if env.VERIFY.get_int(0, 2):
            compare_with_eager(model, module, seed=options.seed)
        bind_stored_weights(module, source.stored_forms(), source.stored_orders())
    with progress.stage("measure"):
        measured = measure_weights(module, source, options)
    with progress.stage("passes"):
        results = run_pipeline(
            module,
            STAGES,
            pass_options(options, sizes, model, measured),
            disabled=options.disable_passes,
            verify=env.VERIFY.get_int(0, 2),
            seed=options.seed,
            dump=dumper,
            progress=progress,
            certificates=CertificateCache(cache_root / "certificates"),
        )
    debug.show_passes(results)
    debug.show_level(dumper.folder)
    with progress.stage("generate"):
        refresh(module)
        card = gpu_card(options.device)
        emitted, chosen = _emit(module, options, card, cache_root, progress)
        edits = _apply_edits(module, emitted, weights, sizes, cache_root, progress)
        if module.not_generatable:  # one whole sequence a step, all of its logits
            sizes = replace(sizes, max_num_seqs=1)
        settings = settings_of(source, module, sizes, card, options.joined_launches())
        program = lower_for(module, emitted, limits_of(module, sizes), settings, plan_memory)
        step = emit_step(program, tuple(emitted.sources)) if not card else launch_text(program)
    debug.show_kernels(emitted.sources, step)
    quantized: list[QuantizedWeight] = []
    if env.EAGER.get_int(0, 1):  # PyTorch runs level 3: nothing to build, weights as they are
        writer.write_bytes(artefact.LIBRARY, b"")
    elif card:
        writer.write_bytes(artefact.LIBRARY, b"")
        kernels = partial(_compile_triton, launched_sources(program, emitted), card, options)
        quantized = _pack_beside(kernels, program, module, source, writer, progress)
    else:
        library = writer.folder / artefact.LIBRARY
        kernels = partial(_compile_cpp, emitted.sources, step, library, cache_root, progress)
        quantized = _pack_beside(kernels, program, module, source, writer, progress)
    notes = [*edits, *chosen, *([] if measured is None else measured.remarks())]
    notes += [*remarks(program, quantized), *kv_remarks(program), *source.notes]
    notes += source.expanded()
    notes += unshared_layers(model, module)
    _write_texts(writer, program, emitted.sources, step)
    _write_tables(writer, results, notes, quantized, kernel_rows(module, emitted, program))
    _write_tokenizer(writer, source)
    writer.finish()
    return Compiled(module, program)


def unshared_layers(model: torch.nn.Module, module: IRModule) -> list[str]:
    """Say that layers of one class could not become calls of one region."""
    lists = [] if module.regions() else list(layer_lists(model))
    return [
        f"every layer of {path} is compiled by itself: its layers alias tensors" for path in lists
    ]


def measure_weights(
    module: IRModule, source: ModelSource, options: CompileOptions
) -> Measured | None:
    """Return what quantising each weight would lose; None when nothing is to be quantised."""
    if options.quantization is None:
        return None
    tensors = CheckpointTensors(module, source.read)
    names = dict[str, None]()
    for holder in placeholders(module.root.graph):
        recipe = module.weights.get(holder.name)
        looked_up = all(u.target is torch.ops.aten.embedding.default for u in holder.users)
        wanted = holder.users and (options.quantize_embeddings or not looked_up)
        if wanted and recipe is not None and recipe.is_identity():
            names.update(dict.fromkeys(recipe.names))
    return measure(((name, tensors[name]) for name in names), options.quantization_format())


def _emit(
    module: IRModule, options: CompileOptions, card: str, cache_root: Path, progress: Progress
) -> tuple[Emitted, list[str]]:
    """Return the kernels, and lines about what is known of the GPU that they are for."""
    notes: list[str] = []
    tuning, joined = tuning_for(options, card, cache_root, notes), options.joined_launches()
    return emit(module, options.device, progress.update, card, joined, tuning), notes


def _apply_edits(
    module: IRModule,
    emitted: Emitted,
    weights: RandomWeights,
    sizes: ResolvedSizes,
    cache_root: Path,
    progress: Progress,
) -> list[str]:
    """Use the edited kernels that are right; return a line for each edit."""
    edits, width = overrides.texts(cache_root), page_table_width(sizes)
    objects = cache_root / "objects"
    lines = [str(v) for v in apply_overrides(module, emitted, edits, weights, width, objects)]
    for line in lines:
        progress.note(line)
    return lines


def launched_sources(program: Program, emitted: Emitted) -> list[KernelSource]:
    """Return the modules that a step launches: not those that are phases of another."""
    return [emitted.sources[i] for i in sorted({call.kernel for call in launch_list(program)})]


def _pack_beside(
    compile_kernels: Callable[[], list[tuple[str, bytes]]],
    program: Program,
    module: IRModule,
    source: ModelSource,
    writer: ArtefactWriter,
    progress: Progress,
) -> list[QuantizedWeight]:
    """Pack the weights while the kernels are compiled; return what was quantised.

    The compilers run in processes of their own, so one thread that waits for them is enough.
    """
    with ThreadPoolExecutor(1) as pool:
        binaries = pool.submit(compile_kernels)
        with progress.stage("pack"):
            quantized = pack_weights(program, module, source.read, writer)
        with progress.stage("build"):
            for name, data in binaries.result():
                writer.write_bytes(name, data)
    return quantized


def _compile_triton(
    sources: list[KernelSource], card: str, options: CompileOptions
) -> list[tuple[str, bytes]]:
    """Compile every variant of every kernel for a card; return the files that the artefact keeps.

    The interpreter has nothing to compile.
    """
    if options.device == "interpreter":
        return []
    from aios_compile.codegen.triton import binary_cache, compile_ahead

    with tempfile.TemporaryDirectory(prefix="aios-triton-") as folder:
        compile_ahead.compile_ahead(sources, card, Path(folder), options.threads())
        return list(binary_cache.keep(Path(folder) / compile_ahead.CACHE))


def _compile_cpp(
    sources: list[KernelSource], step: str, library: Path, cache_root: Path, progress: Progress
) -> list[tuple[str, bytes]]:
    """Compile kernels and step, and link them straight into `library`: no file is left to write."""
    texts: list[build.Source] = [*sources, ("step", step)]
    objects = build.build_objects(
        texts,
        cache_root / "objects",
        build.Target.host(),
        on_progress=lambda i, n, _: progress.update(i, n),
    )
    build.link(objects, library)
    return []


def _write_texts(
    writer: ArtefactWriter, program: Program, sources: list[KernelSource], step: str
) -> None:
    """Write the generated sources, the program and the memory plan."""
    for kernel in sources:
        suffix = SUFFIXES[kernel.language]
        writer.write_text(f"{artefact.KERNELS}/{kernel.name}{suffix}", kernel.text)
    data = program.to_json()
    triton = program.settings.get("family") == "triton"
    writer.write_text(artefact.LAUNCHES if triton else artefact.STEP, step)
    writer.write_json(artefact.PROGRAM, data)
    writer.write_json(artefact.PLAN, data["plan"])


def _write_tables(
    writer: ArtefactWriter,
    results: list[PassResult],
    notes: list[str],
    quantized: list[QuantizedWeight],
    kernels: list[KernelRow],
) -> None:
    """Write what `aios report` and `aios kernels` show."""
    rows = [r.to_json() for r in results]
    writer.write_json(artefact.CERTIFICATES, rows)
    writer.write_json(artefact.REPORT, {"passes": rows, "notes": notes})
    if quantized:
        writer.write_json(artefact.QUANTIZATION, [asdict(w) for w in quantized])
    writer.write_json(KERNEL_TABLE, [row.as_dict() for row in kernels])


def _write_tokenizer(writer: ArtefactWriter, source: ModelSource) -> None:
    if source.tokenizer is not None:
        folder = writer.folder / artefact.TOKENIZER
        folder.mkdir(mode=0o700)
        source.tokenizer.save(folder)
