"""The one tree of errors, sorted by whom to blame. Knows nothing about gRPC statuses or exit codes.

PilotlightError
├── RequestError            the caller's request; the next request is not affected
│   ├── InvalidField        names the field, the value, the limit and the way out
│   ├── UnknownModel
│   ├── DuplicateRequest
│   ├── DeadlineExpired
│   ├── RequestCancelled
│   └── WrongState          an operator's order that the server's state does not allow
├── CapacityError           the moment; the same request may succeed later or elsewhere
│   ├── QueueFull
│   ├── NotReady
│   └── Draining
├── SetupError              the operator's command line, files or machine; one line, exit code 2
│   ├── ConfigError         a flag or a configuration file
│   ├── CheckpointError     files that are missing, truncated, misshapen
│   │   └── BadArtefact     an arena file that is not what was written
│   ├── SourceError         a place that checkpoints come from: not there, refused, wrong bytes
│   ├── NotEnoughDisk       found before the first byte is written, where that can be known
│   ├── CacheError          the folder of the weights cache cannot be read or written
│   ├── UnsupportedModel    a checkpoint that is well formed but cannot be run exactly
│   ├── PortInUse
│   └── NotEnoughMemory
└── EngineError             ours
    ├── EngineDied          carries how many tokens the stream had delivered
    └── RowFailed           one sequence could not be computed (NaN logits); its batch goes on
"""

from __future__ import annotations


class PilotlightError(Exception):
    """Base of every error that Pilotlight raises on purpose."""


class RequestError(PilotlightError):
    """The request itself is wrong or over; sending it again unchanged fails again."""


class InvalidField(RequestError):
    """`field` holds `value`, which breaks `limit`; `hint` says the way out."""

    def __init__(self, field: str, value: object, limit: str, hint: str = "") -> None:
        self.field = field
        self.value = _shown(value)
        self.limit = limit
        self.hint = hint
        super().__init__(f"{field} is {self.value}: {limit}" + (f"; {hint}" if hint else ""))


class UnknownModel(RequestError):
    """The request names a model that this server does not serve."""


class DuplicateRequest(RequestError):
    """A request with this id is still live."""


class DeadlineExpired(RequestError):
    """The caller's deadline passed, or would pass, before an answer."""


class RequestCancelled(RequestError):
    """The caller cancelled the request, or went away."""


class WrongState(RequestError):
    """The server's state does not allow what an operator ordered; the message says what it does."""

    def __init__(self, order: str, state: str, allowed: list[str]) -> None:
        self.state = state
        self.allowed = allowed
        ways = (
            f"it allows {', '.join(allowed)}" if allowed else "it allows no order; wait for its end"
        )
        super().__init__(f"{order} is not possible in state {state}: {ways}")


class CapacityError(PilotlightError):
    """The server cannot take the request now; `retry_after_s` is its own estimate."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class QueueFull(CapacityError):
    """An admission limit is reached: `quota` names it, `limit` is its value."""

    def __init__(self, quota: str, limit: int, retry_after_s: float = 1.0) -> None:
        self.quota = quota
        self.limit = limit
        super().__init__(f"{quota} is at its limit of {limit}", retry_after_s)


class NotReady(CapacityError):
    """The model is not ready: still loading, restarting or stalled."""


class Draining(CapacityError):
    """The server is shutting down and takes no new work."""


class SetupError(PilotlightError):
    """Pilotlight cannot start as asked. The message is one readable line."""


class ConfigError(SetupError):
    """A flag or a configuration file holds something unusable."""


class CheckpointError(SetupError):
    """Model files are missing, truncated, not safetensors, or not what config.json promises."""


class BadArtefact(CheckpointError):
    """An arena file is truncated, damaged, or of another format."""


class SourceError(SetupError):
    """A source of checkpoints cannot give what was asked; `hint` says the way out."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.hint = hint
        super().__init__(message + (f"; {hint}" if hint else ""))


class NotEnoughDisk(SetupError):
    """A file system has less room than is needed; the message names both and the way out."""


class CacheError(SetupError):
    """The folder of the weights cache cannot be used: not readable, damaged, of another version."""


class UnsupportedModel(SetupError):
    """The checkpoint asks for something Pilotlight would not compute exactly."""


class PortInUse(SetupError):
    """Another process listens on a port we were told to bind."""


class NotEnoughMemory(SetupError):
    """Not even one sequence would fit."""


class EngineError(PilotlightError):
    """The engine failed; not the caller's fault."""


class EngineDied(EngineError):
    """The engine process ended while a request was live."""

    def __init__(self, reason: str, num_tokens_sent: int = 0) -> None:
        self.reason = reason
        self.num_tokens_sent = num_tokens_sent
        super().__init__(f"the engine stopped ({reason}) after {num_tokens_sent} tokens")


class RowFailed(EngineError):
    """One sequence could not be computed; the others in its batch go on."""


def _shown(value: object) -> str:
    """A short form of a caller's value: never more than 80 characters come back."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
