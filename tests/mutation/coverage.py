"""Which test runs which statement of the mutated files: a pytest plugin, and the map it writes.

Every statement in a function of these files is preceded by a store into one bytearray. What a
shared fixture or a memoised function ran counts for every test that uses its result, not only for
the one that came first. What a test runs in a process of its own is not seen.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.mutation import areas, operators, overlay

TOP = ""  # the place of all of a file that is in no function, and of a template
HITS = bytearray(1 << 16)  # one for each statement; a later run of the same statement is free


@dataclass
class Map:
    """seconds: of each test that passed. places: test -> file -> what it ran there, with TOP."""

    seconds: dict[str, float] = field(default_factory=dict)
    places: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Map:
        """Return the parts of a map together; later parts replace what earlier ones say."""
        whole = cls()
        for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
            part = cls(**json.loads(path.read_text()))
            whole.seconds.update(part.seconds)
            whole.places.update(part.places)
        return whole

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(path)

    def tests_of(self, file: str, place: str) -> list[str]:
        """Return the tests that ran a place; for TOP those that ran anything of the file."""
        return [test for test, places in self.places.items() if place in places.get(file, ())]


def place_of(function: str, line: str) -> str:
    """Return the name of a statement: it stays when the file changes elsewhere."""
    return hashlib.sha256(f"{function}|{line.strip()}".encode()).hexdigest()[:8]


def alone(run: Callable[[], Any]) -> tuple[Any, int]:
    """Run something; return its result and what it ran by itself, a bit for each statement."""
    before = int.from_bytes(HITS, "little")
    HITS[:] = bytes(len(HITS))
    try:
        result = run()
    finally:
        ran = int.from_bytes(HITS, "little")
        HITS[:] = (ran | before).to_bytes(len(HITS), "little")
    return result, ran


def add(ran: int) -> None:
    """Count what ran earlier as run now."""
    HITS[:] = (ran | int.from_bytes(HITS, "little")).to_bytes(len(HITS), "little")


def memoise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep results, as functools.cache, and count what made a result whenever it is used."""
    kept: dict[Any, tuple[Any, int]] = {}

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(sorted(kwargs.items())))
        if key in kept:
            add(kept[key][1])
        else:
            kept[key] = alone(lambda: function(*args, **kwargs))
        return kept[key][0]

    cached.cache_clear = kept.clear  # type: ignore[attr-defined]
    return cached


def memoise_ours() -> None:
    """Replace functools' caches for functions of this project that are defined from now on."""
    cache, lru_cache = functools.cache, functools.lru_cache

    def is_ours(function: Any) -> bool:
        return getattr(function, "__module__", "").split(".")[0] in ("tests", "aios_compile")

    def new_cache(function: Any) -> Any:
        return memoise(function) if is_ours(function) else cache(function)

    def new_lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
        if callable(maxsize):
            return memoise(maxsize) if is_ours(maxsize) else lru_cache(maxsize)
        old = lru_cache(maxsize, typed)
        return lambda function: memoise(function) if is_ours(function) else old(function)

    functools.cache, functools.lru_cache = new_cache, new_lru_cache  # type: ignore[assignment]


class Marks:
    """The places of HITS: statement i is (file, place) i. Importing counts from here."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.places: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.templates: dict[Path, int] = {}
        code: dict[str, Callable[[], Any]] = {}
        for path in files:
            name = areas.name_of(path)
            if path.suffix == ".py":
                tree = self._marked(path.read_text(), name)
                compiled = functools.partial(compile, tree, str(path), "exec")
                code[areas.module_of(name)] = compiled
            else:
                self.templates[path] = len(self.places)
                self.places.append((name, TOP))
        assert len(self.places) <= len(HITS), "more statements than HITS has room for"
        sys.meta_path.insert(0, overlay.Finder(code))
        self._count_templates()

    def _count_templates(self) -> None:
        read = Path.read_text

        def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
            if path in self.templates:
                HITS[self.templates[path]] = 1
            return read(path, *args, **kwargs)

        Path.read_text = read_text  # type: ignore[method-assign,assignment]

    def _marked(self, text: str, name: str) -> ast.Module:
        tree, self.text = ast.parse(text), text.splitlines()
        self._mark(tree, name, "", inside=False)
        future = [isinstance(s, ast.ImportFrom) and s.module == "__future__" for s in tree.body]
        at = future.index(True) + 1 if True in future else 0
        tree.body[at:at] = ast.parse("from tests.mutation.coverage import HITS as _hits").body
        return ast.fix_missing_locations(tree)

    def _mark(self, node: ast.AST, name: str, function: str, inside: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".removeprefix(".")
            inside |= not isinstance(node, ast.ClassDef)
        for child in ast.iter_child_nodes(node):
            self._mark(child, name, function, inside)
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, None)
            if inside and isinstance(block, list) and not isinstance(node, ast.ClassDef):
                setattr(node, part, self._marked_block(block, name, function))

    def _marked_block(self, block: list[ast.stmt], name: str, function: str) -> list[ast.stmt]:
        marked: list[ast.stmt] = []
        for i, statement in enumerate(block):
            if i == 0 and operators.is_text(statement):
                marked.append(statement)  # a docstring stays the first
                continue
            mark = ast.parse(f"_hits[{len(self.places)}] = 1").body[0]
            place = place_of(function, self.text[statement.lineno - 1])
            self.places.append((name, place))
            marked += [ast.copy_location(mark, statement), statement]
        return marked

    def ran(self) -> dict[str, list[str]]:
        """Return the places that ran since HITS was empty, by file."""
        found: dict[str, set[str]] = {}
        for i, (name, place) in enumerate(self.places):
            if HITS[i]:
                found.setdefault(name, {TOP}).add(place)
        return {name: sorted(places) for name, places in found.items()}


class Recording:
    """The plugin: keeps what each passed test ran, and how long it took."""

    def __init__(self, files: Iterable[Path]) -> None:
        memoise_ours()
        self.marks, self.map = Marks(files), Map()
        self.fixtures: dict[Any, int] = {}
        self.passed: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        before = int.from_bytes(HITS, "little")
        HITS[:] = bytes(len(HITS))
        try:
            return (yield)
        finally:
            ran = int.from_bytes(HITS, "little")
            if fixturedef.scope != "function":
                self.fixtures[fixturedef] = ran
            add(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        HITS[:] = bytes(len(HITS))
        result = yield
        for used in getattr(item, "_fixtureinfo").name2fixturedefs.values():  # noqa: B009
            for fixture in used:
                add(self.fixtures.get(fixture, 0))
        seconds = self.passed.get(item.nodeid)
        ran = self.marks.ran()
        if seconds is not None and ran:
            self.map.seconds[item.nodeid] = round(seconds, 4)
            self.map.places[item.nodeid] = ran
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" and report.passed:
            self.passed[report.nodeid] = report.duration
        elif report.passed and report.nodeid in self.passed:
            self.passed[report.nodeid] += report.duration
        else:
            self.passed.pop(report.nodeid, None)


def record(paths: list[str], folder: Path) -> int:
    """Run the tests below `paths` and add them to the map in `folder`; return pytest's status."""
    recording = Recording(p for area in areas.AREAS for p in areas.files_of(area))
    left_out = [f"--ignore={path}" for path in areas.TESTS_LEFT_OUT]
    options = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *left_out]
    status = pytest.main([*options, *paths], plugins=[recording])
    name = re.sub(r"\W+", "-", " ".join(paths))
    if len(name) > 100:  # many files: a file system has names of 255 bytes
        name = f"{name[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    recording.map.save(folder / f"{name}.json")
    return int(status)
