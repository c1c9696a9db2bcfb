"""Let one file of aios_compile be imported, or read, with a mutant in it; the checkout stays."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tests.mutation import operators
from tests.mutation.areas import PACKAGE, ROOT, module_of

SITE = Path(__file__).parent / "site"
HEADERS = PACKAGE / "codegen" / "cpp"
BUILD = HEADERS / "build.py"


def install(file: str, number: str, headers: str) -> None:
    """Make this process, and the Python processes that it starts, see a mutant.

    headers: a new folder, for the headers that g++ is to find when one of them is changed.
    """
    path = PACKAGE / file
    if file.endswith(".py"):
        tree = operators.mutated_tree(file, path.read_text(), int(number))
        code = {module_of(file): lambda: compile(tree, str(path), "exec")}
        sys.meta_path.insert(0, Finder(code))
    else:
        text = operators.mutated_text(path.read_text(), int(number))
        change_text(path, text)
        if path.parent == HEADERS:
            change_header(path, text, Path(headers))
    os.environ["MUTATION"] = f"{file}|{number}|{headers}"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), str(ROOT)])


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the named modules from code that is made when it is asked for."""

    def __init__(self, code: dict[str, Callable[[], CodeType]]) -> None:
        self.code = code

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.code:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.origin is not None
        return importlib.util.spec_from_file_location(name, spec.origin, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code[module.__name__](), module.__dict__)

    def get_source(self, name: str) -> str:
        """Return the text on disk, for inspect."""
        return (ROOT / (name.replace(".", "/") + ".py")).read_text()

    def is_package(self, name: str) -> bool:
        return False


def change_text(path: Path, text: str) -> None:
    """Let `path.read_text()` return another text."""
    read = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        return text if self == path else read(self, *args, **kwargs)

    Path.read_text = read_text  # type: ignore[method-assign]


def change_header(path: Path, text: str, folder: Path) -> None:
    """Let g++ find the headers in `folder`, which has all of them, one with another text."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for header in path.parent.glob("*.h"):
            shutil.copy(header, folder / header.name)
        (folder / path.name).write_text(text)
    before = "HEADER_FOLDER = Path(__file__).parent"
    source = BUILD.read_text()
    assert source.count(before) == 1, "build.py names its headers' folder otherwise"
    source = source.replace(before, f"HEADER_FOLDER = Path({str(folder)!r})")
    code = {module_of("codegen/cpp/build.py"): lambda: compile(source, str(BUILD), "exec")}
    sys.meta_path.insert(0, Finder(code))
