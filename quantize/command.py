"""`pilotlight quantize MODEL OUT`: arguments, order of the work, progress. Knows no mathematics."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..engine.errors import CheckpointError, ConfigError, UnsupportedModel
from ..engine.models.config import ModelConfig, read_model_config
from ..engine.models.names import check_tensors
from ..engine.models.quantization import BITS, FORMATS, Scheme, shapes_of
from ..weights_cache.manifest import Manifest, read_manifest
from ..weights_cache.stream.mapped import MappedWeights
from .calibration import GROUPS, Calibration
from .checkpoint import check_target, tensors_of, write_checkpoint
from .rounding import Integers, calibrated, round_to_nearest

EPILOG = """\
Without --calibrate each weight is rounded to the nearest (RTN). With a text the model is run over
it first, and each matrix is rounded so that its outputs on that text change least (GPTQ): give text
of the kind that will be served. The matrices of all layers are quantised; embeddings, norms and
lm_head stay as they are. OUT is a folder in the layout that GPTQModel, vLLM, transformers and
`pilotlight serve` read.

examples:
  pilotlight quantize MODEL OUT --bits 4 --group 128 --calibrate text.txt
  pilotlight quantize MODEL OUT --bits 8
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    source, out = Path(arguments.model), Path(arguments.out)
    scheme = scheme_of(arguments)
    config, manifest = read_model_config(source), read_manifest(source)
    if config.quantization is not None:
        raise UnsupportedModel(f"{source} is quantised already; give the checkpoint it came from")
    check_tensors(config, manifest)
    check_shapes(manifest, scheme)
    check_target(source, out)
    windows = _windows(source, arguments) if arguments.calibrate else []
    began_s = time.monotonic()
    tensors = quantized(source, config, manifest, scheme, windows)
    write_checkpoint(source, out, tensors, scheme)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    method = "gptq" if windows else "rtn"
    print(json.dumps({
        "out": str(out), "method": method, "scheme": str(scheme), "num_bytes": num_bytes,
        "num_calibration_tokens": sum(map(len, windows)), "s": round(time.monotonic() - began_s, 1),
    }))  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotlight quantize",
        description="Write a GPTQ checkpoint of a model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of an unquantised checkpoint")
    add("out", metavar="OUT", help="folder to be made")
    add("--bits", type=int, default=4, choices=BITS, help="(default: %(default)s)")
    add("--group", type=int, default=128, metavar="INPUTS",
        help="inputs that share a scale; -1: all of an output (default: %(default)s)")  # fmt: skip
    add("--asym", action="store_true", help="a zero point for each group, too")
    add("--desc-act", action="store_true", help="inputs that matter most first; needs --calibrate")
    add(
        "--format",
        default="gptq",
        choices=FORMATS,
        help="how zero points are stored (default: %(default)s)",
    )
    add(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="text to calibrate on: GPTQ instead of rounding",
    )
    add("--num-samples", type=int, default=64, metavar="N",
        help="windows of the text, spread over it (default: %(default)s)")  # fmt: skip
    add("--sample-len", type=int, default=512, metavar="TOKENS", help="(default: %(default)s)")
    return parser


def scheme_of(arguments: argparse.Namespace) -> Scheme:
    per_word = 32 // arguments.bits
    if arguments.group != -1 and (arguments.group < 1 or arguments.group % per_word):
        raise ConfigError(f"--group is {arguments.group}: -1, or a multiple of {per_word}")
    if arguments.desc_act and not arguments.calibrate:
        raise ConfigError("--desc-act needs --calibrate: only a text says which inputs matter")
    if min(arguments.num_samples, arguments.sample_len) < 1:
        raise ConfigError("--num-samples and --sample-len: at least 1")
    group_size = max(arguments.group, 0)
    has_order = arguments.desc_act and group_size > 0
    is_v1 = arguments.format == "gptq"
    return Scheme(arguments.bits, group_size, not arguments.asym, has_order, is_v1)


def check_shapes(manifest: Manifest, scheme: Scheme) -> None:
    """Raises CheckpointError for a matrix that the format cannot hold."""
    for module in _modules(manifest):
        shapes_of(module, scheme, *manifest.tensors[f"{module}.weight"].shape)


def _modules(manifest: Manifest) -> list[str]:
    parts = tuple(f".{part}.weight" for names in GROUPS.values() for part in names)
    return sorted(n.removesuffix(".weight") for n in manifest.tensors if n.endswith(parts))


def _windows(source: Path, arguments: argparse.Namespace) -> list[Tensor]:
    """Pieces of the text, evenly spread over it."""
    from tokenizers import Tokenizer

    try:
        text = arguments.calibrate.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"--calibrate {arguments.calibrate}: {error.strerror}") from error
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} has no tokenizer.json: the text cannot become tokens")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int32)
    if len(ids) == 0:
        raise ConfigError(f"--calibrate {arguments.calibrate}: the text is empty")
    pieces = ids.split(arguments.sample_len)
    step = max(1, len(pieces) // arguments.num_samples)
    return list(pieces[::step][: arguments.num_samples])


def quantized(
    source: Path, config: ModelConfig, manifest: Manifest, scheme: Scheme, windows: list[Tensor]
) -> dict[str, Tensor]:
    """All tensors of the new checkpoint."""
    weights = MappedWeights(manifest)
    modules = set(_modules(manifest))
    tensors = {n: weights.tensor(n).clone() for n in manifest.tensors
               if n.removesuffix(".weight") not in modules}  # fmt: skip
    for module, found in _integers(source, config, weights, sorted(modules), scheme, windows):
        tensors |= tensors_of(module, found, scheme)
        _say(f"{module}: {scheme}")
    return tensors


def _integers(
    source: Path,
    config: ModelConfig,
    weights: MappedWeights,
    modules: list[str],
    scheme: Scheme,
    windows: list[Tensor],
) -> Iterator[tuple[str, Integers]]:
    if not windows:
        for module in modules:
            yield module, round_to_nearest(weights.tensor(f"{module}.weight").float(), scheme)
        return
    calibration = Calibration(source, config, windows)
    step = calibration.layers_at_once()
    for first in range(0, config.num_layers, step):
        layers = range(first, min(first + step, config.num_layers))
        _say(f"reading the text for layers {layers.start} to {layers.stop - 1}")
        for module, hessian in calibration.hessians(layers, lambda: None):
            yield module, calibrated(weights.tensor(f"{module}.weight").float(), hessian, scheme)


def _say(text: str) -> None:
    print(f"pilotlight: {text}", file=sys.stderr, flush=True)
