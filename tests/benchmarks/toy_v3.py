"""How long `toy_v3` takes on this machine, and what it reaches.

python tests/benchmarks/toy_v3.py [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from workbench.train.events import Evaluation
from workbench.train.loop import train
from workbench.train.recipes import toy_v3


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    threads = arguments.parse_args().threads
    began = time.perf_counter()
    for event in train(replace(toy_v3(), num_threads=threads)):
        if isinstance(event, Evaluation):
            floor = event.floors_nats_per_byte["bigram"]
            print(
                f"{time.perf_counter() - began:6.0f} s  step {event.step:4}  validation {event.nats_per_byte:.3f}"
                f" nats/byte (bigram {floor:.3f})  second token {event.mtp_accuracy[1]:.1%}"
                f" (counting {event.distance_bigram_accuracy[1]:.1%})"
            )
    print(f"toy_v3: {time.perf_counter() - began:.0f} s, torch {torch.__version__}, {threads} threads")


if __name__ == "__main__":
    main()
