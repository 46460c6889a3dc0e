"""`pilotlight bench accuracy`: how well a model predicts a text, and how far it is from another.

The engine's own network and kernels, on the processor, each text at once, without scheduler or
server. Bits per byte are comparable between tokenizers; with --against, both models read the same
tokens, and their predictions are compared token by token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ..demo.train import read_corpus
from ..engine.config import EngineConfig
from ..engine.errors import CheckpointError, ConfigError
from ..engine.models.config import ModelConfig, read_model_config
from ..engine.models.decoder import Decoder, LayerCache
from ..engine.models.names import check_tensors, expected_tensors, find_quantized
from ..engine.models.weights import Preparer, assemble
from ..engine.target import choose_target
from ..engine.worker.load import DTYPES, dtype_name
from ..engine.worker.whole_prompt import CPU, caches_for, whole_prompt
from ..kernels.table import bind
from ..server.config import DEMO_MODEL
from ..weights_cache.manifest import read_manifest
from ..weights_cache.stream.mapped import MappedWeights

ROWS_AT_ONCE = 128
"""Of logits: one row is as long as the vocabulary."""
EPILOG = """\
Without --text the text is that part of Python's standard library which the built-in model was not
trained on. Each file is read from an end-of-text token on, in windows of --length tokens.

  bits per byte    what the text costs, coded by the model's predictions: lower is better
  top-1 agreement  of positions, where both models' most likely token is the same
  KL               of the other model's predictions from this one's, nats a token, mean

examples:
  pilotlight bench accuracy QUANTISED --against ORIGINAL --text held-out.txt
  pilotlight bench accuracy --kv-cache-dtype int8
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    settings = EngineConfig(
        model=arguments.model, dtype=arguments.dtype, kv_cache_dtype=arguments.kv_cache_dtype
    )
    model = Network(settings, arguments.length)
    other = None
    if arguments.against:
        beside = EngineConfig(model=arguments.against, dtype=arguments.against_dtype)
        other = Network(beside, arguments.length)
        check_comparable(model, other)
    windows = Windows(_texts(arguments.text), model, arguments.length, arguments.max_tokens)
    result = {"model": arguments.model, "quantisation": model.quantisation,
              "dtype": arguments.dtype, "kv_cache_dtype": model.kv_cache_dtype,
              **measured(model, other, windows)}  # fmt: skip
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pilotlight bench accuracy",
        description="How well a model predicts a text, and how far it is from another model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", default=str(DEMO_MODEL), help="checkpoint folder (default: the demo)")
    add("--against", metavar="MODEL", help="the model that it should be like: the unquantised one")
    add("--text", type=Path, action="append", metavar="FILE", help="repeatable")
    dtypes = tuple(DTYPES)
    add("--dtype", choices=dtypes, default="bfloat16", help="(default: %(default)s)")
    add("--against-dtype", choices=dtypes, default="bfloat16", help="(default: %(default)s)")
    caches = ("auto", "plain", "int8", "fp8")
    add("--kv-cache-dtype", choices=caches, default="auto", help="of MODEL's cache")
    add("--length", type=int, default=1024, metavar="TOKENS",
        help="of a window (default: %(default)s)")  # fmt: skip
    add("--max-tokens", type=int, default=0, metavar="N", help="end after N; 0: the whole text")
    return parser


def _texts(files: Sequence[Path] | None) -> list[str]:
    """Raises ConfigError."""
    if not files:
        return read_corpus(Path(sysconfig.get_paths()["stdlib"]))[1]
    try:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    except OSError as error:
        raise ConfigError(f"--text {error.filename}: {error.strerror}") from error
    if not any(texts):
        raise ConfigError("--text: the text is empty")
    return texts


# ---- networks ------------------------------------------------------------------------------------


