"""Which model the front wants of its engine: one, none, or one that sleeps; and who waits for it.

Knows states and futures; knows no engine and no messages. A load that fails leaves wanted what was
wanted before, so that an engine that is started again never dies of the same model twice.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from msgspec.structs import replace

from .config import EngineConfig
from .errors import EngineDied, SetupError, WrongState
from .status import EngineState


class Order(StrEnum):
    """What an operator may order, by the names of the admin service's methods."""

    LOAD = "LoadModel"
    UNLOAD = "UnloadModel"
    SLEEP = "Sleep"
    WAKE = "Wake"


ALLOWED_IN = {
    Order.LOAD: (EngineState.STANDBY,),
    # What has been done already is done: whoever repeats an order after a lost answer gets one.
    Order.UNLOAD: (EngineState.READY, EngineState.SLEEPING, EngineState.STANDBY),
    Order.SLEEP: (EngineState.READY, EngineState.SLEEPING),
    Order.WAKE: (EngineState.SLEEPING, EngineState.READY),
}


def check_order(order: Order, state: EngineState) -> None:
    """Raises WrongState, which says what the state allows."""
    if state not in ALLOWED_IN[order]:
        allowed = [other.value for other, states in ALLOWED_IN.items() if state in states]
        raise WrongState(order, state.upper(), allowed)


class ModelSwitch:
    """One change at a time; the client sees to that by its state."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        """Of the model that is wanted or sleeps; without one, `model` is empty."""
        self._is_resting = not config.model
        """No model is to be in the engine."""
        self._before = self._config
        self._loading: asyncio.Future[None] | None = None
        self._unloading: asyncio.Future[None] | None = None

    @property
    def wanted(self) -> EngineConfig:
        """What an engine that starts now has to boot."""
        return replace(self._config, model="") if self._is_resting else self._config

    @property
    def resting(self) -> EngineState:
        """What an engine without a model is called."""
        return EngineState.SLEEPING if self._config.model else EngineState.STANDBY

    # ---- orders ------------------------------------------------------------------------------

    def load(self, config: EngineConfig) -> asyncio.Future[None]:
        """Wants this model. The future ends with `ready`, `stood_by` or `lost`."""
        self._before = self._config
        self._config, self._is_resting = config, False
        self._loading = _awaited_or_not()
        return self._loading

    def wake(self) -> asyncio.Future[None]:
        """Wants the model that sleeps."""
        return self.load(self._config)

    def unload(self, forgets: bool) -> asyncio.Future[None]:
        """Wants no model. The future ends with `stood_by`, also of an engine started meanwhile."""
        self._is_resting = True
        if forgets:
            self.forget()
        self._unloading = _awaited_or_not()
        return self._unloading

    def forget(self) -> None:
        """No model sleeps any more."""
        self._config = replace(self._config, model="")

    # ---- what became of them -----------------------------------------------------------------

    def ready(self) -> None:
        loading, self._loading = self._loading, None
        _end(loading)

    def stood_by(self, reason: str) -> None:
        """With a reason: the model that was wanted could not be loaded."""
        unloading, self._unloading = self._unloading, None
        _end(unloading)
        if self._loading is not None:
            self._give_up(SetupError(reason))

    def lost(self, reason: str) -> None:
        """The engine ended: a load ends with it, an unload is done by the engine that follows."""
        if self._loading is not None:
            self._give_up(EngineDied(reason))

    def over(self, reason: str) -> None:
        """No engine follows."""
        self.lost(reason)
        unloading, self._unloading = self._unloading, None
        _end(unloading, EngineDied(reason))

    def _give_up(self, error: Exception) -> None:
        self._config, self._is_resting = self._before, True
        loading, self._loading = self._loading, None
        _end(loading, error)


def _awaited_or_not() -> asyncio.Future[None]:
    """A future whose error may stay unread: whoever waited may have left."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _end(future: asyncio.Future[None] | None, error: Exception | None = None) -> None:
    if future is not None and not future.done():
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
