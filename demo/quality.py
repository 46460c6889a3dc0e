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
from ..engine.models.decoder import AttentionBatch, Decoder, LayerCache
from ..engine.models.weights import Preparer, assemble
from ..engine.target import choose_target
from ..engine.worker.kv_cache import KvPlan, allocate, block_bytes, cache_dtype
from ..engine.worker.load import CPU, DTYPES, dtype_name
from ..kernels.table import bind
from ..weights_cache.manifest import read_manifest
from ..weights_cache.stream.mapped import MappedWeights
from .train import END, read_corpus

BLOCK_SIZE = 16
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
    config, dtype = read_model_config(MODEL), DTYPES[settings.dtype]
    preparer = Preparer(MappedWeights(read_manifest(MODEL)), CPU, dtype)
    weights = assemble(config, choose_target(settings, "").layout, preparer)
    return config, Decoder(config, weights, bind(CPU, dtype), context_len, lambda: None)


def caches_for(config: ModelConfig, settings: EngineConfig, context_len: int) -> list[LayerCache]:
    dtype = cache_dtype(settings, DTYPES[settings.dtype])
    num_blocks = -(-context_len // BLOCK_SIZE)
    one_block = block_bytes(config, BLOCK_SIZE, dtype)
    return allocate(KvPlan(num_blocks, BLOCK_SIZE, one_block, context_len), config, CPU, dtype)


def whole_prompt(num_tokens: int) -> AttentionBatch:
    """One sequence, computed at once, its tokens in the cache from its beginning."""
    places = torch.arange(num_tokens, dtype=torch.int32)
    return AttentionBatch(
        positions=places,
        slot_mapping=places,
        block_tables=torch.arange(-(-num_tokens // BLOCK_SIZE), dtype=torch.int32)[None],
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32),
    )


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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    arguments = parser.parse_args()
    settings = EngineConfig(
        model=str(MODEL), dtype=arguments.dtype, kv_cache_dtype=arguments.kv_cache_dtype
    )
    _, texts = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    config, decoder = decoder_for(settings, arguments.length)
    caches = caches_for(config, settings, arguments.length)
    figure = bits_per_byte(decoder, caches, Windows(texts, arguments.length))
    names = {"dtype": settings.dtype, "kv_cache_dtype": dtype_name(caches[0].k.dtype)}
    print(json.dumps({**names, "bits_per_byte": round(figure, 5)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
