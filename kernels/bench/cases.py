"""What `run.py` times: for every op some inputs, its definition, and peers that make the same of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from liger import liger_peers
from torch import Tensor

from workbench_kernels import (
    causal_attention,
    grouped_mm,
    linear_cross_entropy,
    mla_attention,
    mla_decode,
    moe_mlp,
    moe_route,
    quantize_blockwise,
    rms_norm,
    rope,
    scaled_mm_blockwise,
    sparse_select,
)
from workbench_kernels.causal_attention import flash
from workbench_kernels.causal_attention import reference as causal_attention_reference
from workbench_kernels.grouped_mm import reference as grouped_mm_reference
from workbench_kernels.mla_attention import join_by_head
from workbench_kernels.mla_attention import reference as mla_attention_reference
from workbench_kernels.mla_decode import reference as mla_decode_reference
from workbench_kernels.moe_mlp import reference as moe_mlp_reference
from workbench_kernels.quantize_blockwise import BLOCKS, WIDTH, dequantize
from workbench_kernels.quantize_blockwise import reference as quantize_blockwise_reference
from workbench_kernels.rms_norm import reference as rms_norm_reference
from workbench_kernels.rope import reference as rope_reference
from workbench_kernels.scaled_mm_blockwise import reference as scaled_mm_blockwise_reference
from workbench_kernels.sparse_select import SparseSelection
from workbench_kernels.sparse_select import reference as sparse_select_reference

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs; `reference` is the definition, `peers` are timed beside `ours`."""

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    ours: Op
    reference: Op
    peers: dict[str, Op]
    ceiling: str  # "matmul" or "copy"
    forward_work: float  # floating-point operations, or bytes that must move
    backward_work: float | None  # None: no gradient, so no backward is checked or timed


def torch_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offs)


