"""Compile every Triton kernel, in every configuration that is chosen, for GPUs that are not here; write the table.

    python kernels/bench/compile.py           # kernels/bench/compiled.md
    python kernels/bench/compile.py -o -      # to the screen

It ends with status 1 if a kernel spills, takes more shared memory than its target has or leaves the matrix units idle,
in bfloat16, float32 or float16; the table is of bfloat16. Needs torch and triton, and no GPU. Another Triton is tried
in an environment of its own, with the folder `kernels` on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import triton

from workbench_kernels.fused.ahead_of_time import SHARED_LIMIT, Case, Usage, compile_case
from workbench_kernels.fused.cases import all_cases

TABLE = Path(__file__).with_name("compiled.md")
HEAD = """# What the compiled kernels use

Written by `python kernels/bench/compile.py` on {date} with Triton {version}; no GPU was needed, and none ran anything.
Each cell: registers of a thread / bytes of shared memory, then instructions of the matrix units; empty where another
tile is chosen. A spill, more shared memory than the target has, or a product without its matrix units stands in bold
and ends the command with status 1. Tensors are bfloat16; the command compiles float32 and float16 as well and demands
the same of them.

| kernel and configuration | tile | warps | {targets} |
|---|---|---|{rules}|
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("-o", "--output", default=str(TABLE), help="a file, or - for the screen")
    output = arguments.parse_args().output
    rows, failed = [], []
    for kind in ("bf16", "fp32", "fp16"):
        for cases in all_cases(kind).values():
            for case in cases:
                usages = {target: compile_case(case, target) for target in case.architectures}
                failed += [f"{case.name} {kind} {t}: {x}" for t, u in usages.items() for x in u.faults(case, t)]
                if kind == "bf16":
                    rows.append(row(case, usages))
    text = HEAD.format(
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        version=triton.__version__,
        targets=" | ".join(SHARED_LIMIT),
        rules="|".join(["---"] * len(SHARED_LIMIT)),
    )
    text += "\n".join(rows) + "\n"
    if output == "-":
        print(text)
    else:
        Path(output).write_text(text)
        print(f"{len(rows)} kernels for {len(SHARED_LIMIT)} targets with Triton {triton.__version__}: {output}")
    if failed:
        sys.exit("\n".join(failed))


def row(case: Case, usages: dict[str, Usage]) -> str:
    cells = [cell(case, usages[target], target) if target in usages else "" for target in SHARED_LIMIT]
    return f"| {case.name} | {case.tile} | {case.num_warps} | {' | '.join(cells)} |"


def cell(case: Case, usage: Usage, target: str) -> str:
    counts = [f"{count} {name.split('.')[0]}" for name, count in usage.matrix_instructions.items()]
    words = ", ".join([f"{usage.registers} / {usage.shared_bytes}", *counts])
    faults = usage.faults(case, target)
    return f"**{words}: {', '.join(faults)}**" if faults else words


if __name__ == "__main__":
    main()
