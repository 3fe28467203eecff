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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from cases import CASES, LOOPS, PRODUCTS, Case, Op
from torch import Tensor

from workbench_kernels.tier import FUSED_OPS

PEER_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError)
if find_spec("triton") is not None:  # no peer is written in it where it is not
    from triton.errors import TritonError

    PEER_ERRORS += (TritonError,)


def results(op: Op, inputs: Sequence[Tensor], grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        return [op(*inputs)]
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = op(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


class Wrong(Exception):
    """A result breaks the rule."""


def check(case: Case) -> None:
    """Refuse to time a wrong result: the rule of tests/kernel_rules.py, with gradients and without.

    Raises:
        Wrong: the error of an output or a gradient is larger than allowed.
    """
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
            raise Wrong(f"{case.op} {case.shape} {ours.dtype}: error {error:.3g} exceeds {allowed:.3g}")


# Of a GPU's clock, about half a millisecond: meanwhile the host hands over what is timed. What takes the host longer,
# as a loop over experts does, is still timed with it.
HOST_CYCLES = 1_000_000


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
        torch.cuda._sleep(HOST_CYCLES)
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
            op(*inputs)  # not the leaves: a peer may make gradients ahead wherever an input asks for them

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
    if clock.gpu and case.op not in LOOPS:
        candidates["torch.compile of the definition"] = torch.compile(case.reference)
    directions = {"forward": case.forward_work}
    if case.backward_work is not None:
        directions["forward+backward"] = case.forward_work + case.backward_work
    for name, failure in failures(case, candidates, grad).items():
        del candidates[name]
        yield {"op": case.op, "shape": case.shape, "candidate": name, "failed": failure}
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


def failures(case: Case, candidates: dict[str, Op], grad: Tensor | None) -> dict[str, str]:
    """The peers that cannot do this case, with the first line of what they say: they are not ours to mend."""
    found = {}
    for name, op in candidates.items():
        try:
            results(op, case.inputs, grad)
        except PEER_ERRORS as error:
            if op is case.ours:
                raise
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


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
    if any("wrong" in line for line in lines):
        raise SystemExit("what is wrong above was not timed")


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
                try:
                    check(case)
                except Wrong as error:
                    yield {"op": op, "shape": case.shape, "dtype": name, "wrong": str(error)}
                    continue
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
