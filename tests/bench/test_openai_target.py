"""Another engine's server as a target: what is sent, how tokens are counted, how it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pilotlight.bench import serving
from pilotlight.bench.openai_target import TargetError, num_tokens_of


class Peer(BaseHTTPRequestHandler):
    """Answers as vLLM does: a piece for each token but the second, which comes with the third."""

    asked: list[dict[str, Any]]
    status = 200

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "peer", "max_model_len": 64}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        counts = [n for n in range(1, body["max_tokens"] + 1) if n != 2]
        pieces = [{"choices": [{"text": "x"}], "usage": {"completion_tokens": n}} for n in counts]
        lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
        self._send("".join(lines) + "data: [DONE]\n\n")

    def _send(self, text: str) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the tests' output."""


@pytest.fixture
def peer() -> Iterator[tuple[str, type[Peer]]]:
    handler = type("Handler", (Peer,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def bench(url: str, *words: str) -> int:
    fixed = ("--rate", "inf", "--num-requests", "3", "--input-len", "6", "--output-len", "4")
    return serving.main(["--openai", url, *fixed, *words])


def test_the_same_load_goes_to_an_openai_server(
    peer: tuple[str, type[Peer]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, handler = peer
    assert bench(url, "--openai-vocab-size", "50") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_ok"], result["model"], result["target"]) == (3, "peer", url)
    assert result["num_output_tokens"] == 12
    for body in handler.asked:
        assert len(body["prompt"]) == 6
        assert max(body["prompt"]) < 50
        assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (4, True, True)


def test_its_refusals_are_counted_by_status(
    peer: tuple[str, type[Peer]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, handler = peer
    handler.do_POST = lambda self: self.send_error(503)  # type: ignore[method-assign]
    assert bench(url) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["errors"] == {"HTTP 503": 3}
    assert "3 x HTTP 503" in err


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:9") == 1
    assert "http://127.0.0.1:9 has no models to tell" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["", ": a comment", "event: x", "data: [DONE]", 'data: {"id": 1}'])
def test_lines_without_a_count_tell_nothing_new(line: str) -> None:
    assert num_tokens_of(line, 7) == 7


def test_an_error_within_the_stream_is_one() -> None:
    with pytest.raises(TargetError, match="out of memory"):
        num_tokens_of('data: {"error": {"message": "out of memory"}}', 0)
