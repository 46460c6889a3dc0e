"""`pilotlight cache` as an operator meets it: store, nginx, what is printed, exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pilotlight import cache_commands
from pilotlight.cache_commands import ProgressLine, age, size
from pilotlight.cli import main
from pilotlight.tests.weights_cache.checkpoints import SHARDS, replace_shard, write_checkpoint
from pilotlight.tests.weights_cache.servers import LIMIT_S, Nginx, cutting, nginx
from pilotlight.weights_cache.arena import TensorSpec
from pilotlight.weights_cache.arena_writer import ArenaWriter
from pilotlight.weights_cache.files import FileSystem
from pilotlight.weights_cache.store import Store

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Nginx]]:
    root = tmp_path_factory.mktemp("commands")
    with nginx(root, root / "nginx") as server:
        yield root / "tiny", server


@pytest.fixture
def url(served: tuple[Path, Nginx]) -> str:
    write_checkpoint(served[0])
    return f"{served[1].url}/tiny/"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(cache: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`pilotlight cache` with this cache: exit code, standard output, standard error."""

    def run_it(what: str, *arguments: str) -> tuple[int, str, str]:
        code = main(["cache", what, "--cache", str(cache), *arguments])
        return code, *capsys.readouterr()

    return run_it


def answer(result: tuple[int, str, str]) -> Any:
    """The one JSON object that a command printed."""
    code, out, _ = result
    assert code == 0
    return json.loads(out)


