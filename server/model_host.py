"""The model of this server: its weights in the engine and its text here, changed together.

Knows the engine's client and the text's files; knows no gRPC. One order at a time: who orders
meanwhile is refused, and who leaves does not stop what was ordered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..engine.client import EngineClient
from ..engine.errors import PilotlightError, SetupError, WrongState
from ..engine.model_place import is_remote
from ..engine.model_switch import Order, check_order
from ..engine.status import EngineState, EngineStatus
from .config import ServeConfig, loaded_config
from .lifecycle import Lifecycle
from .model_text import ModelText, TextFiles, import_libraries, read_text

logger = logging.getLogger(__name__)


class ModelHost:
    """Loads, unloads, puts to sleep and wakes."""

    def __init__(
        self, config: ServeConfig, engine: EngineClient, text: ModelText, lifecycle: Lifecycle
    ) -> None:
        self._config = config
        self._engine = engine
        self._text = text
        self._lifecycle = lifecycle
        self._is_busy = not config.standby
        """An order is under way; the first is the command line's."""

    @property
    def status(self) -> EngineStatus:
        return self._engine.status

    @property
    def lifecycle(self) -> Lifecycle:
        return self._lifecycle

    async def read_first_text(self) -> None:
        """Of the command line's model, if there is one: a mistake in it ends the server."""
        if self._config.standby:
            await asyncio.to_thread(import_libraries)
            return
        try:
            files, read_s = await self._read(self._config)
            self._text.take(files)
        except SetupError as error:
            self._engine.fail_setup(str(error))
            return
        self._is_busy = False
        await self._lifecycle.text_loaded(read_s)

    # ---- orders ------------------------------------------------------------------------------

    async def load(self, options: Mapping[str, Any]) -> None:
        """`options` of ServeConfig. Raises SetupError, WrongState or EngineDied, as all orders."""
        config = loaded_config(self._config, options)
        await self._obey(Order.LOAD, self._load(config))

    async def unload(self) -> None:
        await self._obey(Order.UNLOAD, self._unload())

    async def sleep(self) -> None:
        await self._obey(Order.SLEEP, self._engine.sleep())

    async def wake(self) -> None:
        await self._obey(Order.WAKE, self._engine.wake())

    async def _obey(self, order: Order, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in a task of its own, to its end whatever becomes of the caller."""
        if self._is_busy or self._lifecycle.is_draining:
            work.close()
            raise WrongState(order, self._lifecycle.state_name, [])
        self._is_busy = True
        task = asyncio.create_task(self._finish(order, work), name=f"admin-{order}")
        task.add_done_callback(_note_read)
        await asyncio.shield(task)

    async def _finish(self, order: Order, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
            logger.info("%s is done", order)
        except WrongState:
            raise
        except PilotlightError as error:
            logger.warning("%s failed: %s", order, error)
            raise
        finally:
            self._is_busy = False
            await self._lifecycle.settle()

    async def _unload(self) -> None:
        await self._engine.unload()
        self._text.expect("")

    async def _load(self, config: ServeConfig) -> None:
        check_order(Order.LOAD, self._engine.status.state)
        self._text.expect(config.served_name)
        reading = asyncio.create_task(self._read(config))
        reading.add_done_callback(_note_read)
        try:
            await self._engine.load(config.engine())
            files, read_s = await reading
            self._text.take(files)
        except PilotlightError:
            reading.cancel()
            await self._rest_again()
            self._text.expect("")
            raise
        await self._lifecycle.text_loaded(read_s)

    async def _rest_again(self) -> None:
        """After half a load: the engine may have its half, or be on its way to standby."""
        async for status in self._engine.status_changes():
            if status.state is EngineState.READY:
                with suppress(PilotlightError):
                    await self._engine.unload()
            elif status.state in (EngineState.STANDBY, EngineState.STOPPED, EngineState.FAILED):
                return

    async def _read(self, config: ServeConfig) -> tuple[TextFiles, float]:
        """The text, and when it was there: time.monotonic()."""
        is_here = not is_remote(config.model)
        folder = config.model if is_here else await self._folder()
        files = await asyncio.to_thread(read_text, Path(folder))
        return files, time.monotonic()

    async def _folder(self) -> str:
        """Of the files that the engine fetches; for ever where it cannot."""
        async for status in self._engine.status_changes():
            if status.folder:
                return status.folder
        raise AssertionError("status changes never end")


def _note_read(task: asyncio.Task[Any]) -> None:
    """Whoever waited may have left: then nobody else takes the error."""
    if not task.cancelled():
        task.exception()
