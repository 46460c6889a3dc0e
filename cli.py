"""The command line: parses, then hands over. Imports what a command needs when it is given."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .engine.errors import ConfigError, PilotlightError

SERVE_EPILOG = """\
examples:
  pilotlight serve                                 the built-in demo model on 127.0.0.1:50051
  pilotlight serve /models/qwen2-0.5b --host 0.0.0.0
  pilotlight serve hf://Qwen/Qwen2.5-0.5B-Instruct fetched once, then served from the cache
  pilotlight serve --config serve.toml --port 0    a flag wins over the file

Every flag can stand in the TOML file by its name: max-model-len = 4096, kv-cache-bytes = "4GiB",
model = "/models/qwen2-0.5b".

Both ports answer before the model is loaded: liveness SERVING, readiness NOT_SERVING, WatchStartup
and /startup moving. Readiness turns SERVING after the first real token. SIGTERM drains: readiness
off, new requests UNAVAILABLE, running streams finish inside --drain-timeout, exit 0; a second
SIGTERM ends at once. Exit codes: 0 drained, 1 the engine failed for good, 2 a mistake in what was
asked.
"""

GENERATE_EPILOG = """\
examples:
  pilotlight generate "def fibonacci(n):" --max-tokens 64
  pilotlight generate --prompt-ids 5,6,7 --ignore-eos --json
  pilotlight generate --chat "What is a pilot light?" --temperature 0
"""

ADMIN_EPILOG = """\
orders:
  load [MODEL]   STANDBY -> READY: load this folder (default: the server's own MODEL, else the demo)
  unload         READY or SLEEPING -> STANDBY: give the memory back, forget the model
  sleep          READY -> SLEEPING: give the memory back, remember the model
  wake           SLEEPING -> READY: load it again

a warm pool, by hand:
  pilotlight serve --standby --admin-port 50052 &
  pilotlight admin load /models/qwen2-0.5b --target 127.0.0.1:50052
  pilotlight admin sleep --target 127.0.0.1:50052

Each order returns when it is done; leaving earlier (--timeout, ^C) does not stop it. Requests that
run when their model is unloaded or put to sleep end as aborted. Exit codes: 0 done, 1 refused or
failed, 2 a mistake in the command.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    from .server.start import early_engine

    words = sys.argv[1:] if argv is None else argv
    # Only for the command line of this very process: a caller from Python may do without.
    spawned = early_engine(words) if argv is None else None
    try:
        return _run(words, spawned)
    finally:
        if spawned is not None:
            spawned.discard()


def _unknown(rest: list[str], words: list[str]) -> str:
    """What was not understood, what may have been meant, and where it all stands."""
    from .server.options import OPTIONS

    command = next(word for word in words if not word.startswith("-"))
    flags = [option.flag for option in OPTIONS] if command == "serve" else []
    near = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown: {' '.join(rest)}; {hint}`pilotlight {command} --help` explains all"


def _run(words: list[str], spawned: Any) -> int:
    top = parser()
    arguments, rest = top.parse_known_args(words)
    if rest and arguments.command not in (_bench, _quantize):
        print(f"pilotlight: {_unknown(rest, words)}", file=sys.stderr)
        raise SystemExit(2)
    arguments.rest, arguments.spawned = rest, spawned
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except PilotlightError as error:
        print(f"pilotlight: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has enough.
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pilotlight",
        description="LLM inference over gRPC, built around the time from start to first token.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_generate(commands)
    _add_admin(commands)
    _add_cache(commands)
    _add_quantize(commands)
    _add_bench(commands)
    doctor = commands.add_parser("doctor", help="say what is in use on this machine, and why")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    doctor.set_defaults(command=_doctor)
    demo = commands.add_parser("demo", help="serve the built-in model once, from boot to drain")
    demo.set_defaults(command=_demo)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=_version)
    return top


# ---- serve -----------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    from .server.config import default_of
    from .server.options import GROUPS, OPTIONS

    serve = commands.add_parser(
        "serve",
        help="serve a model over gRPC",
        description="Serve one model over gRPC, with an ops port beside it.",
        epilog=SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    help_text = (
        "folder of a Hugging Face checkpoint (default: the built-in demo model), or "
        "hf://org/name[@revision], https://host/folder/ or s3://bucket/prefix/, which are fetched "
        "into the cache first"
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help=help_text)
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file of these options")
    for key, title in GROUPS.items():
        group = serve.add_argument_group(title)
        for option in OPTIONS:
            if option.group == key:
                _add_option(group, option, default_of(option))
    serve.set_defaults(command=_serve)


def _add_option(group: Any, option: Any, default: Any) -> None:
    shown = "" if "default:" in option.help or default == "" else f" (default: {default})"
    help_text = (option.help + shown).replace("%", "%%")
    if isinstance(default, bool):
        action = argparse.BooleanOptionalAction
        group.add_argument(option.flag, action=action, default=argparse.SUPPRESS, help=help_text)
    elif option.choices:
        group.add_argument(option.flag, choices=option.choices, help=help_text)
    else:
        kind = str if option.is_size else type(default)
        group.add_argument(option.flag, type=kind, metavar=option.metavar, help=help_text)


def _serve(arguments: argparse.Namespace) -> int:
    from .server.config import ServeConfig, serve_config

    given = vars(arguments)
    flags = {name: given[name] for name in ServeConfig.__struct_fields__ if name in given}
    config = serve_config(flags, given.get("config"))
    from .server.start import main as serve

    return serve(config, arguments.spawned)


# ---- generate --------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="send one request to a server and stream the answer",
        epilog=GENERATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prompt = generate.add_argument_group("the prompt, one of").add_mutually_exclusive_group()
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="text; - reads standard input")
    prompt.add_argument("--prompt-ids", type=_ids, metavar="5,6,7", help="token ids")
    prompt.add_argument("--chat", metavar="TEXT", help="one user message, by the model's template")
    add = generate.add_argument
    add("--target", default="127.0.0.1:50051", metavar="HOST:PORT", help="(default: %(default)s)")
    add("--model", default="", help="refuse any other model than this")
    add("--max-tokens", type=int, metavar="N", help="(default: 512)")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's)")
    add("--top-k", type=int, metavar="K", help="sample among the K best; 0: all")
    add("--top-p", type=float, metavar="P", help="sample among the best of this total probability")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the best's probability")
    add("--seed", type=int, metavar="N", help="same seed, same tokens")
    add("--n", type=int, metavar="N", help="samples of the one prompt, at most 8")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable")
    add("--ignore-eos", action="store_true", help="go on past the end token")
    add("--timeout", type=float, metavar="SECONDS", help="deadline of the request")
    add("--json", action="store_true", help="last line: the whole answer as JSON")
    generate.set_defaults(command=_generate)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 5,6,7") from None


def _generate(arguments: argparse.Namespace) -> int:
    from .client.generate import generate

    request = _request(arguments)
    return generate(arguments.target, request, as_json=arguments.json, timeout_s=arguments.timeout)


def _request(arguments: argparse.Namespace) -> Any:
    from .client.generate import Prompt
    from .proto import inference_pb2 as pb

    request = pb.GenerateRequest(model=arguments.model)
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt or ""
    if not (text or arguments.prompt_ids or arguments.chat):
        raise ConfigError("no prompt: give PROMPT, --prompt-ids or --chat")
    Prompt(text, arguments.prompt_ids or (), arguments.chat or "").fill(request)
    try:
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "n"):
            if getattr(arguments, name) is not None:
                setattr(request.sampling, name, getattr(arguments, name))
        if arguments.max_tokens is not None:
            request.stop.max_tokens = arguments.max_tokens
    except ValueError as error:
        raise ConfigError(f"a value does not fit its field: {error}") from error
    request.stop.strings.extend(arguments.stop)
    request.stop.ignore_eos = arguments.ignore_eos
    return request


