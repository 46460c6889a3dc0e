"""Bits per byte of the built-in model on its held-out text, as the engine's network computes it.

    python -m pilotlight.demo.quality --kv-cache-dtype int8

What an option costs in quality. Knows the corpus from train.py; knows no scheduler and no server.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..engine.config import EngineConfig
from ..engine.models.config import ModelConfig, read_model_config
from ..engine.models.decoder import Decoder, LayerCache
from ..engine.models.names import expected_tensors, find_quantized
from ..engine.models.weights import Preparer, assemble
from ..engine.target import choose_target
from ..engine.worker.load import DTYPES, dtype_name
from ..engine.worker.whole_prompt import CPU, caches_for, whole_prompt
from ..kernels.table import bind
from ..weights_cache.manifest import read_manifest
from ..weights_cache.stream.mapped import MappedWeights
from .train import END, read_corpus

MODEL = Path(__file__).parent / "model"


class Windows:
    """The held-out texts as the model reads them: each from an end token on, in pieces."""

    def __init__(self, texts: list[str], length: int) -> None:
        tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        end: int = tokenizer.token_to_id(END)  # type: ignore[assignment]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        self._streams = [torch.tensor([end, *encoding.ids]) for encoding in encodings]
        self._length = length
        self.num_bytes = sum(len(text.encode()) for text in texts)

    def __iter__(self) -> Iterator[Tensor]:
        """Token ids, one more than are computed: each is predicted from those before it."""
        for ids in self._streams:
            for start in range(0, len(ids) - 1, self._length):
                yield ids[start : start + self._length + 1]


def decoder_for(settings: EngineConfig, context_len: int) -> tuple[ModelConfig, Decoder]:
    folder, dtype = Path(settings.model), DTYPES[settings.dtype]
    manifest = read_manifest(folder)
    config = find_quantized(read_model_config(folder), manifest)
    preparer = Preparer(MappedWeights(manifest), CPU, dtype, biases=expected_tensors(config))
    weights = assemble(config, choose_target(settings, "").layout, preparer)
    return config, Decoder(config, weights, bind(CPU, dtype), context_len, lambda: None)


@torch.inference_mode()
def bits_per_byte(decoder: Decoder, caches: list[LayerCache], windows: Windows) -> float:
    nats = 0.0
    for window in windows:
        batch = whole_prompt(len(window) - 1)
        hidden = decoder.forward(window[:-1].to(torch.int32), batch, caches)
        nats += cross_entropy(decoder.logits(hidden), window[1:], reduction="sum").item()
    return nats / math.log(2) / windows.num_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="the built-in model, or one made of it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    arguments = parser.parse_args()
    settings = EngineConfig(
        model=arguments.model, dtype=arguments.dtype, kv_cache_dtype=arguments.kv_cache_dtype
    )
    _, texts = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    config, decoder = decoder_for(settings, arguments.length)
    caches = caches_for(config, settings, DTYPES[settings.dtype], arguments.length)
    figure = bits_per_byte(decoder, caches, Windows(texts, arguments.length))
    quantisation = str(config.quantization) if config.quantized else "none"
    names = {
        "quantisation": quantisation,
        "dtype": settings.dtype,
        "kv_cache_dtype": dtype_name(caches[0].k.dtype),
    }
    print(json.dumps({**names, "bits_per_byte": round(figure, 5)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
