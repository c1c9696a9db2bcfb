"""Run all programs of one launch side by side in Triton's interpreter, in any order that one likes.

The interpreter runs programs one behind the other, so a program that waits for another's flag never
ends. Here each program is a thread of which one runs at a time; at every atomic operation it gives
the turn back, and `pick` says who goes on. A program that looks at one flag twice (an atomic that
adds zero) rests until somebody changes something; when all rest, that is a deadlock. At most
`resident` programs have begun and not ended, as on a card that holds no more. Launches in one
context overlap as dependent launches do: a program of a later one may run up to `wait_for_inputs`.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from triton.runtime import interpreter

Pick = Callable[[Sequence[int]], int]


class Deadlock(Exception):
    """Every program that may run waits for another."""


class _Stopped(BaseException):
    """The launch has failed elsewhere: end this program's thread."""


class _Program:
    """A program of the launch-th launch, the place-th of all that run together."""

    def __init__(self, launch: int, place: int, grid: int, index: int, run: Any) -> None:
        self.launch, self.place, self.grid, self.index = launch, place, grid, index
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.begun = self.ended = self.stopped = False
        self.error: BaseException | None = None
        self.looked_at: int | None = None
        self.thread = threading.Thread(target=self._run, args=(run,), daemon=True)

    def _run(self, run: Callable[[], None]) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                run()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (raised by who runs the launch)
            self.error = error
        self.ended = True
        self.back.release()

    def resume(self) -> None:
        """Let the program run to its next atomic operation, or to its end."""
        if not self.begun:
            self.begun = True
            self.thread.start()
        self.go.release()
        self.back.acquire()

    def give_back(self) -> None:
        self.back.release()
        self.go.acquire()
        if self.stopped:
            raise _Stopped


class Turns:
    """The order in which the programs of launches run. num_turns: how often somebody was picked;
    raised: addresses that were added to, in order.
    """

    def __init__(self, pick: Pick, resident: int | None = None) -> None:
        self.pick, self.resident, self.num_turns = pick, resident, 0
        self.current: _Program | None = None
        self.resting: set[int] = set()
        self.programs: list[_Program] = []
        self.raised: list[int] = []

    def add(self, launch: int, grid: int, run: Callable[[], None]) -> None:
        """Add the programs of a launch."""
        begin = len(self.programs)
        self.programs += [_Program(launch, begin + i, grid, i, run) for i in range(grid)]

    def run(self) -> None:
        """Run all programs to their ends. Raises Deadlock, or what a program raised."""
        self.resting, programs = set(), self.programs
        try:
            while not all(p.ended for p in programs):
                self._turn(programs)
        finally:
            self.current, self.programs = None, []
            for program in programs:
                program.stopped = True
                while program.begun and not program.ended:
                    program.resume()

    def _turn(self, programs: list[_Program]) -> None:
        begun = sum(p.begun and not p.ended for p in programs)
        room = self.resident is None or begun < self.resident
        able = [
            i
            for i, p in enumerate(programs)
            if not p.ended and i not in self.resting and (p.begun or room)
        ]
        if not able:
            raise Deadlock(f"{len(self.resting)} programs wait for flags that nobody will raise")
        chosen = self.pick(able)
        self.num_turns += 1
        self.current = program = programs[chosen]
        interpreter.interpreter_builder.set_grid_dim(program.grid, 1, 1)
        interpreter.interpreter_builder.set_grid_idx(program.index, 0, 0)
        program.resume()
        if program.error is not None:
            raise program.error
        if program.ended:
            self.resting.clear()

    def before_atomic(self, changes: bool, place: int) -> None:
        """Give the turn back, unless the caller is no program of ours."""
        program = self.current
        if program is None or threading.current_thread() is not program.thread:
            return
        if not changes and program.looked_at == place:  # in vain, or it would have gone on
            self.resting.add(program.place)
        program.give_back()
        program.looked_at = None if changes else place
        if changes:
            self.raised.append(place)
            self.resting.clear()

    def wait_for_inputs(self) -> None:
        """Rest until all programs of the launch before have ended; see dependent_launch.py."""
        program = self.current
        assert program is not None
        while any(p.launch == program.launch - 1 and not p.ended for p in self.programs):
            self.resting.add(program.place)
            program.give_back()


@contextlib.contextmanager
def interleaved(turns: Turns) -> Iterator[None]:
    """Run the launches of this context, of one-dimensional grids, by `turns` when it ends."""
    scopes: list[Any] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    atomic, call = builder.create_atomic_rmw, executor.__call__

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, *others: Any) -> Any:
        turns.before_atomic(bool(np.any(val.data)), int(ptr.data.flat[0]))
        return atomic(self, op, ptr, val, *others)

    def run(self: Any, *arguments: Any, **keywords: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        scopes.append(interpreter._patch_lang(self.fn))
        given = inspect.getcallargs(
            self.fn, *arguments, **{k: v for k, v in keywords.items() if k in names}
        )
        given = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in given.items()
        }
        self.fn.__globals__["wait_for_inputs"] = turns.wait_for_inputs
        turns.add(len(scopes), self.grid[0], lambda: self.fn(**given))

    builder.create_atomic_rmw, executor.__call__ = create_atomic_rmw, run
    try:
        yield
        turns.run()
    finally:
        builder.create_atomic_rmw, executor.__call__ = atomic, call
        for scope in reversed(scopes):
            scope.restore()