# ---- admin -----------------------------------------------------------------------------------


def _add_admin(commands: Any) -> None:
    admin = commands.add_parser(
        "admin",
        help="load, unload, put to sleep or wake the model of a running server",
        description="Order the model of a server that runs with --admin-port.",
        epilog=ADMIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = admin.add_argument
    add("order", choices=("load", "unload", "sleep", "wake"), metavar="ORDER", help="see below")
    add("model", nargs="?", default="", metavar="MODEL", help="only for load: a checkpoint folder")
    add("--target", required=True, metavar="HOST:PORT", help="the server's admin port")
    add("--model-name", default="", metavar="NAME", help="load: name that clients may ask for")
    add("--max-model-len", type=int, metavar="TOKENS", help="load: most tokens of one sequence")
    add("--dtype", metavar="DTYPE", help="load: of weights and cache")
    add("--kv-cache-bytes", metavar="BYTES", help="load: memory of the KV cache, as 4GiB")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="(default: %(default)g)")
    add("--json", action="store_true", help="one JSON object instead of text")
    admin.set_defaults(command=_admin)


def _admin(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    names = ("model_name", "max_model_len", "dtype", "kv_cache_bytes")
    options = {name: given[name] for name in names if given[name] not in (None, "")}
    if arguments.order != "load" and (arguments.model or options):
        raise ConfigError(f"{arguments.order} takes no model: it is about the one that is there")
    if "kv_cache_bytes" in options:
        from .server.sizes import size_bytes

        options["kv_cache_bytes"] = size_bytes("--kv-cache-bytes", options["kv_cache_bytes"])
    from .client.admin import give_order

    as_json, timeout_s = arguments.json, arguments.timeout
    return give_order(
        arguments.target, arguments.order, arguments.model, options, as_json, timeout_s
    )


# ---- the others ------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure; each ends with one JSON line")
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    for name, text in (
        ("throughput", "the engine alone: token ids in, tokens per second out"),
        ("compare", "our engine and others on the same cases, in turn"),
        ("step", "where a decode step's time goes: kernels, and everything between them"),
        (
            "speculation",
            "answers with and without drafts: tokens per second, and how many were right",
        ),
        ("accuracy", "what a model predicts of a text, and how far it is from another"),
        ("pace", "what a long prompt costs streams, and what limiting that costs the prompt"),
        ("serving", "a server under load: latencies, errors, goodput"),
        ("startup", "process start to open ports, readiness, first token"),
        ("loader", "an artefact's bytes to the device, against disk and copy engine"),
        ("kernels", "each operation against its reference"),
    ):
        kind = kinds.add_parser(name, help=text, add_help=False)
        kind.set_defaults(command=_bench, kind=name)


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    module = import_module(f".bench.{arguments.kind}", __package__)
    code: int = module.main(arguments.rest)
    return code


def _add_quantize(commands: Any) -> None:
    text = "write a GPTQ checkpoint of a model"
    quantize = commands.add_parser("quantize", help=text, add_help=False)
    quantize.set_defaults(command=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    code: int = import_module(".quantize.command", __package__).main(arguments.rest)
    return code


def _add_cache(commands: Any) -> None:
    from .cache_commands import add_to

    add_to(commands)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor(as_json=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from .demo.run import main as demo

    return demo()


def _version(arguments: argparse.Namespace) -> int:
    from .server.inference import package_version

    print(f"pilotlight {package_version()}")
    return 0
