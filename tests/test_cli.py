"""The command line against a stub model: what is printed where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aios_compile.cli import main as cli
from aios_compile.cli.session import model_of
from aios_compile.config import CompileOptions
from aios_compile.errors import CheckpointError, ConfigError, RequestError
from aios_compile.model_source import open_source
from aios_compile.progress import Progress
from aios_compile.runtime.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    StreamChunk,
)

ROOT = Path(__file__).resolve().parents[1]


class StubTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]


@dataclass
class StubReport:
    passes: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "merge_qkv", "hits": 1}])

    def __str__(self) -> str:
        return "pass table"


class StubStream:
    """Chunks, then the result."""

    def __init__(self, chunks: Iterator[StreamChunk]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[StreamChunk]:
        return self._chunks

    def output(self) -> RequestOutput:
        return RequestOutput(0, None, [1, 2], [], RequestMetrics(1, 2, 3, 0, 4))


class StubModel:
    """Answers with the upper case of the prompt, one token a character."""

    def __init__(self, folder: Path) -> None:
        self.progress = Progress(show=True)
        self.tokenizer = StubTokenizer()
        self.artefact_path = folder
        self.asked: list[dict[str, Any]] = []
        self.closed = False
        with self.progress.stage("load"):
            self.progress.note("cache: miss, never compiled")

    def stream(self, prompt: list[int], **sampling: Any) -> StubStream:
        return StubStream(self._chunks(prompt, sampling))

    def _chunks(self, prompt: list[int], sampling: Any) -> Iterator[StreamChunk]:
        self.asked.append(sampling)
        text = "".join(map(chr, prompt)).upper()
        if "BAD" in text:
            raise RequestError("a bad request", advice="ask something else")
        if "CTRL-C" in text:
            yield StreamChunk("CT", [1, 2])
            raise KeyboardInterrupt
        for index, letter in enumerate(text):
            last = index == len(text) - 1
            yield StreamChunk(letter, [ord(letter)], "length" if last else None)

    def generate(self, prompt: str, **sampling: Any) -> RequestOutput:
        self.asked.append(sampling)
        outputs = [
            CompletionOutput(i, prompt.upper(), [1], "length") for i in range(sampling.get("n", 1))
        ]
        return RequestOutput(0, prompt, [1, 2], outputs, RequestMetrics(1, 2, 3, 0))

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        return "|".join(f"{m['role'][0]}:{m['content']}" for m in messages)

    def report(self) -> StubReport:
        return StubReport()

    def dump(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "index.html").write_text("dump")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> StubModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class Shell:
    run: Callable[..., Result]
    models: list[StubModel]
    options: list[dict[str, Any]]


@pytest.fixture
def shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Shell:
    models: list[StubModel] = []
    asked: list[dict[str, Any]] = []

    def load_and_compile(model: str, **options: Any) -> StubModel:
        if model == "missing":
            raise CheckpointError("missing: no such folder", advice="check the path")
        asked.append(options)
        models.append(StubModel(tmp_path))
        return models[-1]

    api = types.ModuleType("aios_compile.api")
    api.load_and_compile = load_and_compile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aios_compile.api", api)

    def run(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["aios", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return Shell(run, models, asked)


def test_generate_streams_text_and_tells_times_on_stderr(shell: Shell) -> None:
    result = shell.run("generate", "m", "romeo", "--max-tokens", "9", "--top-p", "0.5")
    assert result.code == 0 and result.out == "romeoROMEO\n"
    for part in (
        "never compiled",
        "prompt       5 tokens, 4 of them from the prefix cache",
        "ms after the request",
        "us a token",
    ):
        assert part in result.err
    assert "unaccounted" in result.err and "total" in result.err
    assert shell.models[0].asked == [{"max_tokens": 9, "top_p": 0.5}]
    assert shell.models[0].closed


def test_options_that_were_not_given_are_not_passed_on(shell: Shell) -> None:
    shell.run("generate", "m", "a")
    shell.run(
        *("generate", "m", "a", "--dtype", "float32", "--no-progress", "--seed", "3"),
        *("--disable-passes", "merge_qkv", "--disable-passes", "page", "--num-threads", "1"),
        *("--sampling-seed", "7", "--stop", "x", "--stop", "y", "--logit-bias", "42=-100"),
    )
    assert shell.options[0] == {} and shell.models[0].asked == [{}]
    assert shell.options[1] == {
        "dtype": "float32",
        "progress": False,
        "seed": 3,
        "disable_passes": ["merge_qkv", "page"],
        "num_threads": 1,
    }
    assert shell.models[1].asked == [{"seed": 7, "stop": ["x", "y"], "logit_bias": {42: -100.0}}]


def test_every_option_of_the_api_has_a_flag(shell: Shell) -> None:
    import dataclasses

    text = shell.run("generate", "--help").out
    for item in dataclasses.fields(CompileOptions):
        assert "--" + item.name.replace("_", "-") in text, item.name
    sampling = pytest.importorskip("aios_compile.sampling_params").SamplingParams
    for item in dataclasses.fields(sampling):
        assert "--" + item.name.replace("_", "-") in text, item.name


def test_generate_as_json_and_several_completions(shell: Shell) -> None:
    result = shell.run("generate", "m", "hi", "--json", "--n", "2")
    value = json.loads(result.out)
    assert value["text"] == "HI" and value["prompt_token_ids"] == [1, 2]
    assert [o["index"] for o in value["outputs"]] == [0, 1]
    assert set(value["start"]) >= {"seconds", "unaccounted", "total", "notes"}
    result = shell.run("generate", "m", "-", "--n", "2", stdin="from stdin")
    assert result.out.count("FROM STDIN") == 2


def test_chat_keeps_the_turns_and_takes_back_one_that_failed(shell: Shell) -> None:
    result = shell.run("chat", "m", "--system", "s", stdin="a\n\n/reset\nb\n/exit\nnever\n")
    assert result.code == 0 and result.out == "S:S|U:A\nS:S|U:B\n"
    result = shell.run("chat", "m", "--json", stdin="a\nb\n")
    turns = [json.loads(line) for line in result.out.splitlines()]
    assert [t["content"] for t in turns] == ["U:A", "U:A|A:U:A|U:B"]
    assert turns[0]["role"] == "assistant" and turns[0]["finish_reason"] == "length"
    assert json.loads(result.out.splitlines()[0])["timing"]["num_cached_tokens"] == 4
    assert shell.run("chat", "m", stdin="bad\n").code == 1


def test_compile_report_and_dump(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(2048))
    result = shell.run("compile", "m")
    assert result.code == 0 and f"{tmp_path}  2.0 KiB" in result.out and "total" in result.out
    assert json.loads(shell.run("compile", "m", "--json").out)["bytes"] == 2048
    assert shell.run("report", "m").out == "pass table\n"
    assert json.loads(shell.run("report", "m", "--json").out)["passes"][0]["hits"] == 1
    assert shell.run("dump", "m", str(tmp_path / "out")).out == f"{tmp_path / 'out'}\n"
    assert all(model.closed for model in shell.models)


def test_the_cache_commands(shell: Shell, tmp_path: Path) -> None:
    where = ("--cache-dir", str(tmp_path / "c"))
    assert shell.run("cache", "path", *where).out == f"{tmp_path / 'c' / 'artefacts-v1'}\n"
    assert "0 artefacts" in shell.run("cache", "ls", *where).out
    assert json.loads(shell.run("cache", "ls", "--json", *where).out) == []
    assert "removed 0 artefacts" in shell.run("cache", "rm", *where).out
    result = shell.run("cache", "rm", "abc", *where)
    assert result.code == 1 and "error: no artefact" in result.err and "aios cache ls" in result.err


def test_env_lists_every_variable(shell: Shell) -> None:
    from aios_compile.env import VARIABLES

    value = json.loads(shell.run("env", "--json").out)
    assert [v["name"] for v in value["variables"]] == [v.name for v in VARIABLES]
    assert value["machine"]["torch"] and "AIOS_DEBUG" in shell.run("env").out


def test_a_mistake_is_told_without_a_traceback(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = shell.run("generate", "missing", "a")
    assert result.code == 1 and result.out == ""
    assert result.err == "error: missing: no such folder\n  try: check the path\n"
    error = json.loads(shell.run("generate", "missing", "a", "--json").out)["error"]
    assert error["type"] == "CheckpointError" and error["advice"] == "check the path"
    monkeypatch.setenv("AIOS_DEBUG", "1")
    assert "Traceback" in shell.run("generate", "missing", "a").err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dtype", "int9"), "float32"),
        (("--speculative-config", "{"), "not JSON"),
        (("--logit-bias", "x"), "ID=BIAS"),
        (("--max-tokens", "-1"), "max_tokens=-1"),
    ],
)
def test_a_bad_option_fails_before_anything_is_loaded(
    shell: Shell, arguments: tuple[str, ...], expected: str
) -> None:
    result = shell.run("generate", "m", "a", *arguments)
    assert result.code == 1 and expected in result.err and not shell.models


def test_wrong_usage_is_exit_code_2(shell: Shell) -> None:
    result = shell.run("frobnicate")
    assert result.code == 2
    assert "no command 'frobnicate'; the commands are generate, chat, compile" in result.err
    assert "ls, rm, path" in shell.run("cache", "frobnicate").err
    assert shell.run("generate", "m").code == 2
    assert shell.run("generate", "m", "a", "--frob").code == 2


def test_ctrl_c_stops_cleanly(shell: Shell) -> None:
    result = shell.run("generate", "m", "ctrl-c")
    assert result.code == 130 and result.out.endswith("CT") and "Traceback" not in result.err
    assert "interrupted" in result.err and shell.models[0].closed


def test_output_is_plain_when_it_is_no_terminal(shell: Shell) -> None:
    for arguments in (("--help",), ("env",), ("generate", "m", "a"), ("frob",)):
        result = shell.run(*arguments)
        assert "\x1b" not in result.out + result.err and "│" not in result.out + result.err


def test_a_full_disk_is_told() -> None:
    code = "from aios_compile.cli.main import main; main()"
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = subprocess.run(
            [sys.executable, "-c", code, "cache", "path"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == b"error: cannot write: No space left on device\n"


def test_a_closed_pipe_is_no_error() -> None:
    code = "from aios_compile.cli.main import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "env"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read()
    child.stderr.close()
    assert child.wait() == 141


def test_the_shell_can_complete_commands() -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_AIOS_COMPLETE": "complete_bash",
        "COMP_WORDS": "aios ca",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['aios']\nfrom aios_compile.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["cache"], result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dump", "out"), "--dump needs --target"),
        (("--target", "cuda:90"), "--target needs a folder"),
        (("--target", "cuda:75", "--dump", "new"), "no cost model for GPU target 'cuda:75'"),
    ],
)
def test_compile_for_a_card_says_what_is_missing(
    shell: Shell, arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    given = [str(tmp_path / a) if a == "new" else a for a in arguments]
    result = shell.run("compile", "m", *given)
    assert result.code == 1 and expected in result.err and not shell.models


def test_a_module_of_a_file_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WIDTH = 3\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "import beside\n\n\nclass Module:\n    width = beside.WIDTH\n\n"
        "    def named_parameters(self):\n        return ()\n\n\n"
        "made = Module()\n\n\ndef make():\n    return Module()\n"
    )
    assert model_of(f"{file}:made").width == model_of(f"{file}:Module").width == 3
    assert model_of(f"{file}:make") is model_of(f"{file}:make"), "one module, one set of weights"
    assert model_of("org/name") == "org/name" and model_of(str(file)) == str(file)
    with pytest.raises(ConfigError, match=r"mine\.py has no 'other'"):
        model_of(f"{file}:other")
    with pytest.raises(ConfigError, match="no such file"):
        model_of(f"{tmp_path / 'none.py'}:made")


@pytest.mark.parametrize(("eos", "wrong"), [(7, 7), ([1, 6], 6), (-1, -1), ([1, 5], None)])
def test_an_end_token_beyond_the_vocabulary_is_refused_at_once(eos: Any, wrong: int | None) -> None:
    module = torch.nn.Linear(2, 2)
    module.config = SimpleNamespace(vocab_size=6, eos_token_id=eos)  # type: ignore[assignment]
    if wrong is None:
        assert open_source(module, CompileOptions()).eos_token_ids == (1, 5)
        return
    with pytest.raises(
        ConfigError, match=f"eos_token_id {wrong} is out of the module's vocabulary"
    ):
        open_source(module, CompileOptions())
