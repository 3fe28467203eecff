"""Measure other launch parameters than the picker's on this GPU, and keep those that are faster.

    python kernels/bench/tune.py --op grouped_mm          # tuned/<device>.json in workbench_kernels/fused

Each kernel and shape that the op's benchmark cases ask for is tried with every parameter halved and doubled, one at a
time and as long as that helps. A launch that does not compile, or whose result differs from the picker's by more than
the rule of the benchmark allows, is left out. Ops read the file when they next start; nothing is measured inside them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from cases import CASES, Case
from run import Clock, Wrong, check
from triton.errors import TritonError

from workbench_kernels.fused.tuned import Tuned, tuned

# What must cover a whole row (block_c, block_d, block_e, block_p) stays as picked: less would leave a part unwritten.
BOUNDS = {
    "num_warps": (1, 16),
    "num_stages": (1, 6),
    "num_splits": (1, 1_024),
    "block_m": (1, 512),
    "block_n": (1, 512),
    "block_k": (16, 256),
    "block_s": (16, 512),
    "block_t": (16, 512),
    "block_v": (256, 16_384),
    "block_x": (16, 1_024),
    "chunk": (16, 512),
    "rows": (16, 512),
    "block": (16, 512),
}
GAIN = 0.98  # of the time before: less is noise


def neighbours(launch: Any) -> Iterator[Any]:
    """The launches that differ in one number: a block halved or doubled, a stage less or more."""
    for field in fields(launch):
        value = getattr(launch, field.name)
        steps = (value - 1, value + 1) if field.name == "num_stages" else (value // 2, value * 2)
        low, high = BOUNDS.get(field.name, (value, value))
        for step in steps:
            if low <= step <= high and step != value:
                yield replace(launch, **{field.name: step})


def improve(table: Tuned, key: str, milliseconds: Callable[[], float | None]) -> tuple[float, float]:
    """Descend from the launch in use to the fastest near it; returns the time before and after.

    `milliseconds` measures the op as the table says now, None if it does not run or is wrong.
    """
    best = table.choose(key, table.asked[key])
    before = fastest = milliseconds()
    if before is None or fastest is None:
        raise SystemExit(f"{key}: the launch in use does not pass the check")
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            table.set(key, candidate)
            time = milliseconds()
            if time is not None and time < GAIN * fastest:
                best, fastest, improved = candidate, time, True
        table.set(key, best)
    return before, fastest


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Let `torch.empty` return NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def measured(case: Case, clock: Clock, rounds: int) -> Callable[[], float | None]:
    """The median time of forward and backward, None where the op fails or its result is wrong."""
    out = case.ours(*case.inputs)
    grad = None if case.backward_work is None else torch.randn_like(out)
    leaves = [x.detach().requires_grad_(x.is_floating_point() and case.backward_work is not None) for x in case.inputs]

    def both() -> None:
        out = case.ours(*leaves)
        if out.requires_grad:
            out.backward(grad)

    def milliseconds() -> float | None:
        try:
            with uninitialized_memory_is_nan():  # or what an earlier launch wrote would pass for a result
                check(case)
            return statistics.median(clock.alternate({"ours": both}, rounds)["ours"])
        except (RuntimeError, Wrong, TritonError):  # too much shared memory, too many registers; a wrong result
            return None

    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="this op only; may be repeated")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU: torch sees no CUDA or ROCm device")
    table = tuned(torch.cuda.get_device_name())
    clock = Clock("cuda")
    for op in arguments.op or CASES:
        for case in CASES[op](torch.bfloat16, "cuda"):
            table.asked.clear()
            time = measured(case, clock, arguments.rounds)
            time()
            for key in list(table.asked):
                before, after = improve(table, key, time)
                print(f"{case.op} {case.shape}: {key}: {before:.3f} -> {after:.3f} ms")
                table.save()


if __name__ == "__main__":
    main()