class Network:
    """A checkpoint as the engine computes it, for sequences of at most `length` tokens."""

    def __init__(self, settings: EngineConfig, length: int) -> None:
        self.folder, dtype = Path(settings.model), DTYPES[settings.dtype]
        manifest = read_manifest(self.folder)
        self.config = find_quantized(read_model_config(self.folder), manifest)
        check_tensors(self.config, manifest)
        if not 0 < length <= self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ConfigError(f"--length is {length}: {self.folder} takes 1 to {limit}")
        preparer = Preparer(
            MappedWeights(manifest), CPU, dtype, biases=expected_tensors(self.config)
        )
        layout = choose_target(settings, "").layout
        weights = assemble(self.config, layout, preparer)
        self._decoder = Decoder(self.config, weights, bind(CPU, dtype), length, lambda: None)
        self._caches: list[LayerCache] = caches_for(self.config, settings, dtype, length, layout)

    @property
    def quantisation(self) -> str:
        return str(self.config.quantization) if self.config.quantized else "none"

    @property
    def kv_cache_dtype(self) -> str:
        return dtype_name(self._caches[0].k.dtype)

    def log_probabilities(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Natural logs, [at most ROWS_AT_ONCE, vocabulary], after each token in turn."""
        batch = whole_prompt(len(token_ids))
        hidden = self._decoder.forward(token_ids.to(torch.int32), batch, self._caches)
        for some in hidden.split(ROWS_AT_ONCE):
            yield log_softmax(self._decoder.logits(some), dim=-1)


def check_comparable(model: Network, other: Network) -> None:
    """Raises ConfigError where predictions of the two are not about the same tokens."""
    sizes = model.config.vocab_size, other.config.vocab_size
    texts = [_tokenizer_file(network).read_bytes() for network in (model, other)]
    if sizes[0] != sizes[1] or texts[0] != texts[1]:
        raise ConfigError(
            f"--against {other.folder}: its tokens ({sizes[1]}) are not those of {model.folder} "
            f"({sizes[0]}); compare models that share a tokenizer"
        )


def _tokenizer_file(network: Network) -> Path:
    path = network.folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{network.folder} has no tokenizer.json: text cannot become tokens")
    return path


class Windows:
    """Texts as the model reads them: each from an end-of-text token on, in pieces."""

    def __init__(self, texts: Sequence[str], model: Network, length: int, max_tokens: int) -> None:
        tokenizer = Tokenizer.from_file(str(_tokenizer_file(model)))
        end = _first_token(model.config)
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self._streams = [torch.tensor([end, *encoding.ids]) for encoding in encodings]
        self._length = length
        self._max_tokens = max_tokens or math.inf
        num_tokens = sum(len(ids) - 1 for ids in self._streams)
        num_bytes = sum(len(text.encode()) for text in texts)
        self._bytes_per_token = num_bytes / max(1, num_tokens)

    def num_bytes(self, num_tokens: int) -> float:
        """Of the text, in proportion where it was not read to its end."""
        return num_tokens * self._bytes_per_token

    def __iter__(self) -> Iterator[Tensor]:
        """Token ids, one more than are computed: each is predicted from those before it."""
        num_tokens = 0
        for ids in self._streams:
            for start in range(0, len(ids) - 1, self._length):
                if num_tokens >= self._max_tokens:
                    return
                window = ids[start : start + self._length + 1]
                num_tokens += len(window) - 1
                yield window


def _first_token(config: ModelConfig) -> int:
    return config.eos_token_ids[0] if config.eos_token_ids else 0


# ---- figures -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sums:
    num_tokens: int = 0
    nats: float = 0.0
    other_nats: float = 0.0
    kl_nats: float = 0.0
    num_agreed: int = 0

    def add(self, found: Tensor, target: Tensor) -> None:
        self.num_tokens += len(target)
        self.nats += cross_entropy(found, target, reduction="sum").item()

    def compare(self, found: Tensor, other: Tensor, target: Tensor) -> None:
        self.other_nats += cross_entropy(other, target, reduction="sum").item()
        self.kl_nats += kl_div(found, other, reduction="sum", log_target=True).item()
        self.num_agreed += int((found.argmax(-1) == other.argmax(-1)).sum())


@torch.inference_mode()
def measured(model: Network, other: Network | None, windows: Windows) -> dict[str, Any]:
    sums = Sums()
    for window in windows:
        targets = window[1:].split(ROWS_AT_ONCE)
        beside = other.log_probabilities(window[:-1]) if other else None
        for found, target in zip(model.log_probabilities(window[:-1]), targets, strict=True):
            sums.add(found, target)
            if beside is not None:
                sums.compare(found, next(beside), target)
        print(f"\rpilotlight: {sums.num_tokens} tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return _figures(sums, windows, other)


def _figures(sums: Sums, windows: Windows, other: Network | None) -> dict[str, Any]:
    num_bytes = windows.num_bytes(sums.num_tokens)

    def bits(nats: float) -> float:
        return round(nats / math.log(2) / num_bytes, 5)

    figures: dict[str, Any] = {
        "num_tokens": sums.num_tokens,
        "bits_per_byte": bits(sums.nats),
        "perplexity": round(math.exp(sums.nats / sums.num_tokens), 4),
    }
    if other:
        figures |= {
            "against": str(other.folder),
            "against_bits_per_byte": bits(sums.other_nats),
            "loss_percent": round(100 * (sums.nats / sums.other_nats - 1), 3),
            "top1_agreement": round(sums.num_agreed / sums.num_tokens, 5),
            "kl_nats": round(sums.kl_nats / sums.num_tokens, 6),
        }
    return figures
