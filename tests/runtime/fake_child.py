"""An engine process with the fake executor: `python -m tests.runtime.fake_child SOCKET EPOCH JSON`.

What may go wrong is planted by the options: step_seconds; hang_at, exit_at, fail_at (a step of the
first process); talks_nonsense (of the first process: pulses without their fields); poison (a
prompt's first token that kills whoever runs it); is_mute (never connect).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from aios_compile.engine_process import serve_engine
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.engine_server import EngineServer
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, limits


def main(path: str, epoch: str, text: str) -> None:
    options = json.loads(text)
    if options.get("is_mute"):
        sys.exit(3)
    executor = FakeExecutor(limits(**options.get("limits", {})))
    executor.step_seconds = options.get("step_seconds", 0.0)

    def go_wrong(batch: Any) -> None:
        if options.get("poison") in batch.token_ids.tolist():
            os._exit(5)
        if epoch != "1":
            return
        if executor.num_steps == options.get("hang_at"):
            time.sleep(60)
        if executor.num_steps == options.get("exit_at"):
            os._exit(4)
        if executor.num_steps == options.get("fail_at"):
            executor.usable = False
            raise MemoryError("planted")

    executor.before_step = go_wrong
    if options.get("talks_nonsense") and epoch == "1":
        nonsense = "_send_pulse", lambda server: server._send("pulse", 0)
        setattr(EngineServer, *nonsense)
    with Engine(executor, FakeTokenizer(), eos_token_ids=[9]) as engine:
        serve_engine(engine, path, int(epoch))


if __name__ == "__main__":
    main(*sys.argv[1:])
