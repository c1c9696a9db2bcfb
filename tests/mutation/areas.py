"""What is mutated: the files of each area, and by rule what is not (docs/mutation.md tells why)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "aios_compile"

# Area -> files below aios_compile.
AREAS: dict[str, tuple[str, ...]] = {
    "passes": ("passes/*.py",),
    "cpp": ("codegen/cpp/*.py", "codegen/cpp/*.h", "codegen/cpp/templates/*.h"),
    "triton": ("codegen/triton/*.py", "codegen/triton/templates/*.txt"),
    "emitters": (
        "codegen/access.py", "codegen/emit_kernels.py", "codegen/expression.py",
        "codegen/linear_*.py", "codegen/movement.py", "codegen/operand.py",
        "codegen/pack_weights.py", "codegen/packing.py", "codegen/planar.py",
        "codegen/pointwise_ops.py", "codegen/quantized_weights.py", "codegen/reductions.py",
        "codegen/scatters.py", "codegen/source.py", "codegen/step_packet.py",
        "codegen/step_results.py", "codegen/strided.py",
    ),
    "scheduler": (
        "runtime/scheduler.py", "runtime/planner.py", "runtime/block_manager.py",
        "runtime/schedule_state.py", "runtime/preemption.py", "runtime/policies.py",
        "runtime/prefix_cache.py", "runtime/kv_cache.py", "runtime/commit.py",
        "runtime/batch_builder.py", "runtime/page_moves.py", "runtime/draft_governor.py",
        "runtime/look_ahead.py", "runtime/overlap_governor.py", "runtime/step_slot.py",
        "runtime/split_step.py", "runtime/run_tables.py",
    ),
    "planner": (
        "passes/plan_memory.py", "ir/lifetimes.py", "codegen/form_phases.py", "codegen/lower.py",
        "codegen/layout.py", "codegen/kernel_choices.py", "runtime/select_kernels.py",
        "runtime/select_gpu_kernels.py", "runtime/weight_memory.py", "kernel_tuning.py",
        "runtime/huge_pages.py", "codegen/aligned_map.py",
    ),
}  # fmt: skip

# Files that an area's pattern takes in and that are not mutated, with the reason.
LEFT_OUT: dict[str, str] = {
    "codegen/cpp/build.py": "runs the compiler: no emitter",
    "codegen/cpp/precompiled.py": "makes g++ quicker: no emitter",
    "codegen/triton/compile_ahead.py": "runs the compiler: no emitter",
    "codegen/triton/configs.py": "block sizes by a cost model: speed only, any choice is right",
    "codegen/triton/cards.py": "sizes of cards: speed only",
    "passes/catalogue.py": "writes documentation",
}

# Tests that hold what no mutant changes, or that time: they would kill by chance or never.
TESTS_LEFT_OUT: dict[str, str] = {
    "tests/test_structure.py": "reads the files, which are not changed",
    "tests/test_imports.py": "times imports",
    "tests/test_mutation.py": "tests this tool",
    "tests/runtime/test_overhead.py": "times the scheduler",
    "tests/runtime/test_scheduler_time.py": "times the scheduler",
    "tests/nightly": "hours",
    "tests/gpu": "needs a GPU",
}


def files_of(area: str) -> list[Path]:
    """Return the mutated files of an area, sorted; plan_memory belongs to the planner alone."""
    found = {p for pattern in AREAS[area] for p in PACKAGE.glob(pattern)}
    mine = {p for p in found if p.name != "__init__.py" and name_of(p) not in LEFT_OUT}
    return sorted(p for p in mine if area == "planner" or p.name != "plan_memory.py")


def name_of(path: Path) -> str:
    """Return a file's path below aios_compile."""
    return path.relative_to(PACKAGE).as_posix()


def module_of(name: str) -> str:
    """Return the dotted name of a Python file below aios_compile."""
    return "aios_compile." + name.removesuffix(".py").replace("/", ".")
