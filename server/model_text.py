"""What of a checkpoint the front reads: its name, tokenizer, chat template and recommendations.

Knows the files of a model that are text; knows no weights, no engine and no requests but chats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from ..engine.errors import InvalidField, NotReady
from ..proto import inference_pb2 as pb
from .limits import check_number
from .validation import SamplingDefaults, check_chat

if TYPE_CHECKING:
    from .text.chat import ChatTemplate
    from .text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Read from one checkpoint."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: SamplingDefaults


@dataclass(slots=True)
class ModelText:
    """The model that is served, as text: replaced when another is loaded."""

    name: str = ""
    """What clients may ask for; empty without a model."""
    is_loaded: bool = False
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    edition: int = 0
    """Counts the models that were here: tokens belong to one of them."""

    def expect(self, name: str) -> None:
        """Another model is on its way, or none: what was known of the last one is forgotten."""
        self.name, self.is_loaded = name, False
        self.tokenizer = self.chat_template = None
        self.defaults = SamplingDefaults()
        self.edition += 1

    def take(self, files: TextFiles) -> None:
        """The model's own files have been read."""
        self.tokenizer, self.chat_template = files.tokenizer, files.chat_template
        self.defaults = files.defaults
        self.is_loaded = True

    def encoder(self, field: str = "prompt", way_out: str = "send token_ids") -> Tokenizer:
        """Raises NotReady, or InvalidField: `field` is what the text is needed for."""
        if not self.is_loaded:
            raise NotReady("the tokenizer is still loading" if self.name else "no model is loaded")
        if self.tokenizer is None:
            raise InvalidField(field, "text", "this model has no tokenizer.json", way_out)
        return self.tokenizer

    def chat_prompt(self, chat: pb.Chat) -> str:
        """The messages as the model wants to read them. Raises InvalidField."""
        check_chat(chat)
        if self.chat_template is None:
            hint = "send text or token_ids"
            raise InvalidField("chat", "given", "this model has no chat template", hint)
        adds = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        messages = [{"role": m.role, "content": m.content} for m in chat.messages]
        return self.chat_template.render(messages, adds)


def read_text(folder: Path) -> TextFiles:
    """Takes its time: for a thread. Raises CheckpointError."""
    chat, tokenizer = import_libraries()
    return TextFiles(
        tokenizer.load_tokenizer(folder),
        chat.load_chat_template(folder),
        load_sampling_defaults(folder),
    )


def import_libraries() -> tuple[ModuleType, ModuleType]:
    """Jinja and the tokenizers: nothing that ports should wait for, nor a load in a warm pool."""
    from .text import chat, tokenizer

    return chat, tokenizer


def load_sampling_defaults(folder: Path) -> SamplingDefaults:
    """What the model's authors recommend in generation_config.json, if anything usable."""
    path = folder / "generation_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        given = {name: found[name] for name in names if found.get(name) is not None}
        defaults = msgspec.convert(given, SamplingDefaults)
        for name in names:
            check_number(f"sampling.{name}", getattr(defaults, name))
        return defaults
    except (OSError, ValueError, AttributeError, InvalidField):
        return SamplingDefaults()
