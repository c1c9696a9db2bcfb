"""The program of an engine process: `python -m aios_compile.engine_process SOCKET EPOCH OPTIONS`.

OPTIONS is a JSON object: "model" and the keywords of load_and_compile. Started by EngineFront.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aios_compile.runtime.engine import Engine
from aios_compile.runtime.engine_front import EngineFront
from aios_compile.runtime.engine_server import EngineServer
from aios_compile.runtime.wire import Connection


def serve_engine(engine: Engine, path: str, epoch: int) -> None:
    """Connect to the front's socket and serve until the front is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        connected.connect(path)
        EngineServer(engine, Connection(connected), epoch).serve()


def start_front(model: str, *, stall_s: float = 60.0, **options: Any) -> EngineFront:
    """Return the front of an engine process that loads `model`; options as load_and_compile's."""
    values = json.dumps({**options, "model": str(model)}, default=str)
    command = [sys.executable, "-m", "aios_compile.engine_process", "{socket}", "{epoch}", values]
    return EngineFront(command, seed=options.get("seed", 0), stall_s=stall_s)


def log_of_epoch(log: Path, epoch: int) -> Path:
    """Return where an engine process writes its decisions: log.jsonl, then log.2.jsonl, ...

    Each starts from an empty scheduler, so each log is replayed on its own.
    """
    return log if epoch == 1 else log.with_name(f"{log.stem}.{epoch}{log.suffix}")


def main(arguments: Sequence[str]) -> None:
    from aios_compile.api import load_and_compile

    path, epoch, text = arguments
    options = json.loads(text)
    if options.get("decision_log"):
        options["decision_log"] = str(log_of_epoch(Path(options["decision_log"]), int(epoch)))
    with load_and_compile(options.pop("model"), **options) as model:
        gc.collect()
        gc.freeze()  # what is here stays as long as the process
        serve_engine(model.engine, path, int(epoch))


if __name__ == "__main__":
    main(sys.argv[1:])
