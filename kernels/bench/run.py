"""Time every op beside plain torch, after checking that it is right: one JSON line per measurement.

On a CPU the fast torch forms are timed, on a GPU the Triton twins of those ops that have one. Candidates of one case
take turns, so that a slow moment of the machine hits all of them; `of_ceiling` compares with a rate measured in the
same process.

    python kernels/bench/run.py                          # this machine, all ops
    python kernels/bench/run.py --op moe_mlp --rounds 51
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels import causal_attention, grouped_mm, mla_attention, moe_mlp, rms_norm, rope
from workbench_kernels.causal_attention import flash
from workbench_kernels.causal_attention import reference as causal_attention_reference
from workbench_kernels.expert_order import sort_by_expert
from workbench_kernels.grouped_mm import reference as grouped_mm_reference
from workbench_kernels.mla_attention import join_by_head
from workbench_kernels.mla_attention import reference as mla_attention_reference
from workbench_kernels.moe_mlp import reference as moe_mlp_reference
from workbench_kernels.rms_norm import reference as rms_norm_reference
from workbench_kernels.rope import reference as rope_reference
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
    backward_work: float


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


EPS = 1e-6


def grouped_mm_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    for m, k, n, experts in ((4096, 256, 128, 16), (4096, 256, 256, 16), (2048, 256, 192, 32)):
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
    for tokens, active, width, hidden, experts in (
        (1024, 4, 256, 192, 16),
        (2048, 2, 256, 128, 16),
        (2048, 2, 256, 192, 32),
    ):
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


def mla_attention_cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    small, large = (8, (32, 16, 32), ((8, 256), (2, 1024))), (16, (128, 64, 128), ((4, 4096),))
    heads, (key_width, rope_width, value_width), lengths = small if device == "cpu" else large
    scale, width = (key_width + rope_width) ** -0.5, key_width + rope_width + value_width
    for sequences, length in lengths:
        shapes = ((heads, key_width), (heads, rope_width), (heads, key_width), (rope_width,), (heads, value_width))
        inputs = tuple(torch.randn(sequences, length, *shape).to(device, dtype) for shape in shapes)
        packed = tuple(x.flatten(0, 1).unsqueeze(0) for x in inputs)
        ends = torch.arange(0, sequences * length + 1, length, dtype=torch.int32, device=device)
        window = length // 8
        for kind, tensors, options, most in (
            ("", inputs, {}, length),
            (" packed", packed, {"cu_seqlens": ends}, length),
            (f" window={window}", inputs, {"window": window}, window),
        ):
            definition = partial(mla_attention_reference, softmax_scale=scale, **options)
            peers: dict[str, Op] = {"definition": definition}
            if not options:
                peers["F.scaled_dot_product_attention, joined"] = partial(joined_attention, scale=scale)
            # What a query may see.
            pairs = sequences * sum(min(position + 1, most) for position in range(length))
            yield Case(
                "mla_attention",
                f"B={sequences} T={length} H={heads} K={key_width} R={rope_width} U={value_width}{kind}",
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
    "mla_attention": mla_attention_cases,
    "moe_mlp": moe_mlp_cases,
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
}


def results(op: Op, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = op(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check(case: Case) -> None:
    """Refuse to time a wrong result: the rule of tests/kernel_rules.py, with gradients and without."""
    with torch.no_grad():
        alone = case.ours(*case.inputs)
    grad = torch.randn_like(alone)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case.inputs]
    truths = results(case.reference, wide, grad.double())
    owns = results(case.reference, case.inputs, grad)
    found = [alone, *results(case.ours, case.inputs, grad)]
    for ours, own, truth in zip(found, [owns[0], *owns], [truths[0], *truths], strict=True):
        rounding = 2 * torch.finfo(ours.dtype).eps * truth.abs().max()
        error, allowed = (ours - truth).abs().max(), 2 * (own - truth).abs().max() + rounding
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


def calls(op: Op, inputs: Sequence[Tensor], grad: Tensor) -> dict[str, Callable[[], object]]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            op(*leaves)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        op(*leaves).backward(grad)

    return {"forward": forward, "forward+backward": both}


def measure(case: Case, clock: Clock, rates: dict[str, float], rounds: int) -> Iterator[dict]:
    grad = torch.randn_like(case.ours(*case.inputs))
    candidates = {"workbench_kernels": case.ours, **case.peers}
    for direction, work in (
        ("forward", case.forward_work),
        ("forward+backward", case.forward_work + case.backward_work),
    ):
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
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="this op only; may be repeated")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()

    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    report = {"device": arguments.device, "machine": machine, "torch": torch.__version__}
    print(json.dumps({**report, "threads": torch.get_num_threads(), "rounds": arguments.rounds}))
    clock = Clock(arguments.device)
    for dtype in (torch.float32, torch.bfloat16):
        rates = ceilings(clock, dtype, arguments.device, arguments.rounds)
        name = str(dtype).removeprefix("torch.")
        print(
            json.dumps(
                {
                    "ceiling": name,
                    "matmul_tflops": round(rates["matmul"] / 1e9, 3),
                    "copy_gb_per_s": round(rates["copy"] / 1e6, 1),
                }
            )
        )
        for op in arguments.op or CASES:
            if arguments.device == "cuda" and op not in FUSED_OPS:
                print(json.dumps({"op": op, "dtype": name, "left_out": "no fused tier yet"}))
                continue
            torch.manual_seed(0)
            for case in CASES[op](dtype, arguments.device):
                check(case)
                for line in measure(case, clock, rates, arguments.rounds):
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
