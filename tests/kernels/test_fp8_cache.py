"""Keys and values in float8_e4m3fn, as the reference defines them."""

from __future__ import annotations

import torch
from pilotlight.kernels.reference.paged_attention import paged_attention
from pilotlight.kernels.reference.rope_store_kv import FP8_LARGEST, rope_store_kv, stored
from pilotlight.tests.kernels.trials import CPU, cases_of

FP8 = torch.float8_e4m3fn


def test_numbers_are_rounded_and_cut_to_the_range() -> None:
    x = torch.tensor([0.0, 1.06, -1.07, 448.0, 1e6, -torch.inf, torch.nan])
    kept = stored(x, FP8).float()
    assert kept[:6].tolist() == [0.0, 1.0, -1.125, 448.0, FP8_LARGEST, -FP8_LARGEST]
    assert kept[6].isnan()
    assert torch.equal(stored(x[:6], torch.float32), x[:6])


def test_storing_is_that_of_a_wide_cache_rounded() -> None:
    wide = cases_of("rope_store_kv")["no-gqa"].make(CPU, torch.float32)
    narrow = list(cases_of("rope_store_kv")["no-gqa"].make(CPU, torch.float32))
    narrow[5], narrow[6] = narrow[5].to(FP8), narrow[6].to(FP8)
    rope_store_kv(*wide)
    rope_store_kv(*narrow)
    for place in (5, 6):
        expected = stored(wide[place], FP8)
        assert torch.equal(narrow[place].view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(narrow[0], wide[0])


def test_attention_is_that_over_the_same_numbers_kept_wide() -> None:
    q, k, v, *rest = cases_of("paged_attention")["chunked-prefill-with-decodes"].make(
        CPU, torch.bfloat16
    )
    k, v = k.to(FP8), v.to(FP8)
    expected = paged_attention(q, k.to(q.dtype), v.to(q.dtype), *rest)
    assert torch.equal(paged_attention(q, k, v, *rest), expected)
