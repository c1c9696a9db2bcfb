"""The walls of the house: import direction, sizes, what is banned, documents that are generated.

An exception is one line in a table below, with its reason.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from aios_compile import env

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "aios_compile"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LINE = 400, 80, 100

# "path" or "path:function" -> why it may be longer than the limit.
SIZE_EXCEPTIONS: dict[str, str] = {
    "tests/test_checkpoint_tokenizer.py": "chat templates on one line, as models ship them",
    "examples/train_shakespeare.py": "one file to read from top to bottom: data, model, training",
}

# Which parts a part may import, besides itself. `api`, `study`, `cli` stand above all.
BASE = ("errors", "env", "config", "progress", "sampling_params")
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "env": ("errors",),
    "config": ("errors", "env"),
    "progress": ("errors", "env"),
    "sampling_params": ("errors", "env"),
    "checkpoint": ("errors", "env", "config"),
    "models": ("errors", "env", "config"),
    "ir": BASE,
    "capture": (*BASE, "ir", "models"),
    "passes": (*BASE, "ir"),
    "codegen": (*BASE, "ir"),
    "runtime": (*BASE, "codegen"),
}
# (importing module, imported module) -> why.
DIRECTION_EXCEPTIONS: dict[tuple[str, str], str] = {
    ("config", "ir.quant_format"): "an option is checked where it is given; the file has no torch",
}

# Modules (and what lies below them) that must work where `import torch` raises.
TORCH_FREE = (
    "__init__", "errors", "env", "config", "progress", "sampling_params", "checkpoint", "runtime",
    "cli", "codegen.program", "codegen.source", "codegen.artefact", "codegen.cache",
    "codegen.cache_key", "codegen.checksum", "codegen.manifest", "codegen.private_folder",
    "codegen.cpp.build", "codegen.packing",
)  # fmt: skip
HEAVY = ("torch", "transformers")
# Extras: imported where they are used, never at the top of a module.
LAZY_ONLY = ("transformers", "huggingface_hub", "llama_cpp", "matplotlib", "IPython")
LINKS = ("passes", "codegen", "runtime")
BANNED_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle")


class Import(NamedTuple):
    """One import statement: the full name imported, and whether it runs when the module does."""

    name: str
    line: int
    at_top: bool


@cache
def tracked(*suffixes: str) -> list[Path]:
    """Return the files of the repository (links aside) with these suffixes."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else map(str, ROOT.rglob("*"))
    paths = (ROOT / name for name in names if name and ".venv" not in name)
    return sorted(p for p in paths if p.suffix in suffixes and p.is_file() and not p.is_symlink())


