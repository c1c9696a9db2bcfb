"""Which mutants are tried, and by which tests, in which order."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.mutation import areas
from tests.mutation.coverage import TOP, Map, place_of
from tests.mutation.operators import Mutant, mutants_of

FAST_SECONDS = 0.3
# (seconds that the tests took when they passed, variants of one test): a first look, then all.
FIRST, WHOLE = (20.0, 3), (60.0, 1000)


def sample(area: str, seed: int, limit: int, only: Sequence[str] = ()) -> list[Mutant]:
    """Return `limit` mutants of an area (0: all), the same ones for the same seed.

    Each is drawn by a hash of what it changes: an edit elsewhere in the project does not change
    the sample. only: names of files, or keys of mutants.
    """
    found: list[Mutant] = []
    for path in areas.files_of(area):
        name = areas.name_of(path)
        mutants = mutants_of(name, path.read_text())
        found += [m for m in mutants if not only or name in only or m.key in only]
    found.sort(key=lambda m: hashlib.sha256(f"{seed}|{m.key}".encode()).digest())
    return found[:limit] if limit else found


class Selector:
    """Orders the tests of a mutant: what killed its neighbours, the file's own tests, fast ones."""

    def __init__(self, map: Map, known: set[str]) -> None:
        """Known: the tests that can be collected now; the map may be older."""
        self.map = map
        self.known = known
        self.killers: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.tests: dict[tuple[str, str], list[str]] = {}

    def learn(self, file: str, test: str) -> None:
        self.killers[file][test] += 1

    def covering(self, mutant: Mutant) -> list[str]:
        """Return the tests that run the mutated statement; if none is seen to, all of its file.

        What runs in a process of its own, or when a module is imported, is not seen.
        """
        place = TOP
        if mutant.function:
            text = (areas.PACKAGE / mutant.file).read_text().splitlines()
            place = place_of(mutant.function, text[mutant.line - 1])
        for at in (place, TOP):
            key = (mutant.file, at)
            if key not in self.tests:
                self.tests[key] = [t for t in self.map.tests_of(*key) if t in self.known]
            if self.tests[key]:
                return self.tests[key]
        return []

    def choose(self, mutant: Mutant, budget: tuple[float, int]) -> dict[str, float]:
        """Return {test: its seconds} in the order to run them, within a budget."""
        most_seconds, variants = budget
        chosen: dict[str, float] = {}
        total, functions = 0.0, Counter[str]()
        for test in sorted(self.covering(mutant), key=lambda t: self._rank(mutant, t)):
            seconds, function = self.map.seconds[test], test.split("[")[0]
            if total and (total + seconds > most_seconds or functions[function] >= variants):
                continue
            chosen[test] = seconds
            total += seconds
            functions[function] += 1
        # within a group by file, as fixtures of a module are made once
        return {t: chosen[t] for t in sorted(chosen, key=lambda t: self._group(mutant, t))}

    def _rank(self, mutant: Mutant, test: str) -> tuple[object, ...]:
        group, _, _ = self._group(mutant, test)
        return group, self.map.seconds[test], test

    def _group(self, mutant: Mutant, test: str) -> tuple[int, str, float]:
        """Return the group, the file, the seconds; groups run in order."""
        kills, seconds = self.killers[mutant.file], self.map.seconds[test]
        if kills[test] and test in [t for t, _ in kills.most_common(4)]:
            return 0, "", -kills[test]
        file, stem = test.split("::")[0], Path(mutant.file).stem.split(".")[0]
        own = stem in Path(file).stem
        slow = seconds > FAST_SECONDS
        return 1 + 2 * slow + (not own), file, seconds
