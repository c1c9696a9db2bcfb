"""Tokens, streams and chat prompts equal transformers'; templates can neither escape nor run on."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from aios_compile.checkpoint.chat_template import ChatTemplate
from aios_compile.checkpoint.tokenizer import Tokenizer, TokenStream
from aios_compile.errors import RequestError

SHAKESPEARE = Path(__file__).parents[1] / "examples" / "shakespeare"
TEXTS = [
    "",
    "ROMEO:\nBut soft, what light through yonder window breaks?",
    "  spaces\t\ttabs\n\n\nlines  ",
    "naïve café — “quotes” … 漢字 🎭🏽",
    "<|turn|>JULIET:\nO Romeo<|end|>\n<|endoftext|>",
    "x" * 1000,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHAKESPEARE)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHAKESPEARE)


def test_encode_and_decode_equal_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.vocab_size == len(theirs) == 1024
    assert tokenizer.eos_ids == (0, 2) and tokenizer.bos_id is None
    assert tokenizer.special_ids == set(theirs.all_special_ids)


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("bos, eos", [(True, False), (True, True), (False, None), (None, True)])
def test_ends_equal_transformers(bos: Any, eos: Any, processor: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def edit(name: str, **changes: Any) -> None:
        values = json.loads((SHAKESPEARE / name).read_text())
        (tmp_path / name).write_text(json.dumps(values | changes))

    ends = {"add_bos_token": bos, "add_eos_token": eos}
    asked = {key: value for key, value in ends.items() if value is not None}
    edit("config.json")
    edit("tokenizer_config.json", bos_token="<|turn|>", **asked)
    edit("tokenizer.json", **({} if processor else {"post_processor": None}))
    expected = AutoTokenizer.from_pretrained(tmp_path).encode("Hark!")
    assert Tokenizer.load(tmp_path).encode("Hark!") == expected


CHATS = [
    [{"role": "user", "content": " Who goes there? "}],
    [{"role": "system", "content": "A street."}, {"role": "user", "content": "Hail!"}],
    [
        {"role": "user", "content": "Hail!", "name": "Mercutio"},
        {"role": "assistant", "content": "And you.\n\nSir."},
        {"role": "user", "content": "<b> & 'quotes' é"},
    ],
]


def test_chat_prompts_equal_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    for chat in CHATS:
        for prompt in (True, False):
            ours = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)
            assert ours == theirs.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
    with pytest.raises(RequestError, match="a play has the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
    for wrong in ("hi", None, [1], [{"role": "user", "content": object()}]):
        with pytest.raises(RequestError, match="messages: expected a list of objects"):
            tokenizer.apply_chat_template(wrong)  # type: ignore[arg-type]


# ruff: noqa: E501 - a template is one line
# What real templates use: loop controls, tojson, namespaces, macros, generation blocks, slices.
TEMPLATES = [
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}\n  {% set ns.n = ns.n + 1 %}\n{% endfor %}{{ ns.n }}",
    "{% macro t(m) -%}<{{ m['role'] ~ ':' ~ m.content | trim }}>{%- endmacro %}{{ t(messages[-1]) }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ eos_token }}{{ bos_token }}",
    "{% if tools %}T{% endif %}{% if documents is defined %}D{% endif %}{{ messages[::-1] | length }}",
    "{{ range(3) | join(',') }}{{ messages | map(attribute='role') | list }}{{ 'a' * 3 }}",
    "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}{{ 'A'.lower().strip() }}",
    "{% for k, v in messages[0].items() %}{{ loop.index0 }}{{ k }}{{ loop.last }}{% endfor %}",
    "{{ messages[0].content.split(' ')[0] + 'é<&>' }}{{ dict(a=1) | tojson }}{{ 7 % 4 }}{{ 2 ** 3 }}",
]  # fmt: skip


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_in_transformers(source: str, theirs: Any) -> None:
    for chat in CHATS:
        ours = ChatTemplate(source, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
        expected = theirs.apply_chat_template(
            chat, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        assert ours.render(chat) == expected


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ ([1] * 1000000) * 1000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ 'x' | indent(10 ** 9) }}",
    "{{ ['x', 'x'] | join('y' * 9999999) | replace('y', 'zzzzzzzz') | length }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].nothing.more }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end_in_a_request_error(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert time.perf_counter() - started < 5


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    copy = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert copy.encode(text) == tokenizer.encode(text)
    assert copy.eos_ids == tokenizer.eos_ids and copy.special_ids == tokenizer.special_ids
    assert copy.apply_chat_template(CHATS[2]) == tokenizer.apply_chat_template(CHATS[2])


def test_streams_add_up_and_never_show_half_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(index) for index in tokenizer.encode("🎭é漢")]
    assert "".join(pieces) == "🎭é漢" and stream.flush() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces) and "" in pieces
    half = tokenizer.stream()
    assert half.push(tokenizer.encode("🎭")[0]) == ""
    assert half.flush() == "\N{REPLACEMENT CHARACTER}"
    chooser = random.Random(0)
    for _ in range(500):  # what a model with random weights says
        ids = [chooser.randrange(1024) for _ in range(chooser.randrange(30))]
        stream = tokenizer.stream()
        text = "".join(stream.push(index) for index in ids) + stream.flush()
        assert text == tokenizer.decode(ids)


def test_streams_survive_bytes_that_take_text_back() -> None:
    """tokenizers' DecodeStream raises "Invalid prefix encountered" on such ids."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    class Bytes:
        texts_alone: ClassVar[dict[tuple[int, bool], str]] = {}

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return backend.decode(ids, skip_special_tokens=skip_special_tokens)

    stream = TokenStream(Bytes(), True)  # type: ignore[arg-type]
    text = "".join(stream.push(index) for index in (0x4C, 0xFF, 0x41, 0x42)) + stream.flush()
    assert text == "L" + 3 * "\N{REPLACEMENT CHARACTER}"


def test_text_that_is_no_text_is_a_request_error(tokenizer: Tokenizer) -> None:
    for bad in ("\ud800", b"x", None):
        with pytest.raises(RequestError, match="prompt"):
            tokenizer.encode(bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer((SHAKESPEARE / "tokenizer.json").read_bytes(),
                  {"special_tokens": {}, "eos_token_ids": []}, "x").apply_chat_template([])  # fmt: skip
