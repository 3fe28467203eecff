"""How long `toy_v3` takes on this machine, what it reaches, and how fast it then speaks with and without drafts.

    python tests/benchmarks/toy_v3.py [--threads 2] [--rounds 5] [--tokens 128]

Drafts come from the trained prediction depth and are verified by the main model; `transformers`' `generate` on the same
weights runs in turn with ours, with its fastest experts. All continue the same 64 tokens of validation text; the greedy
ones are asserted equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from wide_reference import reference_of

from workbench.model.decoder import Decoder
from workbench.model.generate import Generation, generate
from workbench.text import load
from workbench.train.events import Evaluation
from workbench.train.loop import train
from workbench.train.recipes import Recipe, toy_v3
from workbench.train.state import TrainState

PROMPT = 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--tokens", type=int, default=128)
    options = arguments.parse_args()
    recipe = replace(toy_v3(), num_threads=options.threads)
    state, began = TrainState(recipe), time.perf_counter()
    for event in train(recipe, state):
        if isinstance(event, Evaluation):
            floor = event.floors_nats_per_byte["bigram"]
            print(
                f"{time.perf_counter() - began:6.0f} s  step {event.step:4}  validation {event.nats_per_byte:.3f}"
                f" nats/byte (bigram {floor:.3f})  second token {event.mtp_accuracy[1]:.1%}"
                f" (counting {event.distance_bigram_accuracy[1]:.1%})"
            )
    print(f"toy_v3: {time.perf_counter() - began:.0f} s, torch {torch.__version__}, {options.threads} threads")
    for temperature in (0.0, 0.8):
        speak(recipe, state.decoder, temperature, options.tokens, options.rounds)


def speak(recipe: Recipe, decoder: Decoder, temperature: float, added: int, rounds: int) -> None:
    """Print tokens per second of every way to add `added` tokens to the prompt."""
    validation = load(recipe.text, recipe.tokenizer).validation(1, PROMPT)
    prompt = torch.from_numpy(validation[0].tokens[:, :PROMPT])
    settings = {"do_sample": temperature > 0} | ({"temperature": temperature, "top_k": 0} if temperature else {})
    ways: dict[str, Callable[[], Tensor | Generation]] = {
        "plain": partial(generate, decoder, prompt, added, temperature=temperature),
        "with drafts": partial(generate, decoder, prompt, added, temperature=temperature, speculate=True),
    }
    for experts in ("eager", "grouped_mm"):
        peer = reference_of(decoder, attention="sdpa")
        peer.set_experts_implementation(experts)
        ways[f"peer ({experts})"] = partial(peer.generate, prompt, max_new_tokens=added, **settings)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        said = {}
        for way, run in ways.items():
            began = time.perf_counter()
            said[way] = run()
            seconds[way].append(time.perf_counter() - began)
        texts = [one.tokens if isinstance(one, Generation) else one for one in said.values()]
        assert temperature > 0 or all(torch.equal(text, texts[0]) for text in texts)
    medians = {way: statistics.median(values[1:]) for way, values in seconds.items()}
    fastest = min(medians[way] for way in ways if way.startswith("peer"))
    drafts = said["with drafts"]
    print(f"temperature {temperature}: {drafts.tokens_per_step:.2f} tokens per pass, acceptance {drafts.acceptance}")
    for way, median in medians.items():
        print(f"  {way:18} {added / median:8.1f} tokens/s, {fastest / median:.2f} times the fastest peer")


if __name__ == "__main__":
    main()
