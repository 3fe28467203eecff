"""Triton twin of `mla_decode`: parts of a sequence's keys side by side, then their merge.

Letters as in `workbench_kernels.mla_decode`. A program has BLOCK_M of a sequence's M = T * H rows and reads one part of
the sequence's tokens, BLOCK_N at a time; what it reads is key and value of all its rows. Every sequence is cut into as
many parts, which the shapes decide and its length does not, so nothing waits for lengths to reach the host.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, merged
from workbench_kernels.fused.architecture import MULTIPLIES_E4M3, TRITON_BEFORE_3_8, architecture_of, precision_of
from workbench_kernels.fused.cdiv import cdiv
from workbench_kernels.fused.interpreter import check_dtype
from workbench_kernels.fused.on_its_device import on_its_device
from workbench_kernels.fused.scaled_mm_blockwise import decoded
from workbench_kernels.fused.tuned import chosen
from workbench_kernels.mla_decode import MAX_LATENT, MAX_ODD_LATENT, MAX_ROPE, fits_twin, is_odd
from workbench_kernels.quantize_blockwise import WIDTH

MIN_BLOCK_C = 64  # narrower latents share this tile
BLOCK_R = MAX_ROPE
FEW_ROWS = 16  # the fewest that the matrix units take
MIN_KEYS = 256  # of one part, where a sequence fills the cache: shorter parts would be much to merge
PROGRAMS = 256  # wanted at once; the same for every GPU, so that all add in the same order
MERGE_TILE, MERGE_WARPS = 1_024, 4
MERGE_STAGES = tl.constexpr(4)  # one part after the other would wait for memory each time
LN_2 = tl.constexpr(math.log(2.0))


@dataclass(frozen=True)
class Launch:
    """The tile of one program, and the number of parts; the score product takes `chunk` columns at a time."""

    block_m: int
    block_n: int
    block_c: int
    chunk: int
    num_warps: int
    num_stages: int
    num_splits: int


# Rows, tokens, columns of a score product and warps, found by compiling: the most that neither spills nor overflows
# shared memory. Where a score product is cut, its operands would not fit the registers whole.
FEW = {"sm_80": (16, 64, 512, 8), "sm_90": (16, 32, 512, 8), "sm_100": (16, 64, 512, 8), "gfx942": (16, 16, 512, 4)}
MANY = {"sm_80": (32, 64, 512, 8), "sm_90": (64, 64, 512, 8), "sm_100": (64, 32, 512, 8), "gfx942": (32, 16, 512, 4)}
MANY_SCATTERED = MANY | {"sm_90": (64, 32, 512, 8)}
if not TRITON_BEFORE_3_8:
    MANY = MANY_SCATTERED = MANY | {"sm_90": (64, 16, 512, 8)}
MANY_CONTIGUOUS = MANY | {"sm_90": (64, 32 if TRITON_BEFORE_3_8 else 16, 512, 8)}
FEW_FLOAT8 = FEW | {"sm_90": (16, 64, 512, 8)}
MANY_FLOAT8 = MANY | {"sm_80": (16, 64, 512, 8), "sm_90": (64, 32, 128, 8), "sm_100": (64, 32, 64, 8)}
FLOAT32 = dict.fromkeys(SHARED_LIMIT, (16, 16, 32, 8)) | {"gfx942": (16, 16, 32, 4)}
SMALL = dict.fromkeys(SHARED_LIMIT, (16, 32, 64, 8))  # widths that vector loads cannot read, or narrow float32
NUM_STAGES = 2
# Where shared memory holds two tiles of 16 bits, the next is loaded beside the products of one. The load of a page's
# number is a stage of its own, and so is what waits for it.
STAGES_CONTIGUOUS, STAGES_PAGED = 3, 5


def launch_for(
    num_sequences: int,
    num_rows: int,
    longest: int,
    widths: tuple[int, int],
    architecture: str,
    *,
    itemsize: int,
    float8: bool,
    page_size: int | None,
) -> Launch:
    """The tile for M rows of each sequence over a cache of `longest` tokens each, of C and R numbers.

    `page_size=None` is a contiguous cache.
    """
    if is_odd(*widths) or (itemsize > 2 and widths[0] <= MIN_BLOCK_C):
        tiles = SMALL
    elif itemsize > 2:
        tiles = FLOAT32
    elif num_rows <= FEW_ROWS:
        tiles = FEW_FLOAT8 if float8 else FEW
    elif float8:
        tiles = MANY_FLOAT8
    elif page_size is None:
        tiles = MANY_CONTIGUOUS
    else:
        tiles = MANY if in_one_page(page_size, MANY[architecture][1]) else MANY_SCATTERED
    num_stages = NUM_STAGES
    if architecture == "sm_90" and (tiles is FEW or (tiles is MANY_CONTIGUOUS and TRITON_BEFORE_3_8)):
        num_stages = STAGES_CONTIGUOUS if page_size is None else STAGES_PAGED
    block_m, block_n, chunk, num_warps = tiles[architecture]
    block_c = block_for(widths[0])
    if architecture == "sm_90" and block_m == 64 and block_c <= 128 and not float8:
        num_warps = 4  # with more, Triton 3.6 lets the products of narrow latents wait for each other
    programs = num_sequences * cdiv(num_rows, block_m)
    num_splits = max(1, min(PROGRAMS // programs, cdiv(longest, MIN_KEYS)))
    return Launch(block_m, block_n, block_c, min(chunk, block_c), num_warps, num_stages, num_splits)


def block_for(width: int) -> int:
    return max(MIN_BLOCK_C, 1 << (width - 1).bit_length())


def in_one_page(page_size: int | None, block_n: int) -> bool:
    """Whether the tokens of every tile lie side by side."""
    return page_size is None or page_size % block_n == 0


@on_its_device
def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    scale: Tensor | None,
    rope: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return out [B, T, H, C] and lse [B, T, H]; latent and rope may be columns of one cache, then without scale."""
    check_dtype(q_nope.dtype)
    num_sequences, num_queries, num_heads, width = q_nope.shape
    if not fits_twin(width, q_rope.shape[-1]):
        raise ValueError(
            f"the fused mla_decode takes latents of up to {MAX_LATENT} numbers and positional keys of {MAX_ROPE}, "
            f"beyond latents of {MAX_ODD_LATENT} both in multiples of 16, not {width} and {q_rope.shape[-1]}"
        )
    out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    lse = torch.empty(q_nope.shape[:3], dtype=torch.float32, device=q_nope.device)
    if lse.numel() == 0:
        return out, lse
    architecture = architecture_of(q_nope.device)
    page_size, max_pages = latent.shape[1], 1 if block_table is None else block_table.shape[1]
    table_size = None if block_table is None else page_size
    launch = launch_for(
        num_sequences, num_queries * num_heads, max_pages * page_size, (width, q_rope.shape[-1]), architecture,
        itemsize=q_nope.itemsize, float8=scale is not None, page_size=table_size,
    )  # fmt: skip
    launch = chosen(
        launch, "mla_decode_fwd_kernel", q_nope.device, sequences=num_sequences, rows=num_queries * num_heads,
        tokens_below=1 << (max_pages * page_size).bit_length(), latent=width, rope=q_rope.shape[-1],
        bytes=latent.itemsize, page=table_size or 0,
    )  # fmt: skip
    page_tokens, latent_stride, rope_stride, scale_stride = strides_of(latent, rope, scale)
    if scale is not None and architecture not in MULTIPLIES_E4M3:
        latent = latent.view(torch.uint8)
    # A single part is merged as well: a kernel that rounds what it returns spills.
    partial = q_nope.new_empty(lse.numel(), launch.num_splits, width, dtype=torch.float32)
    partial_lse = q_nope.new_empty(lse.numel(), launch.num_splits, dtype=torch.float32)
    programs = num_sequences * cdiv(num_queries * num_heads, launch.block_m)
    mla_decode_fwd_kernel[(programs, launch.num_splits)](
        q_nope.contiguous(), q_rope.contiguous(), latent, scale, rope,
        None if block_table is None else block_table.contiguous(), cache_seqlens.contiguous(), partial, partial_lse,
        num_queries, num_heads, page_size, page_tokens, max_pages, launch.num_splits, softmax_scale * math.log2(math.e),
        width, q_rope.shape[-1], latent_stride, rope_stride, scale_stride, in_one_page(table_size, launch.block_n),
        precision_of(q_nope.itemsize, architecture),
        launch.block_m, launch.block_n, launch.block_c, BLOCK_R, launch.chunk,
        num_warps=launch.num_warps, num_stages=launch.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    block_m = MERGE_TILE // launch.block_c
    mla_decode_merge_kernel[(cdiv(lse.numel(), block_m),)](
        partial, partial_lse, out, lse, lse.numel(), launch.num_splits, width, block_m, launch.block_c,
        num_warps=MERGE_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, lse


def strides_of(latent: Tensor, rope: Tensor, scale: Tensor | None) -> tuple[int, int, int, int]:
    """Tokens from page to page, and from token to token the numbers of latent, rope and scale.

    So tokens of all three are counted alike, and views of one tensor will do: its columns, or FlashMLA's packed bytes.
    """
    parts = (latent, rope) if scale is None else (latent, rope, scale)
    num_pages, page_size, _ = latent.shape
    strides = [part.stride(0 if page_size == 1 else 1) for part in parts]
    page_tokens = page_size if 1 in (num_pages, page_size) else latent.stride(0) // max(1, strides[0])
    even = num_pages == 1 or all(
        part.stride(0) == page_tokens * step for part, step in zip(parts, strides, strict=True)
    )
    if not even or any(part.shape[2] > 1 and part.stride(2) != 1 for part in parts):
        raise ValueError(
            "the fused mla_decode reads a kv_cache whose tokens follow at equal steps, each in one run of memory; "
            f"the strides {[part.stride() for part in parts]} are others"
        )
    return page_tokens, strides[0], strides[1], 0 if scale is None else strides[2]


def cases(kind: str) -> list[Case]:
    """Every tile that the launcher chooses, on the targets where it does, and the widest in every layout of pages."""
    layouts = [(width, 60) for width in (63, 64, 128, 256, 512)] + [(512, 64), (512, None)]
    found = merged(
        _case(kind, architecture, rows, width, page_size, float8=float8)
        for width, page_size in layouts
        for rows in (FEW_ROWS, 64)
        for float8 in (False, True)
        for architecture in SHARED_LIMIT
    )
    pointers = {"partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": f"*{kind}", "lse_ptr": "*fp32"}
    for width in (63, 64, 128, 256, 512):
        block_c = block_for(width)
        constants = {"C": width, "BLOCK_M": MERGE_TILE // block_c, "BLOCK_C": block_c}
        arguments = pointers | {"num_rows": "i32", "num_splits": "i32"}
        name = f"mla_decode_merge_kernel C={width}"
        found.append(Case(name, mla_decode_merge_kernel, arguments, constants, MERGE_WARPS))
    return found


def _case(kind: str, architecture: str, rows: int, width: int, page_size: int | None, *, float8: bool) -> Case:
    itemsize, rope_width = 4 if kind == "fp32" else 2, 64 if width % 16 == 0 else 63
    launch = launch_for(
        1, rows, MIN_KEYS, (width, rope_width), architecture, itemsize=itemsize, float8=float8, page_size=page_size
    )
    arguments = dict.fromkeys(("q_nope_ptr", "q_rope_ptr", "latent_ptr", "rope_ptr"), f"*{kind}")
    arguments |= dict.fromkeys(("scale_ptr", "partial_ptr", "partial_lse_ptr"), "*fp32")
    arguments |= dict.fromkeys(("table_ptr", "length_ptr"), "*i32") | {"scale_log2": "fp32"}
    sizes = ("num_queries", "num_heads", "page_size", "page_tokens", "max_pages", "num_splits")
    arguments |= dict.fromkeys(sizes, "i32")
    constants = {
        "C": width, "R": rope_width, "LATENT_STRIDE": width + rope_width, "ROPE_STRIDE": width + rope_width,
        "SCALE_STRIDE": 0, "scale_ptr": None,
        "ONE_PAGE": in_one_page(page_size, launch.block_n), "PRECISION": precision_of(itemsize, architecture),
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_C": launch.block_c, "BLOCK_R": BLOCK_R,
        "CHUNK": launch.chunk,
    }  # fmt: skip
    if float8:
        arguments |= {"latent_ptr": "*fp8e4nv" if architecture in MULTIPLIES_E4M3 else "*u8", "rope_ptr": "*bf16"}
        constants |= {"LATENT_STRIDE": width, "ROPE_STRIDE": rope_width, "SCALE_STRIDE": cdiv(width, WIDTH)}
        del constants["scale_ptr"]
    if page_size is None:
        constants["table_ptr"] = None
    words = [f"C={width}", "few rows" if rows <= FEW_ROWS else "many rows", *(["float8"] if float8 else [])]
    words.append("contiguous" if page_size is None else f"pages of {page_size}")
    return Case(
        f"mla_decode_fwd_kernel {', '.join(words)}", mla_decode_fwd_kernel, arguments, constants,
        launch.num_warps, launch.num_stages, "wide" if launch.block_m == 64 else "narrow", (architecture,),
    )  # fmt: skip


@triton.jit
def load_latents(
    latent_ptr, scale_ptr, token, exists, begin, dtype: tl.constexpr,
    C: tl.constexpr, LATENT_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, WIDTH] numbers of the tokens' latents from column `begin` on; zeros where there is none."""
    column = begin + tl.arange(0, WIDTH)  # [WIDTH]
    latent = tl.load(
        (latent_ptr + token[:, None] * LATENT_STRIDE) + column[None, :],
        mask=exists[:, None] & (column < C)[None, :], other=0.0,
    )  # fmt: skip
    if scale_ptr is not None:
        number = decoded(latent) if latent_ptr.dtype.element_ty == tl.uint8 else latent
        wide = number.to(tl.float32)
        SHARED: tl.constexpr = min(128, WIDTH)  # pyright: ignore[reportAssignmentType]
        first = begin + tl.arange(0, WIDTH // SHARED) * SHARED  # [WIDTH // SHARED]
        scale = tl.load(
            (scale_ptr + token[:, None] * SCALE_STRIDE) + (first // 128)[None, :],
            mask=exists[:, None] & (first < C)[None, :], other=0.0,
        )  # fmt: skip
        scaled = tl.reshape(wide, [wide.shape[0], WIDTH // SHARED, SHARED]) * scale[:, :, None]
        latent = tl.reshape(scaled, [wide.shape[0], WIDTH]).to(dtype)
    return latent


# A kernel of its own for a cache of one page or in one part would spill where this one does not.
@triton.jit(do_not_specialize=["max_pages", "num_splits"])
def mla_decode_fwd_kernel(
    q_nope_ptr, q_rope_ptr, latent_ptr, scale_ptr, rope_ptr, table_ptr, length_ptr, partial_ptr, partial_lse_ptr,
    num_queries, num_heads, page_size, page_tokens, max_pages, num_splits, scale_log2,
    C: tl.constexpr, R: tl.constexpr, LATENT_STRIDE: tl.constexpr, ROPE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, ONE_PAGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q_nope_ptr.dtype.element_ty
    num_rows = num_queries * num_heads
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    sequence = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M], a head of a query
    is_row = row < num_rows
    query = sequence * num_rows + row  # [BLOCK_M]
    latent_column = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    latent_inside = is_row[:, None] & (latent_column < C)[None, :]  # [BLOCK_M, BLOCK_C]
    rope_column = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    rope_inside = is_row[:, None] & (rope_column < R)[None, :]  # [BLOCK_M, BLOCK_R]

    length = tl.minimum(tl.load(length_ptr + sequence), max_pages * page_size)
    position = length - num_queries + row // num_heads  # [BLOCK_M]
    keys_per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), num_splits) * BLOCK_N
    first = tl.program_id(1) * keys_per_split
    end = tl.minimum(first + keys_per_split, length)

    q_rope = tl.load((q_rope_ptr + query[:, None] * R) + rope_column[None, :], mask=rope_inside, other=0.0)
    if CHUNK == BLOCK_C:
        q_nope = tl.load((q_nope_ptr + query[:, None] * C) + latent_column[None, :], mask=latent_inside, other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        exists = key < end
        if table_ptr is None:
            token = sequence * page_tokens + start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        elif ONE_PAGE:
            page = tl.load(table_ptr + sequence * max_pages + start // page_size).to(tl.int64)
            token = page * page_tokens + start % page_size + tl.arange(0, BLOCK_N)
        else:
            page = tl.load(table_ptr + sequence * max_pages + key // page_size, mask=exists, other=0).to(tl.int64)
            token = page * page_tokens + key % page_size

        latent = load_latents(
            latent_ptr, scale_ptr, token, exists, 0, dtype, C, LATENT_STRIDE, SCALE_STRIDE, BLOCK_C
        )  # [BLOCK_N, BLOCK_C], key and value
        rope = tl.load(
            (rope_ptr + token[:, None] * ROPE_STRIDE) + rope_column[None, :],
            mask=exists[:, None] & (rope_column < R)[None, :], other=0.0,
        ).to(dtype)  # fmt: skip
        scores = tl.dot(q_rope, tl.trans(rope), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if CHUNK == BLOCK_C:
            scores = tl.dot(q_nope, tl.trans(latent), scores, input_precision=PRECISION)
        else:
            for begin in range(0, C, CHUNK):
                column = begin + tl.arange(0, CHUNK)  # [CHUNK]
                q_part = tl.load(
                    (q_nope_ptr + query[:, None] * C) + column[None, :],
                    mask=is_row[:, None] & (column < C)[None, :], other=0.0,
                )  # fmt: skip
                latent_part = load_latents(
                    latent_ptr, scale_ptr, token, exists, begin, dtype, C, LATENT_STRIDE, SCALE_STRIDE, CHUNK
                )
                scores = tl.dot(q_part, tl.trans(latent_part), scores, input_precision=PRECISION)
        scores = tl.where(key[None, :] <= position[:, None], scores * scale_log2, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, axis=1))
        anchor = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(dtype), latent, out * shrink[:, None], input_precision=PRECISION)
        largest = larger

    total = tl.where(total == 0.0, 1.0, total)  # of a query that sees nothing here; what is no number stays one
    part = query * num_splits + tl.program_id(1)
    tl.store((partial_ptr + part[:, None] * C) + latent_column[None, :], out / total[:, None], mask=latent_inside)
    tl.store(partial_lse_ptr + part, (largest + tl.log2(total)) * LN_2, mask=is_row)


@triton.jit
def mla_decode_merge_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, num_rows, num_splits,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    is_row = row < num_rows
    inside = is_row[:, None] & (column < C)[None, :]  # [BLOCK_M, BLOCK_C]
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for split in tl.range(0, num_splits, num_stages=MERGE_STAGES):
        part = row * num_splits + split  # [BLOCK_M]
        lse = tl.load(partial_lse_ptr + part, mask=is_row, other=float("-inf"))
        partial = tl.load(partial_ptr + part[:, None] * C + column[None, :], mask=inside, other=0.0)
        larger = tl.maximum(largest, lse)
        anchor = tl.where(larger == float("-inf"), 0.0, larger)
        weight, shrink = tl.exp(lse - anchor), tl.exp(largest - anchor)
        total = total * shrink + weight
        out = out * shrink[:, None] + partial * weight[:, None]
        largest = larger

    total = tl.where(total == 0.0, 1.0, total)  # of a query that sees nothing at all
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * C + column[None, :], out, mask=inside)
    tl.store(lse_ptr + row, largest + tl.log(total), mask=is_row)
