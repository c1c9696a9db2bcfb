"""`aios generate` and `aios chat`: text streams to stdout, times go to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aios_compile.cli.options import JsonOption, ModelArgument
from aios_compile.cli.output import plain, print_json
from aios_compile.cli.session import encode, load, show_text, stream_timed
from aios_compile.errors import RequestError

if TYPE_CHECKING:
    from aios_compile.compiled_model import CompiledModel

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help='text, or "-" for stdin')],
    options: dict[str, Any],
    sampling: dict[str, Any],
    as_json: JsonOption = False,
) -> None:
    """Stream the continuation of PROMPT."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with load(model, options) as loaded:
        if as_json:
            result = loaded.generate(text, **sampling)
            start = loaded.progress.summary()
            print_json({"text": result.text, **_fields(result), "start": start})
            return
        if sampling.get("n", 1) > 1:
            _print_all(loaded, text, sampling)
            return
        ids = encode(loaded, text)
        show_text(text)
        _, _, timing = stream_timed(loaded, ids, sampling, show_text)
        show_text("\n")
        summary = loaded.progress.summary()
        print(f"\n{timing}\nstart\n{summary}", file=sys.stderr)


def _fields(result: Any) -> dict[str, Any]:
    value = plain(result)
    return value if isinstance(value, dict) else {}


def _print_all(model: CompiledModel, text: str, sampling: dict[str, Any]) -> None:
    result = model.generate(text, **sampling)
    for output in result.outputs:
        print(f"--- {output.index + 1} of {len(result.outputs)} ({output.finish_reason})")
        print(text + output.text)


def chat(
    model: ModelArgument,
    options: dict[str, Any],
    sampling: dict[str, Any],
    as_json: JsonOption = False,
    system: Annotated[str, typer.Option(help="instruction before the first turn")] = "",
) -> None:
    """Talk with MODEL through its chat template, turn by turn."""
    with load(model, options) as loaded:
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        interactive = sys.stdin.isatty() and not as_json
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its line editing)
            print(_HELP, file=sys.stderr)
        while (line := _read_turn(interactive)) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(opening)
            elif line.strip():
                messages.append({"role": "user", "content": line})
                _answer(loaded, messages, sampling, as_json, interactive)


def _read_turn(interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None


def _answer(
    model: CompiledModel,
    messages: list[dict[str, str]],
    sampling: dict[str, Any],
    as_json: bool,
    interactive: bool,
) -> None:
    """Stream the answer to the last message and append it; a turn that fails is taken back."""
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if not as_json:
            show_text(text)

    try:
        # The template writes the special tokens itself.
        ids = encode(model, model.apply_chat_template(messages), special_tokens=False)
        _, reason, timing = stream_timed(model, ids, sampling, show)
    except KeyboardInterrupt:
        if not interactive:
            raise
        reason, timing = "abort", None
    except RequestError as error:
        if not interactive:
            raise
        messages.pop()
        print(f"error: {error}", file=sys.stderr)
        return
    messages.append({"role": "assistant", "content": "".join(shown)})
    if as_json:
        turn = {**messages[-1], "finish_reason": reason, "timing": plain(timing)}
        print(json.dumps(turn, ensure_ascii=False), flush=True)
    else:
        show_text("\n")
        if interactive and timing is not None:
            print(f"\n{timing}", file=sys.stderr)
