"""mla_decode on the CPU: the rule in every layout, cases by hand, what parts and models make of it. The twin is
interpreted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from latent_caches import SCALE, Decoding, assert_decodes, decoding
from torch import Tensor

from workbench.blocks.float8_latent_cache import Float8LatentCache
from workbench.blocks.latent_attention import LatentQuery, absorbed_attention, naive_attention
from workbench_kernels import Float8Cache, mla_decode
from workbench_kernels.mla_decode import fits_twin, reference
from workbench_kernels.tier import resolve

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (60, 0, 1, 129)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("page_size", [None, 1, 16, 60, 64])
@pytest.mark.parametrize("sizes", [(1, 1, 60, 6), (3, 16, 64, 16), (1, 60, 144, 5), (3, 128, 7, 0)])
def test_obeys_the_rule(sizes: tuple[int, ...], page_size: int | None, float8: bool, dtype: torch.dtype) -> None:
    assert_decodes(mla_decode, decoding(LENGTHS, *sizes, page_size=page_size, float8=float8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(129, 129), (2, 2), (0, 0), (129,), ()])
def test_sequences_of_one_length_obey_the_rule(lengths: Sequence[int], dtype: torch.dtype) -> None:
    for page_size in (None, 16):
        assert_decodes(mla_decode, decoding(lengths, 3, 5, 60, 6, page_size=page_size, dtype=dtype))


def test_the_published_widths_obey_the_rule() -> None:
    for dtype in DTYPES:
        assert_decodes(mla_decode, decoding((129, 60), 1, 16, 512, 64, dtype=dtype))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_without_rows_nothing_comes_back(sizes: tuple[int, int], impl: str) -> None:
    found = decoding((3, 0), *sizes, 6, 2).by(partial(mla_decode, impl=impl))
    assert found.out.shape == (2, *sizes, 6) and found.lse.shape == (2, *sizes)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_two_tokens_by_hand(impl: str) -> None:
    kv_cache = torch.tensor([[[4.0, 0.0, 1.0], [0.0, 8.0, math.log(3)], [math.nan, math.nan, math.nan]]])
    q_nope, q_rope = torch.zeros(1, 3, 1, 2), torch.tensor([0.0, 5.0, 1.0]).view(1, 3, 1, 1)
    cache_seqlens = torch.tensor([2], dtype=torch.int32)
    out, lse = mla_decode(q_nope, q_rope, kv_cache, cache_seqlens=cache_seqlens, softmax_scale=1.0, impl=impl)
    # The first of three queries came before the two tokens; the second sees one token; the third weighs them e to 3.
    third = [4 * math.e / (math.e + 3), 24 / (math.e + 3)]
    torch.testing.assert_close(out.view(3, 2), torch.tensor([[0.0, 0.0], [4.0, 0.0], third]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([-math.inf, 5.0, math.log(math.e + 3)]))


def test_parts_over_other_tokens_merge_by_lse() -> None:
    whole = decoding((5, 129), 1, 3, 60, 6, dtype=torch.float64)
    assert isinstance(whole.kv_cache, Tensor)
    ends = torch.tensor([2, 64], dtype=torch.int32)
    parts = [whole._replace(cache_seqlens=ends).by(mla_decode)]
    rest = torch.full_like(whole.kv_cache, torch.nan)
    for b, end in enumerate(ends.tolist()):
        rest[b, : 132 - end] = whole.kv_cache[b, end:]
    parts.append(whole._replace(kv_cache=rest, cache_seqlens=whole.cache_seqlens - ends).by(mla_decode))
    out, lse = whole.by(mla_decode)
    torch.testing.assert_close(torch.logaddexp(parts[0].lse, parts[1].lse), lse)
    merged = sum(part.out * (part.lse - lse).exp().unsqueeze(-1) for part in parts)
    torch.testing.assert_close(merged, out)


def test_agrees_with_what_the_model_decodes() -> None:
    """A float8 cache read by the op, the up-projections outside of it, and decompressed for `naive_attention`."""
    torch.manual_seed(0)
    num_heads, key_width, value_width, latent_width, rope_width = 4, 6, 5, 140, 8
    cache = Float8LatentCache(2, 12, kv_lora_rank=latent_width, qk_rope_head_dim=rope_width, device=torch.device("cpu"))
    cache.append(torch.randn(2, 9, latent_width), torch.randn(2, 9, rope_width))
    up = torch.randn(num_heads, key_width + value_width, latent_width)
    query = LatentQuery(torch.randn(2, 3, num_heads, key_width), torch.randn(2, 3, num_heads, rope_width))
    found = absorbed_attention(query, cache.packed(torch.float32), up, scale=0.1)
    expected = naive_attention(query, *cache.parts(torch.float32), up, scale=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_takes_any_strides() -> None:
    plain = decoding(LENGTHS, 2, 3, 60, 6)
    assert isinstance(plain.kv_cache, Tensor)
    expected = plain.by(reference)
    for axes in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        back = torch.tensor(axes).argsort().tolist()
        turned = plain.kv_cache.permute(axes).contiguous().permute(back)
        q_nope, q_rope = (query.transpose(1, 2).contiguous().transpose(1, 2) for query in plain[:2])
        found = plain._replace(q_nope=q_nope, q_rope=q_rope, kv_cache=turned).by(mla_decode)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_come_through_the_definition_alone() -> None:
    plain = decoding((3, 1), 2, 2, 5, 2, dtype=torch.float64)

    def decode(q_nope: Tensor, q_rope: Tensor, impl: str = "reference") -> Tensor:
        return plain._replace(q_nope=q_nope, q_rope=q_rope).by(partial(mla_decode, impl=impl)).out

    q_nope, q_rope = (query.clone().requires_grad_() for query in plain[:2])
    assert torch.autograd.gradcheck(decode, (q_nope, q_rope))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        decode(q_nope, q_rope, "auto").sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_is_registered_correctly(dtype: torch.dtype) -> None:
    for page_size in (None, 4):
        q_nope, q_rope, cache, table, lengths = decoding((5, 0), 2, 3, 6, 2, page_size=page_size, dtype=dtype)
        arguments = (q_nope, q_rope, cache, None, None, table, lengths, SCALE, False)
        torch.library.opcheck(torch.ops.workbench_kernels.mla_decode.default, arguments)
    q_nope, q_rope, cache, table, lengths = decoding((5, 0), 2, 3, 6, 2, float8=True, dtype=dtype)
    arguments = (q_nope, q_rope, *cache, table, lengths, SCALE, False)
    # Not its schema: torch cannot compare float8 with itself.
    tests = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.workbench_kernels.mla_decode.default, arguments, test_utils=tests)


@pytest.mark.parametrize("float8", [False, True])
def test_compiles_as_one_graph(float8: bool) -> None:
    arguments = decoding((5, 2), 2, 3, 6, 2, page_size=4, float8=float8)
    compiled = torch.compile(mla_decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(arguments.by(compiled), arguments.by(mla_decode), rtol=0, atol=0)


PLAIN, NARROW = decoding((3, 2), 1, 2, 5, 3), decoding((3, 2), 1, 2, 5, 3, float8=True)
PAGED = decoding((3, 2), 1, 2, 5, 3, page_size=2)
PAGED_TO_NOWHERE = torch.full((2, 3), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("plain", "change", "message"),
    [
        (PLAIN, {"q_rope": torch.ones(2, 1, 3, 3)}, r"\[B, T, H, C\] and \[B, T, H, R\]"),
        (PLAIN, {"q_nope": torch.ones(2, 1, 2, 0)}, "with C > 0"),
        (PLAIN, {"q_rope": PLAIN.q_rope.double()}, "must have one floating dtype"),
        (PLAIN, {"kv_cache": torch.ones(2, 6, 7)}, r"C \+ R = 8"),
        (PLAIN, {"kv_cache": torch.ones(2, 6, 8).half()}, "must be torch.float32"),
        (PLAIN, {"kv_cache": torch.ones(3, 6, 8)}, "must be of 2 sequences"),
        (PLAIN, {"cache_seqlens": torch.ones(2)}, r"must be torch.int32 \[2\]"),
        (PLAIN, {"cache_seqlens": torch.tensor([3, 7], dtype=torch.int32)}, r"must lie in 0..6"),
        (PLAIN, {"cache_seqlens": torch.tensor([-1, 2], dtype=torch.int32)}, r"must lie in 0..6"),
        (PLAIN, {"impl": "fused"}, "only with TRITON_INTERPRET=1"),
        (PAGED, {"block_table": torch.ones(3, 2, dtype=torch.int32)}, r"must be torch.int32 \[2, pages\]"),
        (PAGED, {"block_table": torch.ones(2, 2)}, r"must be torch.int32 \[2, pages\]"),
        (PAGED, {"kv_cache": torch.ones(4, 0, 8)}, "pages, of at least one token each"),
        (PAGED, {"kv_cache": torch.ones(0, 2, 8)}, "must have pages"),
        (PAGED, {"block_table": PAGED_TO_NOWHERE}, r"block_table names pages -1\.\."),
        (PAGED, {"cache_seqlens": torch.tensor([3, 7], dtype=torch.int32)}, r"must lie in 0..6"),
        (NARROW, {"scale": torch.ones(2, 6, 2)}, r"kv_cache.scale \[2, 6, 2\] must be \[..., ..., 1\]"),
        (NARROW, {"rope": torch.ones(2, 5, 3)}, "kv_cache.rope"),
        (NARROW, {"latent": torch.ones(2, 6, 5)}, "must be torch.float8_e4m3fn"),
    ],
)
def test_refuses(plain: Decoding, change: dict, message: str) -> None:
    if isinstance(plain.kv_cache, Float8Cache) and "impl" not in change:
        change = {"kv_cache": plain.kv_cache._replace(**change)}
    with pytest.raises(ValueError, match=message):
        mla_decode(**{**plain._asdict(), "softmax_scale": SCALE, **change})


def test_auto_on_a_gpu_takes_the_definition_for_widths_without_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.tier.find_spec", lambda name: object())
    for widths, tier in (((512, 64), "fused"), ((60, 6), "fused"), ((72, 64), "reference"), ((576, 64), "reference")):
        fits = fits_twin(*widths)
        assert resolve("mla_decode", "auto", torch.device("cuda"), torch.bfloat16, fits=fits) == tier


def test_an_infinite_later_key_reaches_no_earlier_query() -> None:
    query, rope, cache = torch.randn(1, 2, 3, 6), torch.randn(1, 2, 3, 2), torch.randn(1, 4, 8)
    later = cache.clone()
    later[0, 3, 6:] = torch.inf  # the positional key of the last token
    lengths = torch.tensor([4], dtype=torch.int32)
    found, expected = (mla_decode(query, rope, x, cache_seqlens=lengths, softmax_scale=SCALE) for x in (later, cache))
    torch.testing.assert_close(found.out[:, 0], expected.out[:, 0])
    torch.testing.assert_close(found.lse[:, 0], expected.lse[:, 0])


def test_lse_is_exact_where_the_first_token_is_far_below_the_others() -> None:
    query, cache = torch.randn(1, 1, 1, 16), 0.3 * torch.randn(1, 20, 20)
    cache[0, 0, :16] = -1e6 * query[0, 0, 0] / query.square().sum()
    lengths, rope = torch.tensor([20], dtype=torch.int32), torch.zeros(1, 1, 1, 4)
    ours, exact = (
        mla_decode(query.to(x), rope.to(x), cache.to(x), cache_seqlens=lengths, softmax_scale=1.0).lse
        for x in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