def composed_moe_mlp(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The layer in torch's own ops, as a model would write it."""
    expert, pair = indices.flatten().sort(stable=True)
    counts = torch.zeros(len(w13), dtype=torch.int32, device=x.device)
    ends = counts.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    gate, up = torch_grouped_mm(x[pair // indices.shape[1]], w13, ends).chunk(2, dim=1)
    y = torch_grouped_mm(F.silu(gate) * up, w2, ends)
    row = torch.empty_like(pair).scatter_(0, pair, torch.arange(len(pair), device=x.device))
    return (y[row].unflatten(0, indices.shape) * weights[..., None]).sum(dim=1)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def torch_linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight).float(), target)


EPS = 1e-6
MOST_PACKED = 4_096


def grouped_mm_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small = ((4096, 256, 128, 16), (4096, 256, 256, 16), (2048, 256, 192, 32))
    large = ((65_536, 2048, 1536, 128), (65_536, 768, 2048, 128), (32_768, 7168, 2048, 16))
    for m, k, n, experts in small if device == "cpu" else large:
        counts = torch.randint(experts, (m,)).bincount(minlength=experts)
        inputs = (
            torch.randn(m, k).to(device, dtype),
            torch.randn(experts, n, k).div(k**0.5).to(device, dtype),
            counts.cumsum(0, dtype=torch.int32).to(device),
        )
        work = 2.0 * m * k * n
        yield Case(
            *("grouped_mm", f"M={m} K={k} N={n} E={experts}", inputs, grouped_mm, grouped_mm_reference),
            *({"loop": grouped_mm_reference, "F.grouped_mm": torch_grouped_mm}, "matmul", work, 2 * work),
        )


def moe_mlp_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small = ((1024, 4, 256, 192, 16), (2048, 2, 256, 128, 16), (2048, 2, 256, 192, 32))
    large = ((8192, 8, 2048, 768, 128), (4096, 8, 2048, 1408, 64), (64, 8, 2048, 768, 128))
    for tokens, active, width, hidden, experts in small if device == "cpu" else large:
        inputs = (
            torch.randn(tokens, width).to(device, dtype),
            torch.randn(experts, 2 * hidden, width).div(width**0.5).to(device, dtype),
            torch.randn(experts, width, hidden).div(hidden**0.5).to(device, dtype),
            torch.rand(tokens, experts).topk(active).indices.to(device),
            torch.rand(tokens, active).to(device, dtype),
        )
        work = 6.0 * tokens * active * width * hidden
        peers = {"loop": moe_mlp_reference, "F.grouped_mm": composed_moe_mlp, **liger_peers("moe_mlp", device)}
        yield Case(
            *("moe_mlp", f"N={tokens} A={active} K={width} F={hidden} E={experts}", inputs, moe_mlp, moe_mlp_reference),
            *(peers, "matmul", work, 2 * work),
        )


def composed_moe_route(logits: Tensor, active: int) -> Tensor:
    """As a model would write it, with the order and the counts that the products then need."""
    scores, indices = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid().topk(active, dim=-1)
    pairs = indices.flatten()
    pairs.argsort(stable=True)
    pairs.bincount(minlength=logits.shape[1]).cumsum(0)
    return scores / scores.sum(dim=-1, keepdim=True)


def moe_route_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The weights, which have gradients; choice, counts, order and tiles are made too."""
    small, large = ((2048, 16, 2), (2048, 64, 6)), ((32_768, 64, 6), (32_768, 256, 8))
    for tokens, experts, active in small if device == "cpu" else large:
        logits = torch.randn(tokens, experts).to(device, dtype)
        options = {"scoring_func": "sigmoid", "norm_topk_prob": True, "tile_rows": 128}

        def ours(logits: Tensor, active: int = active, options: dict = options) -> Tensor:
            return moe_route(logits, active, **options).weights

        definition = partial(ours, options=options | {"impl": "reference"})
        moved = tokens * (experts * (dtype.itemsize + 4.0) + active * 24.0)  # scores; weights, indices, both orders
        yield Case(
            *("moe_route", f"N={tokens} E={experts} A={active}", (logits,), ours, definition),
            {"definition": definition, "torch.topk": partial(composed_moe_route, active=active)},
            *("copy", moved, moved),
        )


def rms_norm_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small, large = ((2048, 256), (4096, 512)), ((16_384, 2048), (16_384, 7168))
    for rows, width in small if device == "cpu" else large:
        inputs = (torch.randn(rows, width).to(device, dtype), torch.rand(width).to(device, dtype))
        moved = rows * width * dtype.itemsize
        definition = partial(rms_norm_reference, eps=EPS)
        peers = {"definition": definition, "F.rms_norm": torch_rms_norm, **liger_peers("rms_norm", device)}
        yield Case(
            *("rms_norm", f"M={rows} D={width}", inputs, partial(rms_norm, eps=EPS), definition, peers),
            *("copy", 2.0 * moved, 3.0 * moved),
        )


def rope_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small, large = ((8, 256, 8, 16), (1, 1024, 16, 64)), ((4, 4096, 128, 64), (4, 4096, 16, 128))
    for sequences, length, heads, width in small if device == "cpu" else large:
        angles = torch.randn(length, width // 2, device=device)
        cos, sin = angles.cos(), angles.sin()
        wide_cos, wide_sin = (torch.cat((part, part), dim=-1).unsqueeze(1).to(dtype) for part in (cos, sin))
        x = torch.randn(sequences, length, heads, width).to(device, dtype)
        moved = x.numel() * dtype.itemsize
        for interleaved in (True, False):
            definition = partial(rope_reference, cos=cos, sin=sin, interleaved=interleaved)
            peers: dict[str, Op] = {"definition": definition}
            if not interleaved:
                peers["as models write it"] = lambda x, c=wide_cos, s=wide_sin: x * c + turned_half(x) * s
            layout = "neighbours" if interleaved else "halves"
            yield Case(
                *("rope", f"B={sequences} T={length} H={heads} R={width} {layout}", (x,)),
                *(partial(rope, cos=cos, sin=sin, interleaved=interleaved), definition, peers),
                *("copy", 2.0 * moved, 2.0 * moved),
            )


def turned_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def causal_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    heads, key_width, value_width = 8, 48, 32
    scale = key_width**-0.5
    for sequences, length in ((8, 256), (2, 1024)):
        query, key = torch.randn(2, sequences, length, heads, key_width).to(device, dtype)
        value = torch.randn(sequences, length, heads, value_width).to(device, dtype)
        work = 1.0 * sequences * heads * length * (length + 1) * (key_width + value_width)  # what a query may see
        yield Case(
            *("causal_attention", f"B={sequences} T={length} H={heads} K={key_width} U={value_width}"),
            *((query, key, value), lambda q, k, v: causal_attention(q, k, v, scale)),
            lambda q, k, v: causal_attention_reference(q, k, v, scale),
            {
                "definition": lambda q, k, v: causal_attention_reference(q, k, v, scale),
                "F.scaled_dot_product_attention": lambda q, k, v: torch_attention(q, k, v, scale),
                "F.scaled_dot_product_attention, values padded": lambda q, k, v: flash(q, k, v, scale),
            },
            *("matmul", work, 2 * work),
        )


def composed_sparse_select(query: Tensor, key: Tensor, weight: Tensor, index_topk: int) -> Tensor:
    """As a model would write it: torch's `topk`, which leaves open which of equals it takes."""
    scores = torch.einsum("bthk,bsk->bths", query.to(weight.dtype), key.to(weight.dtype)).relu_()
    scores = torch.einsum("bths,bth->bts", scores, weight)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=key.device).triu(1 + key.shape[1] - query.shape[1])
    scores.detach().masked_fill(hidden, -torch.inf).topk(index_topk, dim=-1)
    return scores


