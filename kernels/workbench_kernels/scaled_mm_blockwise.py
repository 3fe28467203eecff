"""Multiply two FP8 matrices whose blocks have scales.

Letters: M rows of a, N rows of b, K columns of both; Q = K / 128 blocks of columns, rounded up; X several axes in one.
"""

import torch
from torch import Tensor

from workbench_kernels.quantize_blockwise import FP8, WIDTH, dequantize
from workbench_kernels.tier import check_devices, resolve, unwatched

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CHUNK = 131_072  # numbers that the torch form dequantizes at a time, from the cache


def scaled_mm_blockwise(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    impl: str = "auto",
) -> Tensor:
    """`a @ b.T` of the numbers that E4M3 values and the scales of their blocks stand for.

    The twin multiplies 128 columns at a time by the matrix units, scales that product in float32 and adds it to a
    float32 sum: those of sm_90 keep about 14 bits within one such product, other tiers 24. Forward only: no gradient
    reaches any argument.

    Args:
        a: [M, K] in float8_e4m3fn.
        b: [N, K] in float8_e4m3fn, (out, in) as `nn.Linear` stores it.
        scale_a: [M, ceil(K / 128)] in float32, as `quantize_blockwise(x, block=(1, 128))` gives it.
        scale_b: [ceil(N / 128), ceil(K / 128)] in float32, as `quantize_blockwise(x, block=(128, 128))` gives it.
        out_dtype: bfloat16, float16, float32, or float64, which is computed in float64 and has no twin.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        [M, N] in `out_dtype`, rounded to it once.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Source: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """
    _check(a, b, scale_a, scale_b, out_dtype)
    a, b, scale_a, scale_b = (tensor.detach() for tensor in (a, b, scale_a, scale_b))
    tier = resolve("scaled_mm_blockwise", impl, a.device, out_dtype)
    if tier == "reference":
        return reference(a, b, scale_a, scale_b, out_dtype)
    if tier == "torch" and unwatched(a, b, scale_a, scale_b):
        return forward(a, b, scale_a, scale_b, out_dtype)
    return _scaled_mm_blockwise(a, b, scale_a, scale_b, out_dtype, tier == "fused")


def reference(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The definition."""
    wide = torch.promote_types(out_dtype, torch.float32)
    b_NK = dequantize(b, scale_b, block_rows=WIDTH, dtype=wide)
    return (dequantize(a, scale_a, dtype=wide) @ b_NK.T).to(out_dtype)


def forward(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The fast torch form: the same product after the same numbers, found in a table and scaled in place."""
    wide = torch.promote_types(out_dtype, torch.float32)
    scale_NQ = scale_b.repeat_interleave(WIDTH, dim=0)[: b.shape[0]]
    return (dequantized(a, scale_a, wide) @ dequantized(b, scale_NQ, wide).T).to(out_dtype)


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values [M, K] times scale [M, Q]: on a CPU a table is several times as fast as torch's own conversion."""
    table = torch.arange(256, dtype=torch.uint8, device=values.device).view(FP8).to(dtype)
    wide_MK = torch.empty(values.shape, dtype=dtype, device=values.device)
    rows = max(1, _CHUNK // max(1, values.shape[1]))
    for part_MK, wide_part_MK, scale_MQ in zip(*(x.split(rows) for x in (values, wide_MK, scale)), strict=True):
        code_X = part_MK.reshape(-1).view(torch.uint8).int()
        torch.index_select(table, 0, code_X, out=wide_part_MK.view(-1))
        wide_part_MK.mul_(scale_MQ.repeat_interleave(WIDTH, dim=1)[:, : values.shape[1]])
    return wide_MK


def _check(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> None:
    check_devices(a, b=b, scale_a=scale_a, scale_b=scale_b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {list(a.shape)} must be [M, K] and b {list(b.shape)} [N, K]")
    if a.dtype != FP8 or b.dtype != FP8:
        raise ValueError(f"a ({a.dtype}) and b ({b.dtype}) must be {FP8}")
    num_blocks = -(-a.shape[1] // WIDTH)
    for name, scale, rows in (("scale_a", scale_a, a.shape[0]), ("scale_b", scale_b, -(-b.shape[0] // WIDTH))):
        if scale.shape != (rows, num_blocks) or scale.dtype != torch.float32:
            raise ValueError(
                f"{name} ({scale.dtype} {list(scale.shape)}) must be torch.float32 [{rows}, {num_blocks}] "
                f"for a {list(a.shape)} and b {list(b.shape)}"
            )
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype={out_dtype} must be bfloat16, float16, float32 or float64")


@torch.library.custom_op("workbench_kernels::scaled_mm_blockwise", mutates_args=())
def _scaled_mm_blockwise(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fused: bool
) -> Tensor:
    if not fused:
        return forward(a, b, scale_a, scale_b, out_dtype)
    from workbench_kernels.fused import scaled_mm_blockwise as twin

    return twin.forward(a, b, scale_a, scale_b, out_dtype)


@_scaled_mm_blockwise.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, fused: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)
