"""The compiler as one function: a model source in, a filled artefact folder out.

capture -> passes (raise, rewrite, fuse) -> emit -> plan -> step -> build and pack, side by side.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aios_compile import env
from aios_compile.capture.capture import capture
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
from aios_compile.codegen.targets import SUFFIXES, emit, family, lower_for
from aios_compile.config import KV_CODES, CompileOptions, ResolvedSizes
from aios_compile.errors import ConfigError
from aios_compile.ir.attention_window import window_tokens
from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.quantization_error import Measured, measure
from aios_compile.ir.random_weights import RandomWeights
from aios_compile.ir.refresh import refresh
from aios_compile.ir.stored_weights import bind_stored_weights
from aios_compile.model_source import ModelSource
from aios_compile.passes.certificate import CertificateCache
from aios_compile.passes.context import PassOptions
from aios_compile.passes.pipeline import STAGES
from aios_compile.passes.plan_memory import plan_memory
from aios_compile.passes.runner import run_pipeline
from aios_compile.progress import Progress
from aios_compile.runtime.launch_list import launch_list, launch_text
from aios_compile.study import debug
from aios_compile.study.dump import Dumper
from aios_compile.study.kernel_table import KERNEL_TABLE, kernel_rows
from aios_compile.study.verify_override import apply_overrides

PAGE_SIZE = 16  # tokens; one AVX-512 vector of keys
MIN_PAGE_TABLE = 8  # entries; the batches that passes are proven on need 4 (ir/inputs.py: mixed)
MAX_LOGIT_ROWS = 32  # rows of [R, vocabulary] logits that are planned for at least


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
        module = capture(model, flat=source.flat, max_tokens=sizes.max_num_batched_tokens)
        sizes = within(module, sizes, options)
        dumper.level("captured", module)
        weights = RandomWeights.of(module, options.seed)
        if env.VERIFY.get_int(0, 2):
            compare_with_eager(model, module, seed=options.seed)
        bind_stored_weights(module, source.stored_forms())
    with progress.stage("measure"):
        measured = measure_weights(module, source, options)
    with progress.stage("passes"):
        results = run_pipeline(
            module,
            STAGES,
            pass_options(options, source, sizes, model, measured),
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
        emitted = _emit(module, options, card, cache_root, progress)
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
        sources = launched_sources(program, emitted)
        with ThreadPoolExecutor(1) as pool:  # Triton runs in processes: packing overlaps it
            binaries = pool.submit(_compile_triton, sources, card, options)
            with progress.stage("pack"):
                pack_weights(program, module, source.read, writer)
            with progress.stage("build"):
                for name, data in binaries.result():
                    writer.write_bytes(name, data)
    else:
        with ThreadPoolExecutor(1) as pool:  # the compiler runs in processes: packing overlaps it
            given = (emitted.sources, step, writer.folder, cache_root, progress)
            library = pool.submit(_build, *given)
            with progress.stage("pack"):
                quantized = pack_weights(program, module, source.read, writer)
            with progress.stage("build"):
                library.result()
    told = [] if measured is None else measured.remarks()
    told += [*remarks(program, quantized), *kv_remarks(program), *source.notes]
    notes = [*edits, *told, *unshared_layers(model, module)]
    _write_texts(writer, program, emitted.sources, step, results, notes)
    if quantized:
        writer.write_json(artefact.QUANTIZATION, [asdict(w) for w in quantized])
    rows = [row.as_dict() for row in kernel_rows(module, emitted, program)]
    writer.write_json(KERNEL_TABLE, rows)
    if source.tokenizer is not None:
        folder = writer.folder / artefact.TOKENIZER
        folder.mkdir(mode=0o700)
        source.tokenizer.save(folder)
    writer.finish()
    return Compiled(module, program)


def unshared_layers(model: torch.nn.Module, module: IRModule) -> list[str]:
    """Say that layers of one class could not become calls of one region."""
    lists = [] if module.regions() else list(layer_lists(model))
    return [
        f"every layer of {path} is compiled by itself: its layers alias tensors" for path in lists
    ]


def within(module: IRModule, sizes: ResolvedSizes, options: CompileOptions) -> ResolvedSizes:
    """Return the sizes of a step, no longer than the model's own limit.

    Raises ConfigError where an option asks for more.
    """
    if module.length_limit is None:
        return sizes
    limit, line = module.length_limit
    for name in ("max_model_len", "max_num_batched_tokens"):
        given = getattr(options, name)
        if given is not None and given > limit:
            raise ConfigError(
                f"{name}={given} is out of range: expected at most the {limit} tokens that the "
                "model's code takes",
                source_line=line,
            )
    tokens = min(sizes.max_num_batched_tokens, limit)
    return ResolvedSizes(min(sizes.max_model_len, limit), min(sizes.max_num_seqs, tokens), tokens)


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


def pass_options(
    options: CompileOptions,
    source: ModelSource,
    sizes: ResolvedSizes,
    model: torch.nn.Module,
    measured: Measured | None = None,
    cpu: build.Target | None = None,
) -> PassOptions:
    """Return what the passes need to know of a model and its options.

    measured: what quantising its weights loses; without it, all are quantised. cpu: the
    instruction set on the CPU; the host's without it. Raises ConfigError for weights in a format
    that the target does not multiply.
    """
    stored = next((p.dtype for p in model.parameters()), torch.float32)
    name, target = options.kv_cache_dtype, family(options.device)
    codes = KV_CODES.get(name, "")
    kv_dtype = stored if name == "auto" or codes else getattr(torch, name)
    width = _page_table_width(sizes)
    form = options.quantization_format()
    if form.startswith("e4m3") and target == "cpp":
        raise ConfigError(
            f"quantization={options.quantization!r}: no CPU multiplies 8-bit floats",
            advice="quantization='int8' or 'int4' on the CPU; fp8 with device='cuda'",
        )
    bf16_dot = target == "cpp" and (cpu or build.Target.host()).bf16_dot
    return PassOptions(
        target,
        PAGE_SIZE,
        kv_dtype,
        64,
        width,
        form,
        bf16_dot,
        quantize_kv=codes,
        quantize_embeddings=options.quantize_embeddings,
        kept_weights=() if measured is None else measured.kept_weights(),
    )


def _page_table_width(sizes: ResolvedSizes) -> int:
    return max(MIN_PAGE_TABLE, -(-sizes.max_model_len // PAGE_SIZE))


def limits_of(module: IRModule, sizes: ResolvedSizes) -> dict[str, int]:
    """Return the largest value of each runtime size, which the plan is made for."""
    tokens = sizes.max_num_batched_tokens
    rows = min(max(MAX_LOGIT_ROWS, sizes.max_num_seqs), max(tokens, sizes.max_num_seqs))
    rows = tokens if module.not_generatable else rows
    return {"T": tokens, "S": sizes.max_num_seqs, "R": rows, "P": 0, "NP": 0, "NB": 0, "NA": 0}


def gpu_card(device: str) -> str:
    """Return the card that a device's kernels are made for: "cuda:90"; "" for the CPU.

    Raises ConfigError for a GPU that is not there.
    """
    if family(device) == "cpp":
        return ""
    from aios_compile.runtime.torch_device import card_name

    return card_name(device)


def _emit(
    module: IRModule, options: CompileOptions, card: str, cache_root: Path, progress: Progress
) -> Emitted:
    tuning = tuning_for(options, card, cache_root)
    return emit(module, options.device, progress.update, card, options.joined_launches(), tuning)


def tuning_for(options: CompileOptions, card: str, cache_root: Path | None = None) -> Any:
    """Return who asks the compiler about candidates, or None; numbers are kept in the cache."""
    if not (options.compile_candidates and card) or options.device == "interpreter":
        return None
    from aios_compile.codegen.triton.choice import Tuning
    from aios_compile.codegen.triton.resource_report import ResourceReport

    folder = None if cache_root is None else cache_root / "resources"
    report = ResourceReport(card, options.threads(), folder)
    return Tuning(report, options.compile_candidates)


def settings_of(
    source: ModelSource, module: IRModule, sizes: ResolvedSizes, card: str = "", joined: str = ""
) -> dict[str, Any]:
    """Return what the runtime needs to know of a model; it becomes Program.settings.

    joined: the kind of device for which a layer's kernels become one launch, "" for none.
    """
    from aios_compile.ir.module import outputs

    logits = outputs(module.root.graph)[0].meta["val"]
    return {
        "name": source.name,
        "page_size": PAGE_SIZE,
        "max_model_len": sizes.max_model_len,
        "max_pages_per_sequence": _page_table_width(sizes),
        "vocab_size": int(logits.shape[-1]),
        "eos_token_ids": list(source.eos_token_ids),
        "generation_config": source.generation_config,
        "notes": list(source.notes),
        "generatable": not module.not_generatable,
        "why_not": module.not_generatable,
        "window_tokens": window_tokens(module),
        "target": card or build.Target.host().name,
        "family": "triton" if card else "cpp",
        "persistent_decode": joined,
    }


def _apply_edits(
    module: IRModule,
    emitted: Emitted,
    weights: RandomWeights,
    sizes: ResolvedSizes,
    cache_root: Path,
    progress: Progress,
) -> list[str]:
    """Use the edited kernels that are right; return a line for each edit."""
    edits, width = overrides.texts(cache_root), _page_table_width(sizes)
    objects = cache_root / "objects"
    lines = [str(v) for v in apply_overrides(module, emitted, edits, weights, width, objects)]
    for line in lines:
        progress.note(line)
    return lines


def launched_sources(program: Program, emitted: Emitted) -> list[KernelSource]:
    """Return the modules that a step launches: not those that are phases of another."""
    return [emitted.sources[i] for i in sorted({call.kernel for call in launch_list(program)})]


def _compile_triton(
    sources: list[KernelSource], card: str, options: CompileOptions
) -> list[tuple[str, bytes]]:
    """Compile every variant of every kernel for a card, in processes side by side.

    The interpreter has nothing to compile. Returns the files that the artefact keeps.
    """
    if options.device == "interpreter":
        return []
    from aios_compile.codegen.triton import binary_cache, compile_ahead

    with tempfile.TemporaryDirectory(prefix="aios-triton-") as folder:
        compile_ahead.compile_ahead(sources, card, Path(folder), options.threads())
        return list(binary_cache.keep(Path(folder) / compile_ahead.CACHE))


def _build(
    sources: list[KernelSource], step: str, folder: Path, cache_root: Path, progress: Progress
) -> None:
    target = build.Target.host()
    texts: list[build.Source] = [*sources, ("step", step)]
    objects = build.build_objects(
        texts, cache_root / "objects", target, on_progress=lambda i, n, _: progress.update(i, n)
    )
    build.link(objects, folder / artefact.LIBRARY)


def _write_texts(
    writer: ArtefactWriter,
    program: Program,
    sources: list[KernelSource],
    step: str,
    results: list[Any],
    notes: list[str],
) -> None:
    for kernel in sources:
        suffix = SUFFIXES[kernel.language]
        writer.write_text(f"{artefact.KERNELS}/{kernel.name}{suffix}", kernel.text)
    data = program.to_json()
    triton = program.settings.get("family") == "triton"
    writer.write_text(artefact.LAUNCHES if triton else artefact.STEP, step)
    writer.write_json(artefact.PROGRAM, data)
    writer.write_json(artefact.PLAN, data["plan"])
    rows = [r.to_json() for r in results]
    writer.write_json(artefact.CERTIFICATES, rows)
    writer.write_json(artefact.REPORT, {"passes": rows, "notes": notes})
