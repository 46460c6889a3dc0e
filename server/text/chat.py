"""Chat messages to a prompt, with the model's own template in a sandbox. Knows no tokens.

A template is a program that came with the weights: it runs in Jinja's immutable sandbox, sees
nothing but the messages, and is bounded in its output, its loops and the numbers it makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...engine.errors import CheckpointError, InvalidField
from ..limits import MAX_MESSAGE_BYTES, Size

MAX_PROMPT_CHARS = 2 * MAX_MESSAGE_BYTES
MAX_LOOP_STEPS = 1_000_000
"""Of all loops together: a fraction of a second. Messages are at most a thousand."""
MAX_NUMBER_BITS = 1024
LOOP_FILTER, STEPS_LEFT = "loop steps", "steps left of all loops"
"""Names that no template can spell."""


class TemplateRefusal(TemplateError):
    """The template called raise_exception: these messages are not for it."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, and no loop without end, no number or text that fills the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, LOOP_FILTER, [], [], None, None)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _num_bits(operator, left, right) > MAX_NUMBER_BITS:
            raise TemplateRefusal(f"it makes a number of more than {MAX_NUMBER_BITS} bits")
        if operator == "*" and _num_items(left, right) > MAX_PROMPT_CHARS:
            raise TemplateRefusal(f"it repeats something beyond {MAX_PROMPT_CHARS} characters")
        return super().call_binop(context, operator, left, right)


def _num_bits(operator: str, left: object, right: object) -> int:
    """At most, of a product or a power of integers."""
    if not (isinstance(left, int) and isinstance(right, int)):
        return 0
    bits = left.bit_length()
    return bits * abs(right) if operator == "**" else bits + right.bit_length()


def _num_items(left: object, right: object) -> int:
    """Of a text or list that is multiplied by a number."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, (str, list, tuple)) and isinstance(times, int):
            return len(items) * times
    return 0


@pass_context
def _counted(context: Context, items: Iterable[object]) -> Iterator[object]:
    """The items, until the steps that all loops of this rendering share are used up."""
    steps_left = context[STEPS_LEFT]
    for item in items:
        if next(steps_left, None) is None:
            raise TemplateRefusal(f"its loops take more than {MAX_LOOP_STEPS} steps")
        yield item


class ChatTemplate:
    """One model's template, compiled once."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters[LOOP_FILTER] = _counted
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Raises InvalidField where the template refuses the messages or fails on them."""
        pieces = self._template.generate(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
            **{STEPS_LEFT: iter(range(MAX_LOOP_STEPS))},
        )
        try:
            return "".join(_bounded(pieces))
        except Exception as error:
            limit = f"the model's chat template refuses them: {error}"
            size = Size(len(messages), "messages")
            raise InvalidField("chat.messages", size, limit) from error


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise TemplateRefusal(f"its output is longer than {MAX_PROMPT_CHARS} characters")
        yield piece


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """From chat_template.jinja or tokenizer_config.json; None where the model has none."""
    config = _tokenizer_config(folder)
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        return ChatTemplate(source, _special_tokens(config)) if isinstance(source, str) else None
    except (OSError, ValueError, TemplateError) as error:
        raise CheckpointError(f"the chat template in {folder} cannot be read: {error}") from error


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, …: strings, or objects with `content`."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _tojson(value: object, indent: int | None = None) -> str:
    """As transformers defines it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)
