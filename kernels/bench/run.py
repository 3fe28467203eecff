"""Time every op beside plain torch, after checking that it is right: one JSON line per measurement.

On a CPU the fast torch forms are timed, on a GPU the Triton twins of those ops that have one. Candidates of one case
take turns, so that a slow moment of the machine hits all of them; `of_ceiling` compares with a rate measured in the
same process.

    python kernels/bench/run.py                          # this machine, all ops
    python kernels/bench/run.py --op moe_mlp --rounds 51
    python kernels/bench/run.py --plot roofline          # roofline.html and roofline.png as well
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels import (
    causal_attention,
    grouped_mm,
    linear_cross_entropy,
    moe_mlp,
    quantize_blockwise,
    rms_norm,
    rope,
    scaled_mm_blockwise,
    sparse_select,
)
from workbench_kernels.causal_attention import flash
from workbench_kernels.causal_attention import reference as causal_attention_reference
from workbench_kernels.expert_order import sort_by_expert
from workbench_kernels.grouped_mm import reference as grouped_mm_reference
from workbench_kernels.linear_cross_entropy import reference as linear_cross_entropy_reference
from workbench_kernels.moe_mlp import reference as moe_mlp_reference
from workbench_kernels.quantize_blockwise import BLOCKS, WIDTH, dequantize
from workbench_kernels.quantize_blockwise import reference as quantize_blockwise_reference
from workbench_kernels.rms_norm import reference as rms_norm_reference
from workbench_kernels.rope import reference as rope_reference
from workbench_kernels.scaled_mm_blockwise import reference as scaled_mm_blockwise_reference
from workbench_kernels.sparse_select import SparseSelection
from workbench_kernels.sparse_select import reference as sparse_select_reference
from workbench_kernels.tier import FUSED_OPS

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
    order = sort_by_expert(indices, w13.shape[0])
    gate, up = torch_grouped_mm(x[order.pair_M // indices.shape[1]], w13, order.offs_E).chunk(2, dim=1)
    y = torch_grouped_mm(F.silu(gate) * up, w2, order.offs_E)
    return (y[order.row_NA] * weights[..., None]).sum(dim=1)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)


def torch_linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight).float(), target)


EPS = 1e-6


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
        yield Case(
            *("moe_mlp", f"N={tokens} A={active} K={width} F={hidden} E={experts}", inputs, moe_mlp, moe_mlp_reference),
            *({"loop": moe_mlp_reference, "F.grouped_mm": composed_moe_mlp}, "matmul", work, 2 * work),
        )


def rms_norm_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small, large = ((2048, 256), (4096, 512)), ((16_384, 2048), (16_384, 7168))
    for rows, width in small if device == "cpu" else large:
        inputs = (torch.randn(rows, width).to(device, dtype), torch.rand(width).to(device, dtype))
        moved = rows * width * dtype.itemsize
        yield Case(
            *("rms_norm", f"M={rows} D={width}", inputs, lambda x, weight: rms_norm(x, weight, EPS)),
            lambda x, weight: rms_norm_reference(x, weight, EPS),
            {"definition": lambda x, weight: rms_norm_reference(x, weight, EPS), "F.rms_norm": torch_rms_norm},
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
    peers: dict[str, Op] = {"F.cross_entropy": torch_linear_cross_entropy}
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
            *(linear_cross_entropy, linear_cross_entropy_reference, peers, "matmul", work, 2 * work),
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


CASES = {
    "causal_attention": causal_attention_cases,
    "grouped_mm": grouped_mm_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "moe_mlp": moe_mlp_cases,
    "quantize_blockwise": quantize_blockwise_cases,
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "scaled_mm_blockwise": scaled_mm_blockwise_cases,
    "sparse_select": sparse_select_cases,
}


PRODUCTS = ("grouped_mm", "linear_cross_entropy", "moe_mlp", "sparse_select")


def results(op: Op, inputs: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        return [op(*inputs)]
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = op(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(case: Case) -> None:
    """Refuse to time a wrong result: the rule of tests/kernel_rules.py, with gradients and without."""
    with torch.no_grad():
        alone = case.ours(*case.inputs)
    grad = None if case.backward_work is None else torch.randn_like(alone)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case.inputs]
    truths = results(case.reference, wide, None if grad is None else grad.double())
    owns = results(case.reference, case.inputs, grad)
    found = [alone, *results(case.ours, case.inputs, grad)]
    for ours, own, truth in zip(found, [owns[0], *owns], [truths[0], *truths], strict=True):
        # Numbers of eight bits are rounded as the definition rounds them, or wrongly.
        roundings = 2 if ours.dtype.itemsize > 1 else 0
        truth, own, eps = truth.double(), own.double(), torch.finfo(ours.dtype).eps
        error = (ours.double() - truth).abs().max()
        allowed = 2 * (own - truth).abs().max() + roundings * eps * truth.abs().max()
        if not error <= allowed:
            raise SystemExit(f"{case.op} {case.shape} {ours.dtype}: error {error:.3g} exceeds {allowed:.3g}")


class Clock:
    """Milliseconds of a call; on a GPU by events, with the cache emptied before."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if self.gpu else None

    def __call__(self, function: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def alternate(self, functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        for function in functions.values():
            for _ in range(3):
                function()
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                times[name].append(self(function))
        return times


def ceilings(clock: Clock, dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    """Work per millisecond of one large product and of one large copy."""
    size, length = (1024, 2**24) if device == "cpu" else (8192, 2**30)
    a, b = torch.randn(2, size, size).to(device, dtype)
    source = torch.ones(length, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = clock.alternate({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    work = {"matmul": 2.0 * size**3, "copy": 2.0 * length}
    return {name: work[name] / statistics.median(times[name]) for name in work}


def calls(op: Op, inputs: Sequence[Tensor], grad: Tensor | None) -> dict[str, Callable[[], object]]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            op(*leaves)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        op(*leaves).backward(grad)

    return {"forward": forward} if grad is None else {"forward": forward, "forward+backward": both}


def measure(case: Case, clock: Clock, rates: dict[str, float], rounds: int) -> Iterator[dict]:
    output = case.ours(*case.inputs)
    grad = None if case.backward_work is None else torch.randn_like(output)
    moved = sum(tensor.nbytes for tensor in (*case.inputs, output))  # each tensor once: what a forward must move
    candidates = {"workbench_kernels": case.ours, **case.peers}
    if clock.gpu:
        candidates["torch.compile of the definition"] = torch.compile(case.reference)
    directions = {"forward": case.forward_work}
    if case.backward_work is not None:
        directions["forward+backward"] = case.forward_work + case.backward_work
    for direction, work in directions.items():
        functions = {name: calls(op, case.inputs, grad)[direction] for name, op in candidates.items()}
        times = clock.alternate(functions, rounds)
        ours = statistics.median(times["workbench_kernels"])
        for name, values in times.items():
            p20, median, p80 = (statistics.quantiles(values, n=10)[index] for index in (1, 4, 7))
            yield {
                "op": case.op,
                "shape": case.shape,
                "dtype": str(case.inputs[0].dtype).removeprefix("torch."),
                "direction": direction,
                "candidate": name,
                "median_ms": round(median, 4),
                "p20_ms": round(p20, 4),
                "p80_ms": round(p80, 4),
                "of_ceiling": round(work / median / rates[case.ceiling], 3),
                "slower_than_ours": round(median / ours, 2),
                "bound_by": case.ceiling,
                "tflops": round(work / median / 1e9, 4) if case.ceiling == "matmul" else None,
                "flops_per_byte": round(case.forward_work / moved, 3) if case.ceiling == "matmul" else None,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="this op only; may be repeated")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a roofline to PATH.html and PATH.png")
    arguments = parser.parse_args()

    lines = []
    for line in measurements(arguments.device, arguments.op or list(CASES), arguments.rounds):
        print(json.dumps(line), flush=True)
        lines.append(line)
    if arguments.plot is not None:
        from plot import draw

        print(*draw(lines, arguments.plot), sep="\n")


def measurements(device: str, ops: Sequence[str], rounds: int) -> Iterator[dict]:
    """What ran, then for each dtype the ceilings and every measurement."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    yield {
        "device": device,
        "machine": machine,
        "torch": torch.__version__,
        "triton": triton_version(),
        "date": str(datetime.datetime.now(tz=datetime.UTC).date()),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    clock = Clock(device)
    for dtype in (torch.float32, torch.bfloat16):
        rates = ceilings(clock, dtype, device, rounds)
        name = str(dtype).removeprefix("torch.")
        yield {
            "ceiling": name,
            "matmul_tflops": round(rates["matmul"] / 1e9, 3),
            "copy_gb_per_s": round(rates["copy"] / 1e6, 1),
        }
        for op in ops:
            left_out = left_out_on_a_gpu(op, dtype) if device == "cuda" else None
            if left_out is not None:
                yield {"op": op, "dtype": name, "left_out": left_out}
                continue
            torch.manual_seed(0)
            for case in CASES[op](dtype, device):
                check(case)
                yield from measure(case, clock, rates, rounds)


def left_out_on_a_gpu(op: str, dtype: torch.dtype) -> str | None:
    """Why an op is not measured there; float32 products are for toys, and their large cases take too long."""
    if op not in FUSED_OPS:
        return "no fused tier yet"
    return "products are measured in bfloat16" if dtype == torch.float32 and op in PRODUCTS else None


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