def module_name(path: Path) -> str:
    """Return "codegen.cpp.build" for its file, "codegen" for a package, "__init__" for the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Return every import of the file but those for type checkers only."""
    found: list[Import] = []

    def walk(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                walk(child, at_top)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            # `from package import module` and `from module import name` look the same.
            found.extend(Import(f"{module}.{a.name}", node.lineno, at_top) for a in node.names)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            walk(child, at_top and not inner)

    walk(parse(path), True)
    return tuple(found)


def own_module(name: str) -> str | None:
    """Return the module of this package that `aios_compile.a.b` or `aios_compile.a.b.C` means."""
    if name.partition(".")[0] != "aios_compile":
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "__init__"


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def test_imports_point_one_way() -> None:
    bad = []
    for module, path in MODULES.items():
        part = module.partition(".")[0]
        if part not in ALLOWED:
            continue
        for item in imports(path):
            target = own_module(item.name)
            if target in (None, "__init__") or (module, target) in DIRECTION_EXCEPTIONS:
                continue
            assert target is not None
            if target.partition(".")[0] not in (part, *ALLOWED[part]):
                bad.append(f"{path.relative_to(ROOT)}:{item.line}: {part} imports {target}")
    assert not bad, "\n".join(bad)


def heavy_chain(module: str, seen: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """Return how importing `module` comes to import torch, or None."""
    if module in seen or module not in MODULES:
        return None
    chain = (*seen, module)
    # Importing a.b.c runs a and a.b as well.
    parents = [".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)]
    for parent in parents:
        if parent not in chain and (found := heavy_chain(parent, chain)):
            return found
    for item in imports(MODULES[module]):
        if not item.at_top:
            continue
        if item.name.partition(".")[0] in HEAVY:
            return (*chain, item.name)
        target = own_module(item.name)
        if target and target != "__init__" and (found := heavy_chain(target, chain)):
            return found
    return None


def test_torch_free_modules_reach_no_torch() -> None:
    free = [m for m in MODULES if any(within(m, prefix) for prefix in TORCH_FREE)]
    chains = [chain for module in free if (chain := heavy_chain(module))]
    assert not chains, "\n".join(" -> ".join(chain) for chain in chains)


def test_banned_imports() -> None:
    bad = []
    for path in tracked(".py"):
        for item in imports(path):
            top = item.name.partition(".")[0]
            where = f"{path.relative_to(ROOT)}:{item.line}: {item.name}"
            if top in LINKS or top in BANNED_MODULES:
                bad.append(where)
            if path.is_relative_to(PACKAGE) and top in LAZY_ONLY and item.at_top:
                bad.append(f"{where} at the top of a module")
    assert not bad, "\n".join(bad)


def test_no_code_from_outside_and_nothing_left_undone() -> None:
    bad = []
    for path in tracked(".py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and is_banned_call(node, path):
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:60]}")
    marker = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b|/(ro" + r"ot|ho" + r"me)/\w")
    for path in tracked(".py", ".h", ".cpp", ".md", ".toml", ".sh"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if marker.search(line):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:60]}")
    assert not bad, "\n".join(bad)


def is_banned_call(node: ast.Call, path: Path) -> bool:
    """Return whether the call runs text as code, unpickles, or starts a shell."""
    name = ast.unparse(node.func)
    in_package = path.is_relative_to(PACKAGE)
    return (
        (in_package and name in ("eval", "exec"))
        or name in ("torch.load", "os.system", "yaml.load")
        or any(
            k.arg in ("shell", "trust_remote_code")
            and isinstance(k.value, ast.Constant)
            and k.value.value is True
            for k in node.keywords
        )
    )


def test_sizes() -> None:
    bad = []
    for path in tracked(".py", ".h", ".cpp"):
        name = str(path.relative_to(ROOT))
        lines = path.read_text().splitlines()
        if len(lines) > MAX_FILE_LINES and name not in SIZE_EXCEPTIONS:
            bad.append(f"{name}: {len(lines)} lines, at most {MAX_FILE_LINES}")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_LINE and name not in SIZE_EXCEPTIONS:
                bad.append(f"{name}:{number}: {len(line)} characters, at most {MAX_LINE}")
        for node in ast.walk(parse(path)) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION_LINES and f"{name}:{node.name}" not in SIZE_EXCEPTIONS:
                    bad.append(f"{name}:{node.lineno}: {node.name} has {size} lines")
    assert not bad, "\n".join(bad)


def test_every_exception_is_still_needed() -> None:
    for entry in SIZE_EXCEPTIONS:
        assert (ROOT / entry.partition(":")[0]).exists(), entry
    for module, target in DIRECTION_EXCEPTIONS:
        assert any(own_module(i.name) == target for i in imports(MODULES[module])), module


def test_every_module_says_what_it_is() -> None:
    bad = [
        str(path.relative_to(ROOT))
        for path in tracked(".py")
        if path.read_text().strip() and len(ast.get_docstring(parse(path)) or "") < 10
    ]
    assert not bad, "no docstring: " + ", ".join(bad)


def test_docs_env_is_generated() -> None:
    assert (ROOT / "docs/env.md").read_text() == env.markdown(), "run `make docs`"


def test_docs_passes_is_generated() -> None:
    if importlib.util.find_spec("aios_compile.passes.catalogue") is None:
        pytest.skip("the generator of docs/passes.md does not exist yet")
    from aios_compile.passes import catalogue

    assert (ROOT / "docs/passes.md").read_text() == catalogue.markdown(), "run `make docs`"
