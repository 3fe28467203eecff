"""The Triton twin of mla_attention; see tests/test_kernels_twins.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_mutations import Mutation, assert_seen
from kernel_rules import DEVICE, DTYPES, INTERPRETED, assert_obeys_rule, results
from torch import Tensor

from workbench_kernels import mla_attention
from workbench_kernels.mla_attention import reference

# Sequences, queries, keys, heads; then the widths K, R, U.
ODD = (5, 2, 7)
TYPICAL = (128, 64, 128)
LARGE = [] if INTERPRETED else [((2, 1000, 1000, 16), TYPICAL), ((1, 300, 2000, 3), (192, 64, 256))]
# Weights that no key takes for itself: then 1 - weight would be what float32 has left of it.
SCALE = 0.1
MUTATIONS = [
    Mutation("mla_attention_fwd_kernel", "* num_queries * H + head) * BLOCK_U", "* num_queries * H + head) * BLOCK_R"),
    Mutation("mla_attention_fwd_kernel", "key[None, :] <= past + query", "key[None, :] < past + query"),
    Mutation("mla_attention_fwd_kernel", "key[None, :] >= oldest", "key[None, :] > oldest"),
    Mutation("mla_attention_fwd_kernel", "mixed * shrink[:, None]", "mixed"),
    Mutation("mla_attention_fwd_kernel", "tl.exp2(sink - largest)", "tl.exp2(sink - largest) * 0.5"),
    Mutation(
        "mla_attention_fwd_kernel", "value = _rows(value_ptr, start, length", "value = _rows(value_ptr, start, num_keys"
    ),
    Mutation("mla_attention_bwd_preprocess_kernel", "token // num_queries * H + head", "token // num_queries * H"),
    Mutation("mla_attention_bwd_preprocess_kernel", "grad * out", "grad + out"),
    Mutation("mla_attention_bwd_key_value_kernel", "key[:, None] <= past + query", "key[:, None] < past + query"),
    Mutation("mla_attention_bwd_key_value_kernel", "key[:, None] >= oldest", "key[:, None] > oldest"),
    Mutation("mla_attention_bwd_key_value_kernel", "grad_weights - delta", "grad_weights + delta"),
    Mutation("mla_attention_bwd_key_value_kernel", "grad_k_rope * scale", "grad_k_rope"),
    Mutation(
        "mla_attention_bwd_key_value_kernel",
        "grad = _rows(grad_ptr, start, end",
        "grad = _rows(grad_ptr, start, num_queries",
    ),
    Mutation("mla_attention_bwd_query_kernel", "key[None, :] <= past + query", "key[None, :] < past + query"),
    Mutation("mla_attention_bwd_query_kernel", "key[None, :] >= oldest", "key[None, :] > oldest"),
    Mutation("mla_attention_bwd_query_kernel", "grad_weights - delta", "grad_weights + delta"),
    Mutation("mla_attention_bwd_query_kernel", "begin + BLOCK_S >= stop", "begin + 99 * BLOCK_S >= stop"),
    Mutation("mla_attention_bwd_query_kernel", "grad_q_nope * scale", "grad_q_nope"),
    Mutation("mla_attention_bwd_query_kernel", "grad_q_rope * scale", "grad_q_rope"),
]


def make(
    sizes: tuple[int, int, int, int], widths: tuple[int, int, int], dtype: torch.dtype, *, sinks: bool = False
) -> list[Tensor]:
    """All inputs that have gradients; they lie as projections leave them, keys and values in one tensor."""
    torch.manual_seed(0)
    sequences, queries, keys, heads = sizes
    key_width, rope_width, value_width = widths
    query = torch.randn(sequences, queries, heads, key_width + rope_width).to(DEVICE, dtype)
    key_value = torch.randn(sequences, keys, heads, key_width + value_width).to(DEVICE, dtype)
    k_rope = torch.randn(sequences, keys, rope_width).to(DEVICE, dtype)
    q_nope, q_rope = query.split((key_width, rope_width), dim=-1)
    k_nope, value = key_value.split((key_width, value_width), dim=-1)
    return [q_nope, q_rope, k_nope, k_rope, value, *([torch.randn(heads).to(DEVICE, dtype)] if sinks else [])]


def op(kind: Callable[..., Tensor], window: int | None, ends: list[int] | None) -> Callable[..., Tensor]:
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE)

    def attend(*tensors: Tensor) -> Tensor:
        sinks = tensors[5] if len(tensors) == 6 else None
        return kind(*tensors[:5], SCALE, cu_seqlens=cu_seqlens, window=window, sinks=sinks)

    return attend


fused = partial(mla_attention, impl="fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "widths", "window", "ends", "sinks"),
    [
        ((2, 60, 60, 2), ODD, None, None, False),
        ((1, 1, 60, 2), (32, 16, 32), None, None, False),
        ((1, 129, 129, 2), ODD, None, [0, 50, 50, 120], True),
        ((1, 129, 129, 1), TYPICAL, 7, None, False),
        ((1, 60, 129, 2), ODD, 2, None, True),
        ((1, 1, 1, 2), ODD, None, None, False),
        ((2, 2, 2, 2), TYPICAL, None, None, False),
        ((1, 3, 3, 1), TYPICAL, None, [0, 1, 3], True),
        ((0, 4, 4, 2), ODD, None, None, True),
        ((2, 0, 3, 2), ODD, None, None, False),
        *((sizes, widths, None, None, False) for sizes, widths in LARGE),
    ],
)
def test_obeys_the_rule(
    sizes: tuple[int, int, int, int],
    widths: tuple[int, int, int],
    window: int | None,
    ends: list[int] | None,
    sinks: bool,
    dtype: torch.dtype,
) -> None:
    if dtype == torch.float32 and widths[2] > TYPICAL[2]:
        dtype = torch.bfloat16
    inputs = make(sizes, widths, dtype, sinks=sinks)
    assert_obeys_rule(op(fused, window, ends), op(reference, window, ends), inputs)


def test_who_sees_one_key_learns_nothing_of_it() -> None:
    """The gradients of queries and keys are zero: two products of the same numbers cancel, in another order each."""
    inputs, grad = make((1, 60, 129, 2), ODD, torch.float32), torch.randn(1, 60, 2, ODD[2], device=DEVICE)
    found, expected = (results(op(kind, 1, None), inputs, grad) for kind in (fused, reference))
    assert not any(x.any() for x in expected[1:5])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_no_document_owns_is_never_read() -> None:
    """NaN at positions beyond the last document, in the inputs and in the gradient that comes back."""
    inputs = [x.clone() for x in make((1, 40, 40, 2), ODD, torch.float32, sinks=True)]
    grad = torch.randn(1, 40, 2, ODD[2], device=DEVICE)
    for x in (*inputs[:5], grad):
        x[:, 30:] = torch.nan
    found = results(op(fused, 7, [0, 10, 30]), inputs, grad)
    expected = results(op(reference, 7, [0, 10, 30]), inputs, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all((x[:, 30:] == 0).all() for x in found[:6])


def test_documents_are_not_told_from_sequences() -> None:
    sequences = make((2, 20, 20, 2), ODD, torch.float32)
    packed = [x.reshape(1, 40, *x.shape[2:]) for x in sequences]
    torch.testing.assert_close(
        op(fused, None, [0, 20, 40])(*packed).view(2, 20, 2, ODD[2]), op(fused, None, None)(*sequences)
    )


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_sees_a_mutated_kernel(mutation: Mutation, tmp_path: Path) -> None:
    nan = mutation.wrong.endswith(("start, num_queries", "start, num_keys"))
    small = partial(test_obeys_the_rule, (2, 20, 200, 2), ODD, 197, None, True, torch.float32)
    assert_seen("mla_attention", mutation, tmp_path, test_what_no_document_owns_is_never_read if nan else small)


def test_op_is_registered_correctly() -> None:
    inputs = [x.requires_grad_() for x in make((1, 6, 6, 2), ODD, torch.float32, sinks=True)]
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        torch.ops.workbench_kernels.mla_attention.default, (*inputs, cu_seqlens, SCALE, 3, True), rtol=1e-5, atol=1e-5
    )


def test_compiles_as_one_graph() -> None:
    inputs, attend = make((1, 6, 8, 2), ODD, torch.float32), op(fused, 3, None)
    grad = torch.randn(1, 6, 2, ODD[2], device=DEVICE)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(attend, inputs, grad), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("widths", "dtype", "message"),
    [
        ((129, 64, 128), torch.float32, r"up to \(128, 64, 128\) numbers \(K, R and U\) in torch.float32, not \(129"),
        ((128, 65, 128), torch.float16, r"up to \(256, 64, 256\) numbers"),
        (ODD, torch.float64, "takes float32, float16 or bfloat16"),
    ],
)
def test_refuses(widths: tuple[int, int, int], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(fused, None, None)(*make((1, 2, 2, 1), widths, dtype))