def sparse_select_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small = ((8, 256, 4, 32, 64), (2, 1024, 8, 64, 256))
    large = ((1, 4096, 64, 128, 2048), (4, 2048, 64, 128, 2048))
    for sequences, length, heads, width, count in small if device == "cpu" else large:
        inputs = (
            torch.randn(sequences, length, heads, width).to(device, dtype),
            torch.randn(sequences, length, width).to(device, dtype),
            torch.randn(sequences, length, heads, device=device) * (heads * width) ** -0.5,
        )
        work = 2.0 * sequences * heads * length**2 * width
        definition = partial(scores_of, sparse_select_reference, index_topk=count)
        yield Case(
            *("sparse_select", f"B={sequences} T={length} H={heads} K={width} Y={count}", inputs),
            *(partial(scores_of, sparse_select, index_topk=count), definition),
            {"definition": definition, "torch.topk": partial(composed_sparse_select, index_topk=count)},
            *("matmul", work, 2 * work),
        )


def scores_of(op: Callable[..., SparseSelection], *inputs: Tensor, index_topk: int) -> Tensor:
    """What can be compared and has gradients; the choice is made, too."""
    return op(*inputs, index_topk=index_topk).scores


def linear_cross_entropy_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small, large = ((2048, 256, 8192), (1024, 512, 16_384)), ((8192, 2048, 32_768), (4096, 4096, 131_072))
    peers = {"F.cross_entropy": torch_linear_cross_entropy, **liger_peers("linear_cross_entropy", device)}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        peers["F.linear_cross_entropy, in chunks"] = partial(F.linear_cross_entropy, options=options)
    for tokens, width, vocabulary in small if device == "cpu" else large:
        inputs = (
            torch.randn(tokens, width).to(device, dtype),
            torch.randn(vocabulary, width).div(width**0.5).to(device, dtype),
            torch.randint(vocabulary, (tokens,)).to(device),
        )
        work = 2.0 * tokens * width * vocabulary  # making the logits again for backward is not counted
        yield Case(
            *("linear_cross_entropy", f"N={tokens} K={width} V={vocabulary}", inputs),
            *(linear_cross_entropy, partial(linear_cross_entropy, impl="reference"), peers, "matmul", work, 2 * work),
        )


