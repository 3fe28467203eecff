"""The Triton twin of mla_decode; see tests/test_kernels_twins.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED
from latent_caches import SCALE, Decoding, assert_decodes, decoding
from torch import Tensor

from workbench_kernels import Float8Cache, mla_decode

LENGTHS = (0, 1, 60, 129)
fused_decode = partial(mla_decode, impl="fused")
# Dtype of the queries, T, H, C, R, the page size, and whether the latents are float8.
CASES = [
    (torch.float16, 3, 16, 64, 16, 16, False),
    (torch.float16, 1, 128, 64, 16, 64, False),
    (torch.float16, 1, 60, 144, 16, 60, True),
    (torch.float16, 3, 1, 60, 6, 1, False),
    (torch.float32, 3, 3, 60, 6, None, True),
]
if not INTERPRETED:
    large = [(1, 128, 512, 64, 64), (2, 60, 512, 64, 60), (1, 16, 512, 64, None), (1, 60, 256, 32, 1), (3, 9, 63, 7, 9)]
    CASES = [(dtype, *sizes, float8) for dtype in DTYPES for sizes in large for float8 in (False, True)]
MUTATIONS = [
    Mutation("mla_decode_fwd_kernel", "key[None, :] <= position", "key[None, :] < position"),
    Mutation("mla_decode_fwd_kernel", "num_queries + row // num_heads", "num_queries + row % num_heads"),
    Mutation("mla_decode_fwd_kernel", "total = total * shrink", "total = total"),
    Mutation("mla_decode_fwd_kernel", "exists = key < end", "exists = key <= end"),
    Mutation("mla_decode_fwd_kernel", "+ key % page_size", "+ start % page_size"),
    Mutation("mla_decode_merge_kernel", "partial * weight[:, None]", "partial"),
    Mutation("mla_decode_merge_kernel", "part = row * num_splits + split", "part = row * num_splits"),
    Mutation("load_latents", "(first // 128)", "(first // 256)"),
    Mutation("load_latents", "decoded(latent)", "decoded(latent & 0x7F)"),
]


def assert_decodes_in(case: tuple, *, lengths: Sequence[int] = LENGTHS, **launcher: object) -> None:
    """The rule, with constants of the launcher changed: `MIN_KEYS` decides the number of parts."""
    dtype, *sizes, page_size, float8 = case
    arguments = decoding(lengths, *sizes, page_size=page_size, float8=float8, dtype=dtype, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launcher.items():
            patch.setattr(f"workbench_kernels.fused.mla_decode.{name}", value)
        assert_decodes(fused_decode, arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_obeys_the_rule(case: tuple) -> None:
    assert_decodes_in(case)


@pytest.mark.parametrize(
    "case", [(torch.float16, 3, 2, 64, 16, 16, False), (torch.float32, 1, 3, 60, 6, None, False)], ids=str
)
def test_obeys_the_rule_in_many_parts(case: tuple) -> None:
    assert_decodes_in(case, MIN_KEYS=32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_obeys_the_rule_at_the_published_widths(dtype: torch.dtype) -> None:
    """Few rows and many; of float32, score products a piece at a time."""
    for heads in (16,) if dtype == torch.float32 else (16, 17):
        assert_decodes_in((dtype, 1, heads, 512, 64, None, False), lengths=(0, 60))


def test_the_number_of_parts_does_not_matter() -> None:
    arguments, found = decoding(LENGTHS, 2, 3, 60, 6, device=DEVICE), []
    for keys in (1000, 60, 30):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workbench_kernels.fused.mla_decode.MIN_KEYS", keys)
            found.append(arguments.by(fused_decode))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_reads_float8_as_bits() -> None:
    """Every number of float8_e4m3fn, as the latents of four sequences of one token each, which decode to themselves."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(4, 1, 64)
    numbers = codes.where(codes % 128 != 127, 0)
    for bits, is_number in ((numbers, [True] * 4), (codes, [True, False, True, False])):  # the last of a sign is NaN
        latent = bits.view(torch.float8_e4m3fn)
        cache = Float8Cache(latent, torch.ones(4, 1, 1, device=DEVICE), torch.zeros(4, 1, 16, device=DEVICE))
        query = torch.zeros(4, 1, 1, 64, device=DEVICE)
        arguments = Decoding(query, query[..., :16], cache, None, torch.ones(4, dtype=torch.int32, device=DEVICE))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workbench_kernels.fused.mla_decode.MULTIPLIES_E4M3", ())
            found = arguments.by(fused_decode).out[:, 0, 0]
        assert torch.equal(found[is_number], latent[:, 0].float()[is_number])
        assert found[[not x for x in is_number]].isnan().all()


def test_reads_packed_bytes() -> None:
    """FlashMLA's layout: latents, scales and positional key of a token in one run of bytes."""
    plain = decoding(LENGTHS, 1, 2, 144, 16, page_size=16, float8=True, dtype=torch.float16, device=DEVICE)
    parts = [part.view(torch.uint8) for part in plain.kv_cache]
    packed = torch.cat(parts, dim=-1)
    latent, scale, rope = packed.split([part.shape[-1] for part in parts], dim=-1)
    cache = Float8Cache(latent.view(torch.float8_e4m3fn), scale.view(torch.float32), rope.view(torch.bfloat16))
    found, expected = plain._replace(kv_cache=cache).by(fused_decode), plain.by(fused_decode)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def proof_of(mutation: Mutation) -> Callable[[], None]:
    if "decoded" in mutation.right:
        return test_reads_float8_as_bits
    if "128" in mutation.right:
        return partial(assert_decodes_in, (torch.float16, 1, 1, 144, 16, None, True), lengths=(3,))
    scattered = (torch.float16, 3, 2, 64, 16, 16, False)
    return partial(assert_decodes_in, scattered, lengths=(0, 129), MIN_KEYS=80)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.right)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    assert_seen("mla_decode", mutation, tmp_path, proof_of(mutation))


def test_op_is_registered_correctly() -> None:
    q_nope, q_rope, cache, table, lengths = decoding((2, 0), 1, 2, 60, 6, page_size=4, device=DEVICE)
    arguments = (q_nope, q_rope, cache, None, None, table, lengths, SCALE, True)
    torch.library.opcheck(torch.ops.workbench_kernels.mla_decode.default, arguments)


def test_compiles_as_one_graph() -> None:
    arguments = decoding((2, 5), 1, 2, 60, 6, float8=True, device=DEVICE)
    compiled = torch.compile(fused_decode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(arguments.by(compiled), arguments.by(fused_decode), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 528}, "latents of up to 512 numbers"),
        ({"latent": 72}, "beyond latents of 64 both in multiples of 16, not 72 and 16"),
        ({"rope": 80}, "positional keys of 64"),
        ({"dtype": torch.float64}, "takes float32, float16 or bfloat16"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = decoding(
        **{"lengths": [2], "queries": 1, "heads": 1, "latent": 64, "rope": 16, "device": DEVICE, **change}
    )
    with pytest.raises(ValueError, match=message):
        arguments.by(fused_decode)


def test_refuses_a_cache_in_pieces() -> None:
    arguments = decoding([3, 3], 1, 1, 64, 16, device=DEVICE)
    assert isinstance(arguments.kv_cache, Tensor)
    turned = arguments.kv_cache.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="tokens follow at equal steps"):
        arguments._replace(kv_cache=turned).by(fused_decode)
