"""`pilotlight cache`: add, list, verify, gc, rm and path of the weights cache.

Parses and prints; what is done is done in `weights_cache`, imported when a command runs. Knows the
store and its sources; torch only through `_build`.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .engine.errors import ConfigError
from .kernels.cpu.level_names import LEVELS

if TYPE_CHECKING:
    from .weights_cache.inventory import Entry
    from .weights_cache.sources.source import Source
    from .weights_cache.store import Store

CLEAR_LINE = "\r\x1b[K"
BAR_CHARS = 24

EPILOG = """\
examples:
  pilotlight cache add /models/qwen2-0.5b          build the artefact of a local checkpoint
  pilotlight cache add hf://org/name@v1.0          a revision of the hub (HF_ENDPOINT, HF_TOKEN)
  pilotlight cache add https://example.com/qwen/   a folder behind a web server
  pilotlight cache add s3://bucket/qwen/           needs pip install 'pilotlight[s3]'
  pilotlight serve $(pilotlight cache path hf://org/name)
  pilotlight cache list --json
  pilotlight cache gc --high 50GiB --low 40GiB     down to 40 GiB if there are more than 50
  pilotlight cache rm qwen2-0.5b-1a2b3c4d

The cache is $PILOTLIGHT_CACHE, else ~/.cache/pilotlight, else what --cache says. Several servers
may use it at once, over a network file system too; what one has open is never removed. A fetch that
was interrupted goes on where it stopped when the same command is given again.
"""

ADD_EPILOG = """\
SOURCE is a folder, hf://org/name[@revision], https://host/folder/ or s3://bucket/prefix/. Fetched
are config.json, generation_config.json, tokenizer*.json, chat_template* and the safetensors; each
file is compared with the digest that its source publishes (hub, S3, a SHA256SUMS beside it).

examples:
  pilotlight cache add hf://org/name
  pilotlight cache add https://example.com/qwen/ --dtype float32
  pilotlight cache add hf://org/name --instruction-set avx2     for other machines than this one
  pilotlight cache add s3://bucket/qwen/ --no-build     only fetch
"""


def add_to(commands: Any) -> None:
    """Registers `cache` and what comes after it."""
    raw = argparse.RawDescriptionHelpFormatter
    cache = commands.add_parser(
        "cache", help="fetch, build, list and remove weights", epilog=EPILOG, formatter_class=raw
    )
    kinds = cache.add_subparsers(required=True, metavar="WHAT")

    def kind(name: str, run: Callable[..., int], text: str, **more: Any) -> Any:
        parser = kinds.add_parser(name, help=text, description=more.pop("about", None), **more)
        parser.add_argument("--cache", type=Path, metavar="DIR", help="another cache than the own")
        parser.add_argument(
            "--json", action="store_true", help="one JSON object on standard output"
        )
        parser.set_defaults(command=run)
        return parser

    add = kind("add", _add, "fetch a checkpoint and build its artefact", epilog=ADD_EPILOG,
               formatter_class=raw)  # fmt: skip
    add.add_argument("source", metavar="SOURCE")
    add.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
        help="of the artefact's weights; auto: what `serve` would choose (default)",
    )  # fmt: skip
    add.add_argument("--head-dtype", default="auto", choices=("auto", "int8"),
                     help="as it will be served")  # fmt: skip
    add.add_argument(
        "--instruction-set",
        choices=LEVELS,
        help="of the machines that will read it: avx2 reads another artefact than what is beyond "
        "it (default: this one's)",
    )
    add.add_argument("--no-build", action="store_true", help="only fetch, build no artefact")
    kind("list", _list, "what is there: sizes, ages, leases")
    verify = kind("verify", _verify, "hash everything again and compare")
    verify.add_argument("names", nargs="*", metavar="NAME", help="as in `list` (default: all)")
    _add_gc(kind("gc", _gc, "remove what was not used for longest"))
    rm = kind("rm", _rm, "remove by name")
    rm.add_argument("names", nargs="+", metavar="NAME", help="as in `list`, or the source")
    path = kind("path", _path, "print where the cache, or one thing in it, is")
    path.add_argument("name", nargs="?", metavar="NAME", help="as in `list`, or the source")


def _add_gc(gc: Any) -> None:
    gc.description = (
        "Empties the trash and old partial files. With --high, also removes what was not used for "
        "longest, until at most --low bytes are left; never what a server has open."
    )
    gc.add_argument("--high", metavar="SIZE", help="do nothing below this, as 50GiB")
    gc.add_argument("--low", metavar="SIZE", help="stop here (default: 80 %% of --high)")


# ---- the commands ----------------------------------------------------------------------------


def _add(arguments: argparse.Namespace) -> int:
    from .weights_cache.sources.parse import parse_source
    from .weights_cache.sources.retries import Retries

    store, stop = _store(arguments), threading.Event()
    try:
        with closing(parse_source(arguments.source, Retries(sleep=stop.wait))) as source:
            folder = source.local_folder()
            added: dict[str, Any] = {"source": source.text, "folder": str(folder)}
            if folder is None:
                added |= _fetch(source, store, stop)
    except KeyboardInterrupt:
        print("pilotlight: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    if not arguments.no_build:
        asked = arguments.device, arguments.dtype, arguments.head_dtype
        added |= _build(store, Path(added["folder"]), *asked, arguments.instruction_set)
    _print(arguments, added, _added_lines(added))
    return 0


def _added_lines(added: dict[str, Any]) -> list[str]:
    shown = {key: value for key, value in added.items() if value != "" and "bytes" not in key}
    if "num_bytes" in added:
        moved = size(added["num_bytes_moved"])
        shown["size"] = f"{size(added['num_bytes'])}, of which {moved} were moved now"
    return [f"{key:<10}{value}" for key, value in shown.items()]


def _fetch(source: Source, store: Store, stop: threading.Event) -> dict[str, Any]:
    from .weights_cache.fetch import fetch

    with ProgressLine("fetching") as line:
        fetched = fetch(source, store, line.show, stop)
    return {
        "folder": str(fetched.folder),
        "name": fetched.slug,
        "revision": fetched.record.revision,
        "num_bytes": fetched.record.num_bytes,
        "num_bytes_moved": fetched.num_bytes_moved,
    }


def _build(
    store: Store, folder: Path, device: str, dtype: str, head_dtype: str, level: str | None
) -> dict[str, Any]:
    """Hashes the checkpoint's files where they are not known yet, then writes the artefact."""
    from .engine.models.artefact import build

    with ProgressLine("hashing") as hashing, ProgressLine("building") as building:
        lines = {"hash": hashing, "build": building}
        built = build(
            store, folder, device, dtype, head_dtype,
            lambda what, done, total: lines[what].show(done, total), level,
        )  # fmt: skip
    return {"artefact": str(built.path), "key": built.key}


def _list(arguments: argparse.Namespace) -> int:
    from .weights_cache.inventory import entries

    store = _store(arguments)
    found, now_s = entries(store), time.time()
    rows = [_row(entry, now_s) for entry in found]
    num_bytes, num_free = store.num_bytes(), store.free_bytes()
    result = {
        "cache": str(store.root),
        "num_bytes": num_bytes,
        "num_free_bytes": num_free,
        "is_writable": store.is_writable,
        "entries": rows,
    }
    access = "" if store.is_writable else ", read-only"
    head = f"{store.root}: {size(num_bytes)}, {size(num_free)} free{access}"
    table = [("NAME", "KIND", "SIZE", "USED", "LEASES", "WHAT"), *map(_cells, rows)] if rows else []
    _print(arguments, result, [head, *_aligned(table)])
    return 0


def _row(entry: Entry, now_s: float) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "path": str(entry.path),
        "num_bytes": entry.num_bytes,
        "age_s": round(max(0.0, now_s - entry.used_at), 1),
        "num_leases": entry.num_leases,
        "what": entry.about,
        "revision": entry.record.revision if entry.record else "",
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    leases = str(row["num_leases"] or "-")
    name = row["name"][:16] if row["kind"] == "artefact" else row["name"]
    return (name, row["kind"], size(row["num_bytes"]), age(row["age_s"]), leases, row["what"])


def _verify(arguments: argparse.Namespace) -> int:
    from .weights_cache.audit import audit

    store = _store(arguments)
    chosen = _chosen(store, arguments.names)
    with ProgressLine("verifying") as line:
        findings = audit(store, chosen, line.show)
    bad = {finding.name: finding.problem for finding in findings if finding.problem}
    lines = [f"{f.name:<24} {f.problem or 'good'}" for f in findings]
    if bad:
        lines.append("remove what is bad with `pilotlight cache rm`, then `add` it again")
    _print(arguments, {"num_verified": len(findings), "bad": bad}, lines)
    return 1 if bad else 0


def _gc(arguments: argparse.Namespace) -> int:
    from .server.sizes import size_bytes

    store = _writable(arguments)
    if arguments.low and not arguments.high:
        raise ConfigError("--low is given without --high: above which size to begin")
    high = size_bytes("--high", arguments.high) if arguments.high else sys.maxsize
    low = size_bytes("--low", arguments.low) if arguments.low else high // 5 * 4
    if low > high:
        raise ConfigError(f"--low is {arguments.low}: must be at most --high ({arguments.high})")
    done = store.collect_garbage(high, low)
    freed = done.num_bytes_before - done.num_bytes_after
    lines = [f"removed {name}" for name in done.removed]
    lines += [f"kept    {name}: in use" for name in done.kept_in_use]
    lines.append(f"{size(freed)} freed, {size(done.num_bytes_after)} left")
    result = {"num_bytes_freed": freed, "num_bytes": done.num_bytes_after}
    names = {"removed": done.removed, "kept_in_use": done.kept_in_use}
    _print(arguments, result | names, lines)
    return 0


def _rm(arguments: argparse.Namespace) -> int:
    from .weights_cache.inventory import ARTEFACT

    store = _writable(arguments)
    in_use: list[str] = []
    removed: list[str] = []
    for entry in _chosen(store, arguments.names):
        remove = store.remove if entry.kind == ARTEFACT else store.remove_source
        (removed if remove(entry.name) else in_use).append(entry.name)
    _print(arguments, {"removed": removed, "in_use": in_use}, [f"removed {n}" for n in removed])
    if in_use:
        raise ConfigError(f"{', '.join(in_use)}: in use by a server, so not removed; stop it first")
    return 0


def _path(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    names = [arguments.name] if arguments.name is not None else []
    path = _chosen(store, names)[0].path if names else store.root
    _print(arguments, {"path": str(path)}, [str(path)])
    return 0


# ---- shared ----------------------------------------------------------------------------------


def _store(arguments: argparse.Namespace) -> Store:
    from .server.config import cache_root
    from .weights_cache.store import Store

    return Store(arguments.cache or cache_root())


def _writable(arguments: argparse.Namespace) -> Store:
    store = _store(arguments)
    if not store.is_writable:
        raise ConfigError(f"{store.root} is read-only: nothing in it can be removed")
    return store


def _chosen(store: Store, names: Sequence[str]) -> list[Entry]:
    """The entries of these names, each once; all where no name is given."""
    from .weights_cache.inventory import entries, find

    found = entries(store)
    if not names:
        return found
    return list({entry.name: entry for entry in (find(found, name) for name in names)}.values())


def _print(arguments: argparse.Namespace, result: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(result) if arguments.json else "\n".join(lines))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def size(num_bytes: int) -> str:
    """1536 -> 1.5 KiB."""
    amount, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{amount:.1f} {unit}"


def age(seconds: float) -> str:
    """90 -> 1 min ago."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit_s:
            return f"{int(seconds // unit_s)} {unit} ago"
    return f"{int(seconds)} s ago"


class ProgressLine:
    """On a terminal one line that moves; elsewhere a line at the start and every tenth."""

    def __init__(self, what: str, out: TextIO | None = None) -> None:
        self._what = what
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty()
        self._started_s = time.monotonic()
        self._shown: object = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal and self._shown is not None:
            print(CLEAR_LINE, end="", file=self._out, flush=True)

    def show(self, num_done: int, num_total: int) -> None:
        steps = 1000 if self._is_terminal else 10
        step = num_done * steps // max(num_total, 1)
        if step == self._shown:
            return
        self._shown = step
        line = self._line(num_done, num_total)
        if self._is_terminal:
            print(CLEAR_LINE + line, end="", file=self._out, flush=True)
        else:
            print(line, file=self._out, flush=True)

    def _line(self, num_done: int, num_total: int) -> str:
        share = num_done / max(num_total, 1)
        line = f"{self._what} {share:4.0%} of {size(num_total)}"
        if not self._is_terminal:
            return line
        per_s = num_done / max(time.monotonic() - self._started_s, 1e-3)
        filled = round(share * BAR_CHARS)
        bar = "█" * filled + "░" * (BAR_CHARS - filled)
        return (
            f"{bar} {line}, {size(int(per_s))}/s, {_left((num_total - num_done) / max(per_s, 1))}"
        )


def _left(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02} left"