def check_refusal(result: tuple[int, str, str], *named: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("pilotlight: ")
    assert err.count("\n") == 1
    assert all(part in err for part in named), err


# ---- add -------------------------------------------------------------------------------------


def test_add_fetches_and_says_where_it_is(run: Run, url: str, cache: Path) -> None:
    code, out, err = run("add", url, "--no-build")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    folder = Path(lines["folder"])
    assert folder.parent.parent == cache / "models"
    assert {path.name for path in folder.iterdir()} > {"config.json", *SHARDS}
    assert lines["source"] == url
    assert lines["size"] == "3.1 MiB, of which 3.1 MiB were moved now"
    assert err.splitlines()[-1].startswith("fetching 100% of 3.1 MiB")
    assert run("path", url)[1].strip() == str(folder)


def test_add_builds_what_was_fetched(run: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[object, ...]] = []

    def build(store: Store, *asked: object) -> dict[str, Any]:
        built.append(asked)
        return {"artefact": "0123"}

    monkeypatch.setattr(cache_commands, "_build", build)
    asked = ("--device", "cpu", "--dtype", "float32", "--head-dtype", "int8")
    added = answer(run("add", url, "--json", *asked, "--instruction-set", "avx2"))
    assert built == [(Path(added["folder"]), "cpu", "float32", "int8", "avx2")]
    assert added["artefact"] == "0123"
    assert added["num_bytes"] == added["num_bytes_moved"] > 3_200_000


def test_a_local_folder_is_built_in_place(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    write_checkpoint(tmp_path / "here")
    monkeypatch.setattr(cache_commands, "_build", lambda _store, folder, *_: {"built": str(folder)})
    added = answer(run("add", str(tmp_path / "here"), "--json"))
    assert added["built"] == added["folder"] == str(tmp_path / "here")
    assert answer(run("list", "--json"))["entries"] == []


def test_add_again_moves_nothing(run: Run, url: str) -> None:
    first = answer(run("add", url, "--no-build", "--json"))
    again = answer(run("add", url, "--no-build", "--json"))
    assert again == first | {"num_bytes_moved": 0}


def test_a_source_that_makes_no_sense_is_one_line(run: Run, url: str) -> None:
    check_refusal(run("add", "org/name"), "SOURCE is 'org/name'", "hf://org/name")
    check_refusal(run("add", f"{url}nothing/"), "has no config.json", "name the url of the folder")


def test_an_interrupted_add_goes_on_later(
    served: tuple[Path, Nginx], url: str, cache: Path, run: Run
) -> None:
    with cutting(served[1].port) as proxy:
        through = f"{proxy.url}/tiny/"
        proxy.hold_after(2_000_000)
        command = [sys.executable, "-m", "pilotlight", "cache", "add", through, "--no-build"]
        command += ["--cache", str(cache)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            assert any(int(line.split("%")[0].split()[-1]) >= 50 for line in child.stderr)
            child.send_signal(signal.SIGINT)
            proxy.release()
            last_words = child.stderr.read().splitlines()[-1]
        assert child.returncode == 130
        assert last_words.endswith("interrupted; the same command goes on from there")
        added = answer(run("add", through, "--no-build", "--json"))
        assert added["num_bytes_moved"] < added["num_bytes"]


# ---- list, path ------------------------------------------------------------------------------


def test_an_empty_cache_lists_its_place_and_room(run: Run, cache: Path) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert out.startswith(f"{cache}: ")
    assert out.endswith(" free\n")
    assert out.count("\n") == 1


def test_list_shows_sizes_ages_and_leases(run: Run, url: str, cache: Path) -> None:
    added = answer(run("add", url, "--no-build", "--json"))
    with Store(cache).lease(f"source-{added['name']}"):
        (entry,) = answer(run("list", "--json"))["entries"]
        assert entry["num_leases"] == 1
        assert (entry["name"], entry["kind"], entry["what"]) == (added["name"], "source", url)
        assert entry["num_bytes"] == added["num_bytes"]
        assert 0 <= entry["age_s"] < 3600
    _, out, _ = run("list")
    head, titles, row = out.splitlines()
    assert "3.1 MiB" in head
    assert titles.split() == ["NAME", "KIND", "SIZE", "USED", "LEASES", "WHAT"]
    assert row.split()[:5] == [added["name"], "source", "3.1", "MiB", row.split()[4]]
    assert row.endswith(url)


def test_path_is_for_scripts(run: Run, url: str, cache: Path) -> None:
    assert run("path") == (0, f"{cache}\n", "")
    added = answer(run("add", url, "--no-build", "--json"))
    for name in (added["name"], "tiny", url, url.rstrip("/")):
        assert run("path", name)[1].strip() == added["folder"]
    check_refusal(run("path", "no-such"), "NAME is 'no-such': not in the cache")


def test_a_name_that_means_two_things_is_refused(
    run: Run, url: str, served: tuple[Path, Nginx]
) -> None:
    run("add", url, "--no-build")
    with cutting(served[1].port) as proxy:
        run("add", f"{proxy.url}/tiny/", "--no-build")
    check_refusal(run("path", "tiny"), "may mean tiny-", "give more of it")


# ---- verify ----------------------------------------------------------------------------------


def test_verify_hashes_all_again(run: Run, url: str, cache: Path) -> None:
    added = answer(run("add", url, "--no-build", "--json"))
    code, out, _ = run("verify")
    assert (code, out.split()) == (0, [added["name"], "good"])


def test_verify_finds_one_flipped_bit(run: Run, url: str, cache: Path) -> None:
    added = answer(run("add", url, "--no-build", "--json"))
    with (Path(added["folder"]) / SHARDS[1]).open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([byte ^ 1]))
    code, out, _ = run("verify", added["name"])
    assert code == 1
    assert f"{SHARDS[1]}: the bytes of" in out
    assert "remove what is bad with `pilotlight cache rm`" in out
    code, out, _ = run("verify", "--json")
    assert (code, list(json.loads(out)["bad"])) == (1, [added["name"]])
    run("rm", added["name"])
    assert answer(run("add", url, "--no-build", "--json"))["num_bytes_moved"] > 0
    assert run("verify")[0] == 0


# ---- artefacts -------------------------------------------------------------------------------

KEY = "0123456789abcdef" * 4


def publish(cache: Path) -> Path:
    """An artefact of one tensor."""
    spec = TensorSpec("w", "U8", (100_000,), "plain", "head", 100_000)
    about = {"source": "hf://org/tiny", "architecture": "llama", "target": "cpu-bfloat16"}

    def build(writer: ArenaWriter) -> None:
        writer.write("w", bytes(100_000))

    return Store(cache).publish_arena(KEY, build, [spec], about)


def test_an_artefact_is_listed_verified_and_removed(run: Run, cache: Path) -> None:
    publish(cache)
    (entry,) = answer(run("list", "--json"))["entries"]
    assert (entry["name"], entry["kind"]) == (KEY, "artefact")
    assert entry["what"] == "hf://org/tiny llama cpu-bfloat16"
    assert KEY[:16] in run("list")[1]
    assert run("path", KEY[:8])[1].strip() == str(cache / "arenas" / KEY)
    check_refusal(run("path", KEY[:2]), "not in the cache")
    assert run("verify")[:2] == (0, f"{KEY} good\n")
    assert run("rm", KEY[:8]) == (0, f"removed {KEY}\n", "")
    assert answer(run("list", "--json"))["entries"] == []


def test_verify_finds_one_flipped_bit_of_an_artefact(run: Run, cache: Path) -> None:
    publish(cache)
    arena = cache / "arenas" / KEY / "arena.bin"
    content = bytearray(arena.read_bytes())
    content[-10] ^= 1
    arena.write_bytes(content)
    code, out, _ = run("verify", "--json")
    assert code == 1
    assert "chunk 0" in json.loads(out)["bad"][KEY]


def test_an_artefact_in_use_stays(run: Run, cache: Path) -> None:
    publish(cache)
    leased = Store(cache).find_arena(KEY)
    assert leased is not None
    with leased:
        assert answer(run("list", "--json"))["entries"][0]["num_leases"] == 1
        assert run("rm", KEY)[0] == 2
        done = answer(run("gc", "--high", "1", "--low", "0", "--json"))
        assert done["kept_in_use"] == [f"arenas/{KEY}"]
    assert answer(run("gc", "--high", "1", "--low", "0", "--json"))["removed"] == [f"arenas/{KEY}"]


# ---- gc, rm ----------------------------------------------------------------------------------


def test_rm_removes_the_bytes_too(run: Run, url: str, cache: Path) -> None:
    added = answer(run("add", url, "--no-build", "--json"))
    assert run("rm", url) == (0, f"removed {added['name']}\n", "")
    assert answer(run("list", "--json"))["num_bytes"] < 100_000
    assert not list((cache / "blobs").iterdir())
    assert not list((cache / "models").iterdir())


def test_rm_leaves_what_is_in_use(run: Run, url: str, cache: Path) -> None:
    added = answer(run("add", url, "--no-build", "--json"))
    with Store(cache).lease(f"source-{added['name']}"):
        code, _, err = run("rm", added["name"])
    assert code == 2
    assert "in use by a server, so not removed; stop it first" in err
    assert Path(added["folder"]).is_dir()


def test_gc_stops_at_the_low_mark_and_takes_the_oldest(
    run: Run, url: str, served: tuple[Path, Nginx], cache: Path
) -> None:
    old = answer(run("add", url, "--no-build", "--json"))
    replace_shard(served[0], seed=1)
    with cutting(served[1].port) as proxy:
        new = answer(run("add", f"{proxy.url}/tiny/", "--no-build", "--json"))
    assert answer(run("gc", "--high", "5MiB", "--json"))["removed"] == []
    done = answer(run("gc", "--high", "4MiB", "--low", "3.5MiB", "--json"))
    assert done["removed"] == [f"sources/{old['name']}"]
    assert run("path", new["name"])[0] == 0
    code, out, _ = run("gc")
    assert (code, out) == (0, "0 B freed, 3.1 MiB left\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--low", "1GiB"], "--low is given without --high"),
        (["--high", "1GiB", "--low", "2GiB"], "--low is 2GiB: must be at most --high (1GiB)"),
        (["--high", "much"], "--high is 'much': give bytes, or a number with KiB"),
    ],
)
def test_marks_that_make_no_sense(run: Run, arguments: list[str], message: str) -> None:
    check_refusal(run("gc", *arguments), message)


