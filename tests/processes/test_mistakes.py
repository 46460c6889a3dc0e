"""What an operator gets wrong costs one readable line and exit code 2, never a traceback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pilotlight.bench.make_model import SHAPES, write_model
from pilotlight.engine.lean_torch import has_cuda_driver
from safetensors.torch import load_file, save_file

TINY = next(name for name in SHAPES if name.startswith("tiny-"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(TINY, folder, dtype="float32")
    return folder


def _serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    serve = (sys.executable, "-m", "pilotlight", "serve", "--port", "0", "--ops-port", "0")
    command = (*serve, "--cache", "off")
    return subprocess.run(
        (*command, *arguments), capture_output=True, text=True, timeout=60, check=False
    )


def _refused(*arguments: str) -> str:
    """The one line that was printed."""
    result = _serve(*arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("pilotlight: ")
    return lines[0]


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, object]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _reshape(tensors: dict[str, object]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()  # type: ignore[index]


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no architecture": (lambda f: _edit_config(f, architectures=None), "architectures"),
    "unknown architecture": (
        lambda f: _edit_config(f, architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel",
    ),
    "truncated weights": (_truncate, "model.safetensors"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04 no tensors" * 10),
        "model.safetensors",
    ),
    "missing tensor": (
        lambda f: _edit_tensors(f, lambda t: t.pop("model.norm.weight")),  # type: ignore[arg-type,return-value]
        "model.norm.weight",
    ),
    "extra tensor": (
        lambda f: _edit_tensors(f, lambda t: t.update(surplus=t["model.norm.weight"].clone())),  # type: ignore[attr-defined]
        "surplus",
    ),
    "wrong shape": (lambda f: _edit_tensors(f, _reshape), "model.norm.weight"),
    # Found by the front, while the engine loads.
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "broken chat template": (
        lambda f: (f / "chat_template.jinja").write_text("{% for %}"),
        "chat template",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_checkpoint_that_cannot_be_served(mistake: str, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    spoil, expected = MISTAKES[mistake]
    spoil(folder)
    assert expected in _refused(str(folder))


def test_a_folder_that_is_not_there() -> None:
    assert "/no/such/folder" in _refused("/no/such/folder")


def test_not_enough_memory_for_one_sequence(tiny: Path) -> None:
    line = _refused(str(tiny), "--kv-cache-bytes", "1", "--max-model-len", "64")
    assert "64" in line
    assert "kv" in line.lower()


@pytest.mark.parametrize("flag", ["--port", "--ops-port"])
def test_a_port_in_use(flag: str, tiny: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = _refused(str(tiny), flag, port)
    assert f"{flag} {port}" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--max-num-seqs", "0"), "--max-num-seqs is 0"),
        (("--kv-cache-bytes", "lots"), "--kv-cache-bytes is 'lots'"),
        (("--max-batched-tokens", "4"), "--max-num-seqs"),
        (("--config", "/no/such.toml"), "/no/such.toml"),
    ],
)
def test_a_flag_out_of_range(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in _refused(*arguments)


@pytest.mark.skipif(has_cuda_driver(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(tiny: Path) -> None:
    assert "--device cpu" in _refused(str(tiny), "--device", "cuda")
