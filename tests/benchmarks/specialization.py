"""Do the experts of `toy_v3` specialize by corpus? Three seeds trained to their end, beside shuffled labels.

python tests/benchmarks/specialization.py [--threads 2] [--seeds 3] [--steps 300]
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from workbench.analysis import DocumentRouting, specialization_report
from workbench.analysis.probe import document_routing
from workbench.text import load
from workbench.train.loop import train
from workbench.train.recipes import toy_v3
from workbench.train.state import TrainState


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=toy_v3().steps)
    said = arguments.parse_args()
    text = load(toy_v3().text, toy_v3().tokenizer)
    untrained: dict[int, DocumentRouting] = {}
    routing: dict[int, DocumentRouting] = {}
    for seed in range(said.seeds):
        recipe = replace(toy_v3(), seed=seed, steps=said.steps, num_threads=said.threads, sample_tokens=0)
        state = TrainState(recipe)
        # Corpora use other letters, so even the first weights send them to other experts.
        untrained[seed] = document_routing(state.decoder.eval(), text)
        state.decoder.train()
        for _ in train(recipe, state, text):
            pass
        routing[seed] = document_routing(state.decoder.eval(), text)
        print(f"seed {seed}: {state.step} steps, last training loss {state.recent_losses[-1]:.3f} nats", flush=True)
    report = specialization_report(routing)
    print(report.frame.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    print(f"before training: {specialization_report(untrained).verdict}")
    print(f"after {said.steps} steps: {report.verdict}")
    print(f"torch {torch.__version__}, {said.threads} threads")


if __name__ == "__main__":
    main()
