"""The folder of a model's files: as it was named, or brought into the cache first.

Knows sources and the store; knows no tensors. What was fetched before is used as it is, and asks
nobody: `pilotlight cache add` looks for something newer.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..weights_cache.sources.source import Source
from ..weights_cache.store import Store
from .boot_report import BootReport
from .config import EngineConfig
from .errors import ConfigError
from .model_place import is_remote, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Located:
    """`in_use` keeps the files from eviction while it is entered."""

    folder: Path
    in_use: AbstractContextManager[None]


def locate(config: EngineConfig, report: BootReport) -> Located:
    """Raises ConfigError, SourceError, NotEnoughDisk or CacheError."""
    if not is_remote(config.model):
        return Located(Path(config.model), nullcontext())
    if not config.cache:
        raise ConfigError(
            f"MODEL is {shown(config.model)!r} and --cache is off: name a folder to fetch it into"
        )
    from ..weights_cache.sources.parse import parse_source

    with closing(parse_source(config.model)) as source:
        return _from_source(source, Store(Path(config.cache)), report)


def _from_source(source: Source, store: Store, report: BootReport) -> Located:
    from ..weights_cache.fetch import fetch, fetched_before

    found = fetched_before(source, store)
    if found is None:
        report("fetch", 0, 0, source.text)
        folder = source.local_folder()
        if folder is not None:
            return Located(folder, nullcontext())
        found = fetch(source, store, lambda done, total: report("fetch", done, total, source.text))
        fields = {"source": source.text, "bytes": found.num_bytes_moved}
        logger.info("the model is fetched", extra={"fields": fields})
    return Located(found.folder, store.lease(f"source-{found.slug}"))
