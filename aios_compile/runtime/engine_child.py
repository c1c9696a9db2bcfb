"""One engine process: started, connected to, written to without waiting, killed."""

from __future__ import annotations

import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from aios_compile.errors import EngineError
from aios_compile.runtime import wire

POLL_S = 0.05
EXIT_S = 1.0  # from the end of the connection to the end of the process


class EngineChild:
    """Owner of the process, the socket and the thread that writes to it.

    command: its parts "{socket}" and "{epoch}" are replaced. Raises EngineError if the process
    ends, start_s passes or should_stop() says so before it has connected.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        epoch: int,
        start_s: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self.epoch = epoch
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        path = folder / f"{epoch}.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(POLL_S)
            parts = [
                p.replace("{socket}", str(path)).replace("{epoch}", str(epoch)) for p in command
            ]
            # a session of its own: Ctrl-C is for the front to decide about
            self.process = subprocess.Popen(parts, stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                connected = self._accept(listener, time.monotonic() + start_s, should_stop)
            except BaseException:
                self._end_process()
                raise
            finally:
                path.unlink(missing_ok=True)
        self.connection = wire.Connection(connected)
        self._writer = threading.Thread(target=self._write, name="aios-writer", daemon=True)
        self._writer.start()

    def _accept(
        self, listener: socket.socket, end: float, should_stop: Callable[[], bool]
    ) -> socket.socket:
        while True:
            with suppress(TimeoutError):
                return listener.accept()[0]
            if self.process.poll() is not None:
                raise EngineError(
                    f"the engine process ended with status {self.process.returncode} as it started"
                )
            if time.monotonic() > end or should_stop():
                raise EngineError("the engine process did not connect in time")

    def _write(self) -> None:
        """Send what the outbox holds: a process that does not read must not hold up callers."""
        with suppress(OSError):
            while (frame := self.outbox.get()) is not None:
                self.connection.send(frame)

    def wait(self) -> int | None:
        """Return the status of a process whose connection ended, None if it goes on regardless."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(EXIT_S)
        return None

    def kill(self) -> None:
        """End the process for certain (also a stopped one), and the connection. Idempotent."""
        self._end_process()
        self.outbox.put(None)
        self.connection.close()

    def _end_process(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