def test_a_read_only_cache_can_be_read(
    run: Run, url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = answer(run("add", url, "--no-build", "--json"))
    monkeypatch.setattr(FileSystem, "is_writable", lambda *_: False)
    assert "read-only" in run("list")[1]
    assert run("path", added["name"])[0] == 0
    assert run("verify")[0] == 0
    check_refusal(run("rm", added["name"]), "is read-only: nothing in it can be removed")
    check_refusal(run("gc"), "is read-only: nothing in it can be removed")


# ---- the hub, and what is imported -----------------------------------------------------------


def test_the_hub_by_its_environment(tmp_path: Path, cache: Path) -> None:
    """HF_ENDPOINT is the library's own setting, read when it is imported: in a new process."""
    root, commit = tmp_path / "hub", "a" * 40
    contents = write_checkpoint(root / "org" / "tiny" / "resolve" / commit)
    siblings = [{"rfilename": n, "size": len(c), "blobId": ""} for n, c in contents.items()]
    api = root / "api" / "models" / "org" / "tiny" / "revision"
    api.mkdir(parents=True)
    (api / "main").write_text(json.dumps({"id": "org/tiny", "sha": commit, "siblings": siblings}))
    code = (
        "import sys; from pilotlight.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    with nginx(
        root, tmp_path / "nginx", "location /api/ { default_type application/json; }"
    ) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        arguments = ["cache", "add", "hf://org/tiny", "--no-build", "--json", "--cache", str(cache)]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert (added["source"], added["revision"]) == ("hf://org/tiny", commit)
    assert Path(added["folder"], SHARDS[0]).read_bytes() == contents[SHARDS[0]]


# ---- words and lines -------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_moves() -> None:
    out = Terminal()
    with ProgressLine("fetching", out) as line:
        for done in range(0, 3 << 20, 1 << 10):
            line.show(done, 3 << 20)
    assert "\n" not in out.getvalue()
    frames = out.getvalue().split(cache_commands.CLEAR_LINE)
    assert len(frames) < 1100
    assert "█" * 12 + "░" * 12 + " fetching  50% of 3.0 MiB, " in out.getvalue()
    assert frames[-1] == "", "the line is not cleared"
    assert max(map(len, frames)) < 80


def test_elsewhere_there_are_a_few_plain_lines() -> None:
    out = io.StringIO()
    with ProgressLine("fetching", out) as line:
        for done in range(1001):
            line.show(done, 1000)
    lines = out.getvalue().splitlines()
    assert len(lines) == 11
    assert (lines[0], lines[-1]) == ("fetching   0% of 1000 B", "fetching 100% of 1000 B")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (9 << 50, "9216.0 TiB"),
    ],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s ago"), (90, "1 min ago"), (7300, "2 h ago"), (200_000, "2 d ago")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text
