"""The builder of artefacts works where a copy of its model would not fit.

The limit is the kernel's own (RLIMIT_DATA: heap and private writable mappings), so a peak cannot
be missed between two looks.
"""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

HIDDEN, MIDDLE, VOCAB, NUM_LAYERS = 1024, 4096, 1024, 16
LIMIT_BYTES = 400 << 20
LAYER = {
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
    **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MIDDLE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _write_sparse_checkpoint(folder: Path) -> int:
    """Zeros that occupy no disk, one file; returns their number of bytes."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for index in range(NUM_LAYERS):
        shapes |= {f"model.layers.{index}.{name}.weight": s for name, s in LAYER.items()}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return end


def test_a_build_fits_where_a_copy_of_the_model_does_not(tmp_path: Path) -> None:
    num_bytes = _write_sparse_checkpoint(tmp_path / "model")
    assert num_bytes > LIMIT_BYTES
    module = (sys.executable, "-m", "pilotlight.engine.build_artefact")
    arguments = (
        "--cache",
        tmp_path / "cache",
        "--device",
        "cpu",
        "--head-dtype",
        "auto",
        "--dtype",
        "bfloat16",
        tmp_path / "model",
    )
    built = subprocess.run(
        (*module, *arguments),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES)),
    )
    assert built.returncode == 0, built.stderr
