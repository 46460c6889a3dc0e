"""Caches of 16-bit integers: what lies where, how fine they are, and that sums never overflow.

test_kernels.py compares the operations over them with their references; here sums are exact.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pilotlight.kernels import cache_panels, table
from pilotlight.kernels.cpu import native
from torch import Tensor

needs_native = pytest.mark.skipif(
    native.library() is None, reason=native.missing_reason() or "the library is there"
)
NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM = 3, 32, 2, 48


@pytest.fixture(autouse=True)
def best_level() -> object:
    yield
    for name in native.levels()[:1]:
        native.force_level(name)


def numbered() -> Tensor:
    """[num_blocks, block_size, Hk, D], no two alike."""
    shape = NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_DIM
    return torch.arange(NUM_BLOCKS * BLOCK_SIZE * NUM_HEADS * HEAD_DIM).view(shape)


def test_panels_hold_what_their_names_say() -> None:
    x = numbered()
    keys, values, scales = cache_panels.shapes(*x.shape)
    k, v, s = cache_panels.key_panels(x), cache_panels.value_panels(x), x[..., 0]
    assert k.shape == keys and v.shape == values
    assert cache_panels.scale_panels(s).shape == scales
    # Block 2, token 21, head 1, element 35.
    assert k[2, 1, 1, 17, 5, 1] == v[2, 1, 1, 2, 2, 3, 1] == x[2, 21, 1, 35]
    assert cache_panels.scale_panels(s)[2, 1, 1, 5] == s[2, 21, 1]
    assert torch.equal(cache_panels.keys_of(k), x) and torch.equal(cache_panels.values_of(v), x)
    assert torch.equal(cache_panels.scales_of(cache_panels.scale_panels(s)), s)


def test_integers_are_finer_than_bfloat16_where_it_counts() -> None:
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    integers, scales = cache_panels.integers(x)
    assert integers.abs().amax() == cache_panels.LARGEST
    error = (integers * scales[:, None] - x).pow(2).mean()
    assert error < (x.bfloat16().float() - x).pow(2).mean() / 50


def attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query over all tokens of one block: what the library makes of it. q: [Hq, D] bfloat16;
    k, v: [tokens, Hk, D]."""
    num_blocks = len(k) // 16
    blocks = k.view(num_blocks, 16, *k.shape[1:]), v.view(num_blocks, 16, *v.shape[1:])
    (ki, ks), (vi, vs) = (cache_panels.integers(x) for x in blocks)
    cache = (
        cache_panels.key_panels(ki), cache_panels.value_panels(vi),
        cache_panels.scale_panels(ks), cache_panels.scale_panels(vs),
    )  # fmt: skip
    tables = torch.arange(num_blocks, dtype=torch.int32)[None]
    lists = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([len(k)], dtype=torch.int32)
    op = table.Implementation("paged_attention_int16", "cpu")
    arguments = q[None], *cache, tables, *lists, scale, 0
    assert op.accepts(*arguments)
    out: Tensor = op.function()(*arguments)
    return out.view(q.shape)


@needs_native
@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("head_dim", (16, 128, 256))
def test_the_largest_sums_there_can_be(level: str, head_dim: int) -> None:
    """All elements as large as any: products add up to what 32 bits just hold."""
    native.force_level(level)
    for sign in (1, -1):
        q = torch.full((2, head_dim), float(sign)).bfloat16()
        k = torch.ones(128, 1, head_dim)
        v = torch.linspace(-1, 1, 128)[:, None, None].expand(128, 1, head_dim).clone()
        v[:, :, 0] = 1
        out = attended(q, k, v, 1 / head_dim).float()
        assert (out[:, 0] == 1).all() and out[:, 1:].abs().max() < 1e-3
        # Were a score to overflow, the one key that is the other way round would be the largest.
        k[77] = -1
        out = attended(q, k, k, 40 / head_dim).float()
        wanted = 1 if sign == 1 else -1
        assert torch.allclose(out, torch.full_like(out, wanted), atol=1e-2)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    powers=st.lists(st.integers(-80, 80), min_size=48, max_size=48),
    query_power=st.integers(-60, 60),
)
def test_values_of_any_size_are_weighed_as_the_reference_does(
    seed: int, powers: list[int], query_power: int
) -> None:
    """Each token's values have a power of two of their own."""
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(3, 32, generator=generator) * 2.0**query_power).bfloat16()
    k = torch.randn(48, 1, 32, generator=generator) * 2.0**-query_power
    v = torch.randn(48, 1, 32, generator=generator) * torch.tensor(powers).exp2()[:, None, None]
    (ki, ks), (vi, vs) = cache_panels.integers(k), cache_panels.integers(v)
    scores = q.float() @ (ki * ks[..., None])[:, 0].T
    weights = (scores * 32**-0.5).softmax(-1)
    values = (vi * vs[..., None])[:, 0]
    parts = weights[:, :, None].abs() * values.abs()[None]
    wanted, room = weights @ values, parts.sum(1).amax(-1, keepdim=True)
    out = attended(q, k, v, 32**-0.5).float()
    # Of what is added up, not of the sum: parts may cancel each other. Weights are 0.0045 of the
    # largest off at most, bfloat16 is 0.002.
    assert ((out - wanted).abs() <= room * 0.01 + 1e-30).all()
