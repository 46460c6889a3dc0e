"""What `pilotlight serve` was told: flags and TOML, checked against one table (options.py).

Knows TOML; the only place where configuration is read. A flag wins over the file, the
file over the default. `PILOTLIGHT_CACHE` is the one environment variable.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..engine.config import EngineConfig, SupervisionPolicy
from ..engine.errors import ConfigError
from ..engine.model_place import default_name
from .options import OPTIONS, Option
from .sizes import size_bytes

NO_CACHE = "off"
DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Every option of `serve`, by the name of its flag. Meanings: see OPTIONS."""

    model: str = str(DEMO_MODEL)
    model_name: str = ""
    standby: bool = False
    host: str = "127.0.0.1"
    port: int = 50051
    ops_host: str = ""
    ops_port: int = 9464
    admin_port: int = -1
    device: str = "auto"
    dtype: str = "auto"
    head_dtype: str = "auto"
    num_threads: int = 0
    cache: str = ""
    verify: str = "full"
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    max_decode_slowdown: float = 2.0
    max_overtaking: float = 1.0
    kv_cache_bytes: int = 0
    kv_cache_dtype: str = "auto"
    gpu_memory_fraction: float = 0.9
    gpu_memory_bytes: int = 0
    block_size: int = 16
    attention: str = "auto"
    prompt_attention: str = "auto"
    deterministic: bool = False
    prefix_cache: bool = True
    speculative: str = "auto"
    overlap: str = "auto"
    max_queued_requests: int = 0
    max_queued_tokens: int = 0
    drain_timeout: float = 30.0
    drain_lag: float = 0.0
    on_engine_failure: str = "restart"
    max_restarts: int = 5
    restart_backoff: float = 0.5
    heartbeat_timeout: float = 3.0
    stall_kill: float = 10.0
    log_level: str = "info"

    def engine(self) -> EngineConfig:
        return EngineConfig(
            model="" if self.standby else self.model,
            device=self.device,
            dtype=self.dtype,
            head_dtype=self.head_dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_batched_tokens=self.max_batched_tokens,
            max_decode_slowdown=self.max_decode_slowdown,
            max_overtaking=self.max_overtaking,
            kv_cache_bytes=self.kv_cache_bytes,
            kv_cache_dtype=self.kv_cache_dtype,
            gpu_memory_fraction=self.gpu_memory_fraction,
            gpu_memory_bytes=self.gpu_memory_bytes,
            block_size=self.block_size,
            attention=self.attention,
            prompt_attention=self.prompt_attention,
            deterministic=self.deterministic,
            prefix_cache=self.prefix_cache,
            speculative=self.speculative,
            overlap=self.overlap,
            num_threads=self.num_threads,
            heartbeat_interval_s=min(0.25, self.heartbeat_timeout / 4),
            cache="" if self.cache == NO_CACHE else self.cache or str(cache_root()),
            verify=self.verify,
            log_level=self.log_level,
        )

    def policy(self) -> SupervisionPolicy:
        return SupervisionPolicy(
            restarts=self.on_engine_failure == "restart",
            max_restarts=self.max_restarts,
            restart_backoff_s=self.restart_backoff,
            heartbeat_timeout_s=self.heartbeat_timeout,
            stall_kill_s=self.stall_kill,
        )

    @property
    def served_name(self) -> str:
        """Empty while there is no model."""
        return "" if self.standby else self.model_name or default_name(self.model)


def default_of(option: Option) -> Any:
    return getattr(ServeConfig(), option.name)


def serve_config(flags: Mapping[str, Any], file: Path | None) -> ServeConfig:
    """Merges the flags that were given over the file. Raises ConfigError."""
    values = {**(read_toml(file) if file else {}), **flags}
    checked = {name: _checked(name, value) for name, value in values.items()}
    config = ServeConfig(**checked)
    if config.max_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max-batched-tokens is {config.max_batched_tokens}: it must be at least "
            f"--max-num-seqs ({config.max_num_seqs}), one token for each running sequence"
        )
    if 0 < config.max_decode_slowdown < 1:
        raise ConfigError(
            f"--max-decode-slowdown is {config.max_decode_slowdown}: a step with a prompt takes at "
            "least as long as one without, 1; 0: no limit"
        )
    if config.standby and config.model != ServeConfig().model:
        raise ConfigError(f"--standby starts without a model, but MODEL is {config.model!r}")
    if config.standby and config.admin_port < 0:
        raise ConfigError("--standby needs --admin-port: nothing else can load a model")
    return config


def loaded_config(config: ServeConfig, values: Mapping[str, Any]) -> ServeConfig:
    """`config` as it would have been with these options and a model. Raises ConfigError."""
    checked = {name: _checked(name, value) for name, value in values.items()}
    return msgspec.structs.replace(config, **checked, standby=False)


def read_toml(path: Path) -> dict[str, Any]:
    """Keys are the flags' names, with dashes or underscores, and `model`."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    return {_known(key, path): value for key, value in table.items()}


def _known(key: str, path: Path) -> str:
    name = key.replace("-", "_")
    names = ServeConfig.__struct_fields__
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ""
    raise ConfigError(f"--config {path}: unknown key {key!r}{hint}")


def _checked(name: str, value: Any) -> Any:
    option = next((option for option in OPTIONS if option.name == name), None)
    if option is None:  # the model's path
        if not isinstance(value, str):
            raise ConfigError(f"{name} is {value!r}: must be of type str")
        return value
    if option.is_size:
        value = size_bytes(option.flag, value)
    kind = type(default_of(option))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{option.flag} is {value!r}: must be of type {kind.__name__}")
    if option.choices and value not in option.choices:
        raise ConfigError(f"{option.flag} is {value!r}: must be one of {', '.join(option.choices)}")
    if kind in (int, float) and not option.low <= value <= option.high:
        raise ConfigError(
            f"{option.flag} is {value!r}: must be {option.low:g} to {option.high:.12g}"
        )
    return value


def cache_root() -> Path:
    """Where artefacts are kept: $PILOTLIGHT_CACHE, else the user's cache folder."""
    chosen = os.environ.get("PILOTLIGHT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pilotlight"
