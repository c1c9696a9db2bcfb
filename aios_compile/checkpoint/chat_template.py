"""Render a model folder's chat template: Jinja in a sandbox, with its work and its output bounded.

The environment offers what transformers offers to templates. Jinja's sandbox keeps a template away
from Python's internals. On top of that, loop steps and calls are counted and strings are kept
short, so no template can use up the processor or the memory.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from aios_compile.errors import CheckpointError, RequestError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_STEPS = 200_000  # loop steps and calls of one rendering
MAX_CHARS = 16 << 20  # of any string in it
MAX_NUMBER = 1 << 20  # of an argument to a call or filter
WIDE = re.compile(r"\d{5}")  # a width in a format that could fill the memory


class ChatTemplate:
    """A compiled chat template. Rendering keeps no state and is safe from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"chat template of {len(source)} characters, at most {MAX_TEMPLATE_CHARS} allowed"
            )
        _template(source)  # a damaged template is found on loading

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a conversation. Raises RequestError with the template's reason."""
        template = _template(self.source)
        try:
            plain = json.loads(json.dumps([dict(message) for message in messages]))
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"messages: expected a list of objects with role and content ({str(error)[:200]})"
            ) from None
        try:
            return template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                steps=None,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"chat template: {str(error)[:500]}") from None
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"chat template: {type(error).__name__}: {error}") from None


def _template(source: str) -> jinja2.Template:
    """Compile anew: the counter of steps belongs to one rendering."""
    environment = _Environment()
    try:
        return environment.from_string(environment.bounded(source))
    except (jinja2.TemplateError, RecursionError) as error:
        raise CheckpointError(f"chat template is not valid Jinja: {str(error)[:500]}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training: its
    body.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.steps_left = MAX_STEPS
        self.filters = {name: self._limited(f) for name, f in self.filters.items()}
        self.filters["tojson"] = _tojson
        self.filters["aios_steps"] = self._steps
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def bounded(self, source: str) -> nodes.Template:
        """Parse, and count the steps of each loop and the characters of each `~`."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter(loop.iter, "aios_steps")
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [
                nodes.Call(nodes.Name("aios_short", "load"), [part], [], None, None)
                for part in concat.nodes
            ]
        self.globals["aios_short"] = self._short
        return tree.set_environment(self)  # type: ignore[return-value]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self._spend(1)
        _check_numbers((*args, *kwargs.values()))
        # args[1] is the function; the sandbox wraps str.format and str.format_map
        method = getattr(args[1], "__wrapped__", args[1])
        text = getattr(method, "__self__", None)
        if isinstance(text, str) and method.__name__.startswith("format"):
            _check_widths((text, *args[2:], *kwargs.values()))
        return self._short(super().call(*args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))]
        numbers = [abs(x) for x in (left, right) if isinstance(x, (int, float))]
        if operator == "*" and sizes and numbers and sizes[0] * numbers[0] > MAX_CHARS:
            raise jinja2.TemplateError("a string or list grows too long")
        if operator == "**" and numbers and max(numbers) > 1024:
            raise jinja2.TemplateError("a power grows too large")
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateError("% formatting is not available")
        return self._short(super().call_binop(context, operator, left, right))

    def _steps(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise jinja2.TemplateError(f"more than {MAX_STEPS} steps")

    def _short(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARS:
            raise jinja2.TemplateError("a string or list grows too long")
        if isinstance(value, int) and value.bit_length() > 4096:
            raise jinja2.TemplateError("a number grows too large")
        return value

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # copies the mark that asks for the context, too
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._spend(1)
            _check_numbers((*args, *kwargs.values()))
            if function.__name__ == "do_format":
                _check_widths(args)
            return self._short(function(*args, **kwargs))

        return limited


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


def _check_numbers(values: Iterable[Any]) -> None:
    """Refuse the widths and counts with which one call could fill the memory."""
    if any(isinstance(x, (int, float)) and abs(x) > MAX_NUMBER for x in values):
        raise jinja2.TemplateError(f"an argument over {MAX_NUMBER}")


def _check_widths(texts: Iterable[Any]) -> None:
    if any(isinstance(text, str) and WIDE.search(text) for text in texts):
        raise jinja2.TemplateError("a format with a width of five digits")


def _strftime_now(form: str) -> str:
    _check_widths((form,))
    return datetime.now().strftime(form)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump without escaping HTML, unlike Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