def quantize_blockwise_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Their values, each of which the check wants to be that of the definition."""
    small, large = ((2048, 256), (2048, 2048)), ((16_384, 2048), (16_384, 7168))
    for rows, width in small if device == "cpu" else large:
        for block in BLOCKS:
            definition = partial(quantized_by_definition, block_rows=block[0])
            yield Case(
                *("quantize_blockwise", f"M={rows} K={width}, blocks of {block[0]} x {block[1]}"),
                (torch.randn(rows, width).to(device, dtype),),
                lambda x, block=block: quantize_blockwise(x, block=block).values,
                *(definition, {"definition": definition}, "copy", rows * width * (dtype.itemsize + 1.0), None),
            )


def quantized_by_definition(x: Tensor, block_rows: int) -> Tensor:
    return quantize_blockwise_reference(x, block_rows, power_of_two=False)[0]


def scaled_mm_blockwise_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Results in `dtype`. No `F.scaled_mm` on a CPU: it refuses blocks there, and with one scale takes minutes."""
    small, large = ((64, 512, 512), (512, 1024, 1024)), ((64, 2112, 7168), (4096, 2112, 7168), (4096, 7168, 2048))
    for m, n, k in small if device == "cpu" else large:
        a, scale_a = quantize_blockwise(torch.randn(m, k).to(device))
        b, scale_b = quantize_blockwise(torch.randn(n, k).div(k**0.5).to(device), block=(WIDTH, WIDTH))
        wide_a, wide_b = dequantize(a, scale_a).to(dtype), dequantize(b, scale_b, block_rows=WIDTH).to(dtype)

        def definition(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
            out_dtype = torch.float64 if scale_a.dtype == torch.float64 else dtype
            return scaled_mm_blockwise_reference(a, b, scale_a, scale_b, out_dtype)

        peers: dict[str, Op] = {
            "definition": definition,
            "@, dequantized before": lambda *_, wide_a=wide_a, wide_b=wide_b: wide_a @ wide_b.T,
        }
        if device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability() == (9, 0):
            # It takes each column of scale_a in one piece; made here once, as a quantizing kernel would write it.
            columns = scale_a.T.contiguous().T
            peers["F.scaled_mm"] = lambda a, b, _, scale_b, columns=columns: torch_scaled_mm(a, b, columns, scale_b)
        yield Case(
            *("scaled_mm_blockwise", f"M={m} N={n} K={k} to {dtype}".replace("torch.", ""), (a, b, scale_a, scale_b)),
            *(partial(scaled_mm_blockwise, out_dtype=dtype), definition, peers, "matmul", 2.0 * m * n * k, None),
        )


def torch_scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    recipes = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(a, b.T, scale_a, recipes[0], scale_b.T, recipes[1], output_dtype=torch.bfloat16)


def two_products(q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, scale: float) -> Tensor:
    """The absorbed form as a model writes it, whose sequences are all as long as the cache."""
    query = torch.cat((q_nope, q_rope), dim=-1).flatten(1, 2)
    weights = torch.softmax(torch.bmm(query, kv_cache.mT) * scale, dim=-1, dtype=torch.float32)
    return torch.bmm(weights.to(query.dtype), kv_cache[..., : q_nope.shape[-1]]).view(q_nope.shape)


def padded_attention(q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Torch's own over the whole cache, the unused part of which is hidden (and must hold no NaN)."""
    query = torch.cat((q_nope, q_rope), dim=-1).flatten(1, 2).unsqueeze(1)
    hidden = torch.arange(kv_cache.shape[1], device=query.device) >= lengths[:, None, None, None]
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
    key = kv_cache.unsqueeze(1)
    mixed = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=scale)
    return mixed[..., : q_nope.shape[-1]].reshape(q_nope.shape)


def mla_decode_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small = ((8, 16, 512, 64, 1024, True), (4, 128, 512, 64, 1024, True), (8, 16, 512, 64, 1024, False))
    small += ((32, 8, 64, 16, 256, True), (32, 8, 64, 16, 256, False))
    large = ((64, 16, 512, 64, 4096, True), (64, 128, 512, 64, 4096, True), (64, 16, 512, 64, 4096, False))
    for sequences, heads, latent, rotary, length, full in small if device == "cpu" else large:
        queries = torch.randn(sequences, 1, heads, latent + rotary).to(device, dtype).split((latent, rotary), dim=-1)
        kv_cache = torch.randn(sequences, length, latent + rotary).to(device, dtype)
        counts = torch.full((sequences,), length) if full else torch.linspace(length / 4, length, sequences)
        lengths = counts.to(device, torch.int32)
        scale = (latent + rotary) ** -0.5
        options = {"cache_seqlens": lengths, "softmax_scale": scale}

        def ours(*inputs: Tensor, options: dict = options) -> Tensor:
            return mla_decode(*inputs, **options).out

        def definition(*inputs: Tensor, options: dict = options) -> Tensor:
            return mla_decode_reference(*inputs, **options).out

        peers: dict[str, Op] = {
            "definition": definition,
            "F.scaled_dot_product_attention": partial(padded_attention, lengths=lengths, scale=scale),
        }
        if full:
            peers["two products"] = partial(two_products, scale=scale)
        few, kept = device != "cpu" and heads < 64, float(counts.sum())
        work = kept * (latent + rotary) * dtype.itemsize if few else 2 * kept * heads * (2 * latent + rotary)
        filled = "full" if full else "from a quarter to full"
        yield Case(
            *("mla_decode", f"B={sequences} T=1 H={heads} C={latent} R={rotary} S={length} {filled}"),
            *((*queries, kv_cache), ours, definition, peers, "copy" if few else "matmul", work, None),
        )


def mla_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small, large = (8, (32, 16, 32), ((8, 256), (2, 1024))), (16, (128, 64, 128), ((4, 4096),))
    heads, (key_width, rope_width, value_width), lengths = small if device == "cpu" else large
    scale, width = (key_width + rope_width) ** -0.5, key_width + rope_width + value_width
    for sequences, length in lengths:
        shapes = ((heads, key_width), (heads, rope_width), (heads, key_width), (rope_width,), (heads, value_width))
        inputs = tuple(torch.randn(sequences, length, *shape).to(device, dtype) for shape in shapes)
        # As much of it as the definition, which makes all scores, has room for.
        total = min(sequences * length, MOST_PACKED)
        packed = tuple(x.flatten(0, 1)[:total].unsqueeze(0) for x in inputs)
        ends = torch.arange(0, total + 1, min(length, total // 2), dtype=torch.int32, device=device)
        window = length // 8
        for kind, tensors, options, most in (
            ("", inputs, {}, length),
            (" packed", packed, {"cu_seqlens": ends}, int(ends[1])),
            (f" window={window}", inputs, {"window": window}, window),
        ):
            definition = partial(mla_attention_reference, softmax_scale=scale, **options)
            peers: dict[str, Op] = {"definition": definition}
            if not options:
                peers["F.scaled_dot_product_attention, joined"] = partial(joined_attention, scale=scale)
            # What a query may see.
            documents = len(ends) - 1 if "cu_seqlens" in options else sequences
            longest = most if "cu_seqlens" in options else length
            pairs = documents * sum(min(position + 1, most) for position in range(longest))
            yield Case(
                "mla_attention",
                f"B={len(tensors[0])} T={tensors[0].shape[1]} H={heads} K={key_width} R={rope_width} U={value_width}"
                + kind,
                *(tensors, partial(mla_attention, softmax_scale=scale, **options), definition, peers),
                *("matmul", 2.0 * pairs * heads * width, 4.0 * pairs * heads * width),
            )


def joined_attention(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor, scale: float
) -> Tensor:
    """As models write it: the shared key given to every head, both parts in one product."""
    shared = k_rope.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)
    return flash(join_by_head(q_nope, q_rope), join_by_head(k_nope, shared), value, scale)


CASES = {
    "causal_attention": causal_attention_cases,
    "grouped_mm": grouped_mm_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "mla_attention": mla_attention_cases,
    "mla_decode": mla_decode_cases,
    "moe_mlp": moe_mlp_cases,
    "moe_route": moe_route_cases,
    "quantize_blockwise": quantize_blockwise_cases,
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "scaled_mm_blockwise": scaled_mm_blockwise_cases,
    "sparse_select": sparse_select_cases,
}
PRODUCTS = ("grouped_mm", "linear_cross_entropy", "mla_attention", "moe_mlp", "scaled_mm_blockwise", "sparse_select")
# Whose definitions loop over as many experts as there are: the compiler would unroll them for minutes.
LOOPS = ("grouped_mm", "moe_mlp")
