"""Peak memory beyond the weights, of this project and of `transformers`, each in a process of its own (Linux).

python tests/benchmarks/peak_memory.py

Decoding: 4096 tokens enter the cache, 1024 at once, then 4 more follow one by one; attention of DeepSeek-V2-Lite.
Training: forward and backward of `toy_v3`'s batch (8 x 256 tokens), gradients included, optimizer excluded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from infer_cpu import Pair, theirs, v2_lite

import workbench

TASKS = ("decode", "train")
SIDES = ("ours", "eager", "grouped_mm")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--measure", nargs=2, metavar=("TASK", "SIDE"), help="measure one, in this process")
    task_and_side = arguments.parse_args().measure
    if task_and_side:
        print(f"{measure(*task_and_side):.0f}")
        return
    for task in TASKS:
        peaks = {side: peak_of(task, side) for side in SIDES}
        ours = peaks.pop("ours")
        least = min(peaks, key=lambda side: peaks[side])
        print(f"{task}: {ours:.0f} MiB, peer ({least}) {peaks[least]:.0f} MiB: ratio {peaks[least] / ours:.2f}")


def peak_of(task: str, side: str) -> float:
    """MiB, measured in a new process."""
    command = [sys.executable, __file__, "--measure", task, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(task: str, side: str) -> float:
    """MiB by which memory rises at most above what is held once the models stand."""
    if task == "decode":
        pair, tokens = Pair(v2_lite(1), "deepseek_v2"), 4096 + 4
        before = forget_peak()
        decode(pair, side, tokens)
    else:
        recipe = workbench.toy_v3()
        pair = Pair(replace(recipe.model, mtp_layers=()), "deepseek_v3")
        model: Any = pair.decoder if side == "ours" else pair.peers[side].train()
        before = forget_peak()
        tokens = torch.randint(0, recipe.model.vocab_size, (recipe.batch_size, recipe.sequence_length + 1))
        logits = model(tokens[:, :-1]).logits if side == "ours" else model(tokens[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return mebibytes("VmHWM") - before


@torch.inference_mode()
def decode(pair: Pair, side: str, length: int) -> None:
    step = pair.ours(length) if side == "ours" else theirs(pair.peers[side])
    tokens = pair.tokens(length)
    for piece in (*tokens[:, :4096].split(1024, dim=1), *tokens[:, 4096:].split(1, dim=1)):
        step(piece)


def forget_peak() -> float:
    """MiB held now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return mebibytes("VmRSS")


def mebibytes(field: str) -> float:
    """What Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    main()
