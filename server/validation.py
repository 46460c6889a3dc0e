"""From a GenerateRequest to what the engine needs, or InvalidField. Knows the model's facts.

Admission stands in the middle: everything that needs no tokenizer is looked at before, the prompt's
tokens after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message

from ..engine.errors import InvalidField, UnknownModel
from ..engine.messages import ModelFacts
from ..engine.sampling_params import SamplingParams
from ..proto import inference_pb2 as pb
from .limits import DEFAULT_MAX_TOKENS, Size, check_number, check_size


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """From the model's generation_config.json; ours where it says nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What the front does with the tokens."""

    stop_strings: list[str] = field(default_factory=list)
    include_stop_string: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    """Stop strings are not looked for in the text of so many tokens."""


def check_model_name(requested: str, served: str) -> None:
    if requested and requested != served:
        raise UnknownModel(f"this server serves {served!r}, not {requested!r}")


def check_ids(request: pb.GenerateRequest) -> None:
    """The names a caller may give: bounded, so that logs and tables stay so."""
    check_size("request_id", len(request.request_id.encode()))
    check_size("cache_salt", len(request.cache_salt.encode()))


def sampling_params(
    request: pb.GenerateRequest, facts: ModelFacts, defaults: SamplingDefaults, seed: int
) -> SamplingParams:
    """All of sampling, stop and output. `seed` is for requests that bring none."""
    s, stop, out = request.sampling, request.stop, request.output
    biases = _logit_bias(s, facts.vocab_size)
    max_tokens, min_tokens = _token_counts(stop, facts.context_len)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_number(s, "sampling.temperature", defaults.temperature),
        top_k=_integer(s, "sampling.top_k", defaults.top_k),
        top_p=_number(s, "sampling.top_p", defaults.top_p),
        min_p=_number(s, "sampling.min_p", 0.0),
        repetition_penalty=_number(s, "sampling.repetition_penalty", defaults.repetition_penalty),
        presence_penalty=_number(s, "sampling.presence_penalty", 0.0),
        frequency_penalty=_number(s, "sampling.frequency_penalty", 0.0),
        logit_bias=biases,
        seed=s.seed if s.HasField("seed") else seed,
        n=_integer(s, "sampling.n", 1),
        num_logprobs=_integer(out, "output.logprobs", -1),
        stop_token_ids=_stop_token_ids(stop, facts.vocab_size),
        ignore_eos=stop.ignore_eos,
    )


def text_options(request: pb.GenerateRequest) -> TextOptions:
    stop, out = request.stop, request.output
    check_size("stop.strings", len(stop.strings))
    for i, string in enumerate(stop.strings):
        check_size(f"stop.strings[{i}]", len(string.encode()), "stop.strings[]")
    skips = out.skip_special_tokens if out.HasField("skip_special_tokens") else True
    return TextOptions(list(stop.strings), stop.include_stop_string, skips, stop.min_tokens)


def check_chat(chat: pb.Chat) -> None:
    check_size("chat.messages", len(chat.messages))
    for i, message in enumerate(chat.messages):
        name = f"chat.messages[{i}].role"
        check_size(name, len(message.role.encode()), "chat.messages[].role")


def check_prompt_ids(token_ids: Sequence[int], facts: ModelFacts) -> None:
    """The prompt must leave room for at least one token, and be of this vocabulary."""
    check_prompt_length(len(token_ids), facts)
    check_token_ids("token_ids", token_ids, facts.vocab_size)


def check_prompt_length(num_tokens: int, facts: ModelFacts) -> None:
    if num_tokens == 0:
        raise InvalidField("prompt", "empty", "must have at least 1 token", "send some text")
    if num_tokens >= facts.context_len:
        raise InvalidField(
            "prompt",
            Size(num_tokens, "tokens"),
            f"must be at most {facts.context_len - 1} tokens: the context is {facts.context_len}",
            "shorten it, or serve with a larger --max-model-len if the model allows",
        )


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for i, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            limit = f"must be 0 to {vocab_size - 1}, this model's vocabulary"
            raise InvalidField(f"{name}[{i}]", token_id, limit)


def check_prompt_text(text: str, max_chars: int, facts: ModelFacts) -> None:
    """What can be seen without tokenising."""
    if not text:
        check_prompt_length(0, facts)
    if len(text) > max_chars:
        limit = f"cannot fit into this server's context of {facts.context_len} tokens"
        raise InvalidField("prompt", Size(len(text), "characters"), limit, "shorten it")


def _number(options: Message, name: str, default: float) -> float:
    leaf = name.rpartition(".")[2]
    if not options.HasField(leaf):
        return default
    value = getattr(options, leaf)
    check_number(name, value)
    return float(value)


def _integer(options: Message, name: str, default: int) -> int:
    return int(_number(options, name, default))


def _logit_bias(sampling: pb.SamplingOptions, vocab_size: int) -> dict[int, float]:
    check_size("sampling.logit_bias", len(sampling.logit_bias))
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < vocab_size:
            limit = f"must be 0 to {vocab_size - 1}, this model's vocabulary"
            raise InvalidField("sampling.logit_bias key", token_id, limit)
        check_number(f"sampling.logit_bias[{token_id}]", bias, "sampling.logit_bias[]")
    return dict(sampling.logit_bias)


def _token_counts(stop: pb.StopOptions, context_len: int) -> tuple[int, int]:
    """max_tokens and min_tokens. What the prompt leaves of the context is not known yet."""
    max_tokens = _integer(stop, "stop.max_tokens", min(DEFAULT_MAX_TOKENS, context_len))
    if max_tokens > context_len:
        limit = f"must be at most {context_len}, this server's context"
        raise InvalidField("stop.max_tokens", max_tokens, limit)
    min_tokens = _integer(stop, "stop.min_tokens", 0)
    if min_tokens > max_tokens:
        raise InvalidField(
            "stop.min_tokens", min_tokens, f"must be at most max_tokens, {max_tokens}"
        )
    return max_tokens, min_tokens


def _stop_token_ids(stop: pb.StopOptions, vocab_size: int) -> tuple[int, ...]:
    check_size("stop.token_ids", len(stop.token_ids))
    check_token_ids("stop.token_ids", stop.token_ids, vocab_size)
    return tuple(stop.token_ids)
