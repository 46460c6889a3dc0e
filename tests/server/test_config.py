"""Flags, TOML and defaults say the same, and mistakes in them are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pilotlight import cli
from pilotlight.engine.errors import ConfigError
from pilotlight.server import start
from pilotlight.server.config import (
    DEMO_MODEL,
    ServeConfig,
    cache_root,
    default_of,
    loaded_config,
    serve_config,
)
from pilotlight.server.options import GROUPS, OPTIONS, Option
from pilotlight.server.sizes import size_bytes

BY_NAME = {option.name: option for option in OPTIONS}
NEEDS = {"standby": {"admin_port": 0}}
"""Options that make sense only beside another."""


def _other_value(option: Option) -> Any:
    """One that is allowed and not the default."""
    default = default_of(option)
    if option.choices:
        return next(choice for choice in option.choices if choice != default)
    match default:
        case bool():
            return not default
        case int():
            return default + 1
        case float():
            return default + 0.5 if default + 0.5 <= option.high else default / 2
    return "other"


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _as_flags(option: Option, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option.flag if value else option.flag.replace("--", "--no-")]
    return [option.flag, str(value)]


@pytest.fixture
def from_flags(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServeConfig]:
    """The configuration that `pilotlight serve` would run with."""
    configs: list[ServeConfig] = []

    def note(config: ServeConfig, spawned: object) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(start, "main", note)

    def parse(*arguments: str) -> ServeConfig:
        assert cli.main(["serve", *arguments]) == 0
        return configs.pop()

    return parse


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return path

    return write


# ---- the same everywhere -----------------------------------------------------------------------


def test_every_field_is_an_option_and_every_option_a_field() -> None:
    assert {"model", *BY_NAME} == set(ServeConfig.__struct_fields__)
    assert len(BY_NAME) == len(OPTIONS)
    assert {option.group for option in OPTIONS} == set(GROUPS)


def test_the_names_that_others_script_against() -> None:
    flags = {option.flag for option in OPTIONS}
    assert flags >= {
        "--host", "--port", "--ops-port", "--device", "--dtype", "--max-model-len",
        "--max-num-seqs", "--max-batched-tokens", "--kv-cache-bytes", "--drain-timeout",
        "--on-engine-failure",
    }  # fmt: skip
    assert BY_NAME["device"].choices == ("auto", "cpu", "cuda")
    assert BY_NAME["dtype"].choices == ("auto", "bfloat16", "float16", "float32")
    assert BY_NAME["on_engine_failure"].choices == ("restart", "exit")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_flag_and_a_key_say_the_same(
    name: str, from_flags: Callable[..., ServeConfig], toml: Callable[[str], Path]
) -> None:
    option = BY_NAME[name]
    value = _other_value(option)
    beside = NEEDS.get(name, {})
    expected = ServeConfig(**{name: value}, **beside)
    flags = [part for n, v in beside.items() for part in _as_flags(BY_NAME[n], v)]
    assert from_flags(*_as_flags(option, value), *flags) == expected
    keys = "".join(f"{n} = {_as_toml(v)}\n" for n, v in beside.items())
    for key in (name, name.replace("_", "-")):
        assert serve_config({}, toml(f"{keys}{key} = {_as_toml(value)}")) == expected


def test_without_flags_and_file_there_are_the_defaults(
    from_flags: Callable[..., ServeConfig],
) -> None:
    assert from_flags() == ServeConfig()
    assert from_flags().model == str(DEMO_MODEL)


def test_the_model_is_an_argument_or_a_key(
    from_flags: Callable[..., ServeConfig], toml: Callable[[str], Path]
) -> None:
    path = toml('model = "/models/a"')
    assert from_flags("/models/a") == serve_config({}, path) == ServeConfig(model="/models/a")
    assert from_flags("/models/b", "--config", str(path)).model == "/models/b"


def test_a_flag_wins_over_the_file_even_with_the_defaults_value(
    from_flags: Callable[..., ServeConfig], toml: Callable[[str], Path]
) -> None:
    path = str(toml("port = 1\nmax-num-seqs = 3\nprefix-cache = false"))
    config = from_flags("--config", path, "--port", "50051", "--prefix-cache")
    assert (config.port, config.max_num_seqs, config.prefix_cache) == (50051, 3, True)


def test_whole_numbers_may_stand_for_seconds(toml: Callable[[str], Path]) -> None:
    assert serve_config({}, toml("drain-timeout = 5")).drain_timeout == 5.0


def test_the_engine_gets_what_was_said() -> None:
    config = ServeConfig(model="m", kv_cache_bytes=5, block_size=32, heartbeat_timeout=0.4)
    engine = config.engine()
    assert (engine.model, engine.kv_cache_bytes, engine.block_size) == ("m", 5, 32)
    assert engine.heartbeat_interval_s < 0.4, "several beats in each timeout"
    assert ServeConfig(on_engine_failure="restart").policy().restarts
    assert not ServeConfig(on_engine_failure="exit").policy().restarts


@pytest.mark.parametrize(
    ("options", "name"),
    [({"model": "/models/qwen"}, "qwen"), ({"model": "/m", "model_name": "pilot"}, "pilot")],
)
def test_the_served_name(options: dict[str, str], name: str) -> None:
    assert ServeConfig(**options).served_name == name


# ---- standby -----------------------------------------------------------------------------------


def test_standby_has_no_model_and_no_name() -> None:
    config = serve_config({"standby": True, "admin_port": 0}, None)
    assert (config.engine().model, config.served_name) == ("", "")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"standby": True}, "--standby needs --admin-port"),
        ({"standby": True, "admin_port": 0, "model": "/m"}, "MODEL is '/m'"),
    ],
)
def test_a_standby_that_makes_no_sense(flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        serve_config(flags, None)


def test_a_loaded_model_has_the_servers_options_and_its_own() -> None:
    server = ServeConfig(standby=True, admin_port=0, model_name="pilot", block_size=32)
    config = loaded_config(server, {"model": "/m/qwen", "max_model_len": 64})
    engine = config.engine()
    assert (engine.model, engine.max_model_len, engine.block_size) == ("/m/qwen", 64, 32)
    assert config.served_name == "pilot"
    assert loaded_config(server, {"model": "/m", "model_name": "b"}).served_name == "b"
    with pytest.raises(ConfigError, match="--dtype is 'int3'"):
        loaded_config(server, {"dtype": "int3"})


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("1TiB", 1 << 40),
        ("10B", 10),
        (" 7 ", 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: object, size: int, from_flags: Callable[..., ServeConfig]) -> None:
    assert size_bytes("--kv-cache-bytes", text) == size
    assert from_flags("--kv-cache-bytes", str(text)).kv_cache_bytes == size


@pytest.mark.parametrize("text", ["lots", "4 elephants", "-1", "", "1e9", "4GiB4", True])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-bytes") as refused:
        size_bytes("--kv-cache-bytes", text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("text", ["9" * 30, "9" * 400])
def test_a_size_beyond_all_measure_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-bytes"):
        serve_config({"kv_cache_bytes": text}, None)


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max-num-seq = 3", ["'max-num-seq'", "did you mean 'max-num-seqs'?"]),
        ("prot = 3", ["'prot'", "did you mean 'port'?"]),
        ("xyzzy = 3", ["unknown key 'xyzzy'"]),
        ("[server]\nport = 3", ["unknown key 'server'"]),
        ("port = '3'", ["--port is '3'", "of type int"]),
        ("port = true", ["--port is True", "of type int"]),
        ("port = 3.5", ["--port is 3.5", "of type int"]),
        ("prefix-cache = 1", ["--prefix-cache is 1", "of type bool"]),
        ("host = 3", ["--host is 3", "of type str"]),
        ("model = 3", ["model is 3", "of type str"]),
        ("port = 65536", ["--port is 65536", "0 to 65535"]),
        ("port = -1", ["--port is -1", "0 to 65535"]),
        ("max-num-seqs = 0", ["--max-num-seqs is 0", "1 to 4096"]),
        ("drain-timeout = nan", ["--drain-timeout is nan", "0 to 86400"]),
        ("drain-timeout = inf", ["--drain-timeout is inf"]),
        ("device = 'tpu'", ["--device is 'tpu'", "auto, cpu, cuda"]),
        ("max-batched-tokens = 63", ["--max-batched-tokens is 63", "--max-num-seqs (64)"]),
        ("port = ", ["is not TOML"]),
    ],
)
def test_a_mistake_in_the_file_is_named(
    text: str, parts: list[str], toml: Callable[[str], Path]
) -> None:
    with pytest.raises(ConfigError) as refused:
        serve_config({}, toml(text))
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"host = '\xff'")
    for path in (tmp_path / "absent.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(ConfigError, match="--config") as refused:
            serve_config({}, path)
        assert str(path) in str(refused.value)


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["serve", "--port", "70000"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "pilotlight: --port is 70000: must be 0 to 65535"


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--device", "tpu"], ["--port", "x"]])
def test_what_argparse_refuses(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *flags])
    assert end.value.code == 2
    assert flags[0] in capsys.readouterr().err


# ---- help --------------------------------------------------------------------------------------


def _help(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_option_under_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = _help(capsys)
    for title in GROUPS.values():
        assert f"\n{title}:\n" in text
    for option in OPTIONS:
        group = text.split(f"\n{GROUPS[option.group]}:\n")[1].split("\n\n")[0]
        assert option.flag in group
        assert option.help in group


def test_help_tells_defaults_and_gives_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = _help(capsys)
    for option in OPTIONS:
        if not option.is_size and default_of(option) != "" and "default:" not in option.help:
            assert f"{option.help} (default: {default_of(option)})" in text
    assert "pilotlight serve --config serve.toml" in text
    assert "Exit codes" in text


# ---- the one environment variable ----------------------------------------------------------------


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PILOTLIGHT_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("PILOTLIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "pilotlight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "pilotlight"


def test_a_flag_that_does_not_exist_is_named_and_the_nearest_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--max-model-length", "5"])
    told = capsys.readouterr().err
    assert "unknown: --max-model-length; did you mean --max-model-len?" in told
    assert "usage" not in told
