"""One sample of a request: its tokens become text, and stop strings end it. Knows no gRPC calls.

Turns engine outputs into chunks of the wire contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from ..engine.messages import FinishReason, Output
from ..proto import inference_pb2 as pb
from .text.detokenizer import Detokenizer
from .text.stop_strings import StopStrings
from .validation import TextOptions

if TYPE_CHECKING:
    from .text.tokenizer import Tokenizer


class Sample:
    """Feeds on outputs in order; `is_ended` after the chunk that has a finish reason."""

    def __init__(
        self, request_id: str, index: int, options: TextOptions, tokenizer: Tokenizer | None
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.is_ended = False
        self.error = ""
        self._request_id = request_id
        self._hides_stop_token = options.skip_special_tokens
        self._has_stops = bool(options.stop_strings)
        self._min_tokens = options.min_tokens
        self._stops = StopStrings(options.stop_strings, options.include_stop_string)
        self._detokenizer = (
            Detokenizer(tokenizer, options.skip_special_tokens) if tokenizer else None
        )

    def chunk(self, outputs: list[Output]) -> pb.GenerateChunk | None:
        """What `outputs`, some in a row, bring together; None when the sample had ended."""
        if self.is_ended:
            return None
        chunk = pb.GenerateChunk(request_id=self._request_id, index=self.index)
        for output in _token_by_token(outputs) if self._has_stops else outputs:
            if self._take(output, chunk):
                break
        chunk.num_output_tokens = self.num_tokens
        return chunk

    def stopped_itself(self) -> bool:
        """A stop string was found here: the engine does not know yet."""
        return self._stops.matched is not None

    def _take(self, output: Output, chunk: pb.GenerateChunk) -> bool:
        """True when this was the sample's last."""
        chunk.token_ids.extend(output.token_ids)
        self.num_tokens += len(output.token_ids)
        self._add_logprobs(output, chunk)
        text = self._text(output)
        is_early = self.num_tokens <= self._min_tokens
        chunk.text += text if is_early else self._stops.feed(text)
        if self.stopped_itself():
            self._end(chunk, FinishReason.STOP)
            chunk.stop_string = self._stops.matched or ""
        elif output.finish_reason is not FinishReason.NONE:
            self._finish(output, chunk)
        return self.is_ended

    def _finish(self, output: Output, chunk: pb.GenerateChunk) -> None:
        self.error = output.error
        if self._detokenizer:
            chunk.text += self._stops.feed(self._detokenizer.finish())
        chunk.text += self._stops.finish()
        self._end(chunk, output.finish_reason)
        if output.finish_reason is FinishReason.STOP:
            chunk.stop_token_id = output.stop_token_id

    def _end(self, chunk: pb.GenerateChunk, reason: FinishReason) -> None:
        self.is_ended = True
        chunk.finish_reason = int(reason)  # type: ignore[assignment]

    def _text(self, output: Output) -> str:
        token_ids = output.token_ids
        if output.stop_token_id >= 0 and self._hides_stop_token:
            token_ids = token_ids[:-1]
        return self._detokenizer.feed(token_ids) if self._detokenizer and token_ids else ""

    def _add_logprobs(self, output: Output, chunk: pb.GenerateChunk) -> None:
        if output.logprobs is None or output.top_logprobs is None:
            return
        rows = zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True)
        for token_id, logprob, top in rows:
            entry = chunk.logprobs.add(token_id=token_id, logprob=logprob)
            for other in top:
                entry.top.add(token_id=other.token_id, logprob=other.logprob)


def _token_by_token(outputs: list[Output]) -> Iterator[Output]:
    """A step can bring several tokens: those behind a stop string must not be counted."""
    for output in outputs:
        *others, last = range(len(output.token_ids) or 1)
        for i in others:
            yield _part(output, i, Output(output.request_id, output.index, []))
        yield _part(output, last, msgspec.structs.replace(output))


def _part(whole: Output, i: int, part: Output) -> Output:
    """`part` with the one token, if there is one, that is number `i` of the whole."""
    part.token_ids = whole.token_ids[i : i + 1]
    if whole.logprobs is not None and whole.top_logprobs is not None:
        part.logprobs = whole.logprobs[i : i + 1]
        part.top_logprobs = whole.top_logprobs[i : i + 1]
    return part
