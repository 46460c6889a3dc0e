"""Other engines as commands: found, their model converted if they want another form, timed.

A peer's driver (bench/peers) says at which moment it is, and this process keeps the clock. Knows
the drivers' lines and no engine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..engine.errors import ConfigError
from .startup_figures import Span, Start

DRIVERS = Path(__file__).parent / "peers"
TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Peer:
    """`module` shows that an interpreter has it; `variables` are set in its environment."""

    name: str
    module: str
    variables: tuple[str, ...] = ()


PEERS = {
    "transformers": Peer("transformers", "transformers", ("HF_HUB_OFFLINE=1",)),
    "vllm": Peer("vllm", "vllm", ("HF_HUB_OFFLINE=1", "VLLM_CPU_KVCACHE_SPACE=1")),
    "openvino": Peer("openvino", "openvino_genai"),
}


def chosen_peers(names: str) -> list[Peer]:
    """ConfigError for a name that is none of PEERS."""
    wanted = [name for name in names.split(",") if name]
    for name in wanted:
        if name not in PEERS:
            raise ConfigError(f"--vs: {name!r} is unknown; there are {', '.join(PEERS)}")
    return [PEERS[name] for name in wanted]


def command_of(peer: Peer, pythons: Mapping[str, str], model: Path) -> list[str]:
    """ConfigError where the interpreter is not there or does not have the peer."""
    python = python_of(peer, pythons)
    check_has(peer, python)
    folder = converted(python, model) if peer.name == "openvino" else model
    driver = DRIVERS / f"with_{peer.name}.py"
    return ["env", "-u", "PYTHONPATH", *peer.variables, python, str(driver), str(folder)]


def python_of(peer: Peer, pythons: Mapping[str, str]) -> str:
    """The interpreter that was named for the peer, as a path where there is one."""
    named = pythons.get(peer.name, "python3")
    return shutil.which(named) or named


def check_has(peer: Peer, python: str) -> None:
    find = "import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)"
    is_there = shutil.which(python) is not None
    if not is_there or subprocess.run([python, "-c", find, peer.module]).returncode != 0:
        raise ConfigError(
            f"--vs {peer.name}: {python} does not have {peer.module}; name an interpreter that "
            f"does: --peer-python {peer.name}=PYTHON"
        )


def converted(python: str, model: Path) -> Path:
    """OpenVINO's form of the checkpoint, made once: a model with an openvino_model.xml is one."""
    if (model / "openvino_model.xml").exists():
        return model
    name = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / "pilotlight-bench-openvino" / f"{model.name}-{name}"
    if not (target / "openvino_model.xml").exists():
        _convert(python, model, target)
    return target


def _convert(python: str, model: Path, target: Path) -> None:
    tool = Path(python).parent / "optimum-cli"
    task = ("--task", "text-generation-with-past", "--weight-format", "fp16")
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    export = [str(tool), "export", "openvino", "-m", str(model), *task, str(partial)]
    try:
        done = subprocess.run(export, capture_output=True, text=True)
    except OSError as error:
        message = f"--vs openvino: {tool} converts the model: {error}; install optimum-intel there"
        raise ConfigError(message) from error
    if done.returncode != 0:
        raise ConfigError(f"--vs openvino: {tool} failed: {done.stderr[-800:]}")
    partial.rename(target)


def time_peer(command: list[str]) -> Start:
    """From the spawn to the line of the first token. ConfigError with its last words if none."""
    began_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as words:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True) as process:
            moments = _moments(process, began_s)
            if "first_token" not in moments:
                code = process.wait()
                words.seek(0)
                tail = "".join(words.readlines()[-TAIL_LINES:])
                raise ConfigError(f"{' '.join(command)} ended with {code}, no token:\n{tail}")
    return Start({"first_token_s": moments["first_token"]}, _spans(moments))


def _moments(process: subprocess.Popen[str], began_s: float) -> dict[str, float]:
    """Reads to the end, so that the peer is gone before the next start."""
    assert process.stdout is not None
    moments: dict[str, float] = {}
    for line in process.stdout:
        at_s = time.monotonic() - began_s
        if line.startswith('{"moment"'):
            moments.setdefault(json.loads(line)["moment"], at_s)
    return moments


def _spans(moments: Mapping[str, float]) -> tuple[Span, ...]:
    """A moment ends the stretch of its name."""
    ends = sorted(moments.items(), key=lambda item: item[1])
    starts = [0.0, *(at_s for _, at_s in ends)]
    return tuple(
        Span(name, start, at_s - start) for (name, at_s), start in zip(ends, starts, strict=False)
    )
