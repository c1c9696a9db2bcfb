"""`aios chat` on the example checkpoint: each turn finds all that was computed before it."""

from __future__ import annotations

import json
from itertools import pairwise

from typer.testing import CliRunner

from aios_compile.cli.main import app
from tests.serving.conftest import EXAMPLE


def test_turns_reuse_prompts_and_answers() -> None:
    options = ["--json", "--no-progress", "--num-threads", "1", "--max-tokens", "30"]
    options += ["--temperature", "0"]  # a drawn answer may be spelled in other tokens than its text
    lines = "Who art thou?\nAnd what dost thou want?\nFarewell\n"
    result = CliRunner().invoke(app, ["chat", str(EXAMPLE), *options], input=lines)
    assert result.exit_code == 0, result.output
    turns = [json.loads(line)["timing"] for line in result.stdout.splitlines()]
    assert turns[0]["num_cached_tokens"] == 0 and len(turns) == 3
    for before, turn in pairwise(turns):
        # the generated tokens too; the last one was never computed, as nothing followed it
        assert turn["num_cached_tokens"] >= before["num_prompt_tokens"] + before["num_tokens"] - 2
        assert turn["num_cached_tokens"] < turn["num_prompt_tokens"]
