"""Generates the stubs from the .proto files, or checks that those committed are up to date.

python -m pilotlight.proto.generate [--check]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTRACTS = ("inference", "admin")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
NAMES = tuple(contract + suffix for contract in CONTRACTS for suffix in SUFFIXES)


def generate(folder: Path) -> dict[str, str]:
    """Runs protoc into `folder`; returns each stub's text."""
    from grpc_tools import protoc

    # The virtual path puts the stubs into the package pilotlight.proto.
    arguments = [
        "protoc",
        f"-Ipilotlight/proto={HERE}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={folder}",
        f"--pyi_out={folder}",
        f"--grpc_python_out={folder}",
        *(f"pilotlight/proto/{contract}.proto" for contract in CONTRACTS),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    return {name: (folder / "pilotlight" / "proto" / name).read_text() for name in NAMES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        stubs = generate(Path(folder))
    stale = [name for name, text in stubs.items() if _committed(name) != text]
    if check:
        if stale:
            print(f"{', '.join(stale)} out of date: run 'make proto'", file=sys.stderr)
        return 1 if stale else 0
    for name, text in stubs.items():
        (HERE / name).write_text(text)
    return 0


def _committed(name: str) -> str:
    """Empty where there is none yet."""
    path = HERE / name
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
