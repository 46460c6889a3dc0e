"""What `pilotlight serve` can be told: one table for flags, TOML and --help.

Knows argparse and TOML; the only place where configuration is read. A flag wins over the file, the
file over the default. `PILOTLIGHT_CACHE` is the one environment variable.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..engine.config import EngineConfig, SupervisionPolicy
from ..engine.errors import ConfigError
from ..engine.logs import LEVELS
from ..engine.model_place import default_name
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
    max_decode_slowdown: float = 2.5
    kv_cache_bytes: int = 0
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    prefix_cache: bool = True
    speculative: str = "auto"
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
            kv_cache_bytes=self.kv_cache_bytes,
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=self.block_size,
            prefix_cache=self.prefix_cache,
            speculative=self.speculative,
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


@dataclass(frozen=True, slots=True)
class Option:
    """One field of ServeConfig as a flag: `--` and the name with dashes."""

    name: str
    group: str
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 2**62
    is_size: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def default(self) -> Any:
        return getattr(ServeConfig(), self.name)


OPTIONS = (
    Option(
        "model_name",
        "model",
        "name that clients may ask for (default: the folder's, or org/name)",
        "NAME",
    ),
    Option(
        "standby",
        "model",
        "start without a model, with everything else done: LoadModel on the admin port brings one "
        "in little more than the time its bytes take",
    ),
    Option(
        "device",
        "model",
        "where to run; auto: CUDA if there is a usable device, else the CPU",
        choices=("auto", "cpu", "cuda"),
    ),
    Option(
        "dtype",
        "model",
        "of weights, and of the cache unless --kv-cache-dtype says otherwise; auto is the "
        "checkpoint's own on CUDA, and bfloat16 on a CPU that multiplies it, else float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    ),
    Option(
        "head_dtype",
        "model",
        "of the last product's matrix (lm_head); auto: as in the checkpoint; int8: rounded when "
        "weights are packed, for fewer bytes a token, results change a little",
        choices=("auto", "int8"),
    ),
    Option(
        "num_threads",
        "model",
        "CPU threads of the engine; 0: one for each core that this process, or its cgroup, may use",
        "N",
        high=4096,
    ),
    Option(
        "cache",
        "model",
        "folder of the weights cache, which later boots map; off: none "
        "(default: $PILOTLIGHT_CACHE, else the user's cache folder)",
        "DIR",
    ),
    Option(
        "verify",
        "model",
        "hashes of an artefact's chunks: full: checked before READY; lazy: behind it; off",
        choices=("full", "lazy", "off"),
    ),
    Option(
        "max_model_len",
        "capacity",
        "most tokens of one sequence, prompt and output; 0: as "
        "many as the model has and the cache holds",
        "TOKENS",
        high=1 << 24,
    ),
    Option("max_num_seqs", "capacity", "most sequences computed at once", "N", low=1, high=4096),
    Option(
        "max_batched_tokens",
        "capacity",
        "token budget of one step: decodes and prompt chunks together",
        "TOKENS",
        low=1,
        high=1 << 20,
    ),
    Option(
        "max_decode_slowdown",
        "capacity",
        "while sequences decode, a prompt gets as many tokens a step as keep it within so many "
        "times its length without prompts; several prompts get more. Higher: sooner first tokens, "
        "less even streams; 0: no limit",
        "TIMES",
        high=1000,
    ),
    Option(
        "kv_cache_bytes",
        "capacity",
        "memory of the KV cache, as 512MiB or 4GiB; 0: chosen from what is free",
        "BYTES",
        is_size=True,
    ),
    Option(
        "kv_cache_dtype",
        "capacity",
        "of keys and values; auto: that of the weights; int8, with a scale for each token's heads: "
        "about twice as many tokens of bfloat16 in the same memory, results change a little",
        choices=("auto", "int8"),
    ),
    Option(
        "block_size", "capacity", "tokens in one block of the KV cache", "TOKENS", low=1, high=1024
    ),
    Option("prefix_cache", "capacity", "let requests share the blocks of equal prompt beginnings"),
    Option(
        "speculative",
        "capacity",
        "guess tokens from a sequence's own text and check the guesses in one step: the same "
        "answers, sooner where texts repeat; ngram: guess whatever followed the newest tokens "
        "before; auto: only where that is likely to pay; off",
        choices=("auto", "ngram", "off"),
    ),
    Option("host", "network", "address of the data port (gRPC)", "HOST"),
    Option("port", "network", "data port; 0: a free one, printed at start", "PORT", high=65535),
    Option("ops_host", "network", "address of the ops port (default: that of --host)", "HOST"),
    Option(
        "ops_port",
        "network",
        "HTTP port of /metrics /livez /readyz /startup; 0: a free one",
        "PORT",
        high=65535,
    ),
    Option(
        "admin_port",
        "network",
        "port on 127.0.0.1 for LoadModel, UnloadModel, Sleep and Wake; 0: a free one; -1: none",
        "PORT",
        low=-1,
        high=65535,
    ),
    Option(
        "max_queued_requests",
        "admission",
        "most requests in the server, running and waiting, "
        "each sample counted; more get RESOURCE_EXHAUSTED; 0: four times --max-num-seqs",
        "N",
    ),
    Option(
        "max_queued_tokens",
        "admission",
        "most prompt tokens that wait to be computed; 0: as many as the KV cache holds",
        "TOKENS",
    ),
    Option(
        "drain_timeout",
        "life",
        "seconds that running streams get to finish after SIGTERM",
        "SECONDS",
        high=86400,
    ),
    Option(
        "drain_lag",
        "life",
        "seconds after SIGTERM during which new requests are still taken "
        "while readiness is already off, for load balancers that look rarely",
        "SECONDS",
        high=3600,
    ),
    Option(
        "on_engine_failure",
        "life",
        "restart the engine process, or exit so that an orchestrator does",
        choices=("restart", "exit"),
    ),
    Option(
        "restart_backoff",
        "life",
        "seconds before the first restart; doubled at each one in a row",
        "SECONDS",
        high=3600,
    ),
    Option("max_restarts", "life", "restarts in a row before the server gives up", "N", high=1000),
    Option(
        "heartbeat_timeout",
        "life",
        "seconds without a sign of life until readiness is off",
        "SECONDS",
        low=0.2,
        high=3600,
    ),
    Option(
        "stall_kill",
        "life",
        "seconds a stalled engine gets before it is killed",
        "SECONDS",
        high=86400,
    ),
    Option("log_level", "life", "least level that is logged", choices=LEVELS),
)

GROUPS = {
    "model": "the model and where it runs",
    "capacity": "how much runs at once",
    "network": "ports",
    "admission": "who comes in",
    "life": "life and death",
}


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
    kind = type(option.default)
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
