"""Decoding and prefill on a CPU against `transformers`, with the same weights and the same tokens.

    python tests/benchmarks/infer_cpu.py [--rounds 7] [--layers 1 4] [--contexts 1024 4096 16384] [--threads 2]

Decoding: one token after the other behind a cache of each length, with the attention of DeepSeek-V2-Lite (16 heads,
latent of 512) in one and four layers of small feed-forwards, and with `toy_v3` at 64 tokens. Prefill: whole sequences
into an empty cache. Logits are asserted equal in every round, steps are interleaved, medians are compared, and the peer
has torch's fused attention and the faster of its two ways through the experts.
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
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1]))

from wide_reference import reference_of

import workbench
from workbench.model.config import LayerConfig, MixtureOfExperts, ModelConfig
from workbench.model.decoder import Decoder
from workbench.model.generate import generate

PIECE = 1024  # tokens that enter a cache at once
SMALL = MixtureOfExperts(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
)


@torch.inference_mode()
def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(f"float32, torch {torch.__version__}, {options.threads} threads")

    toy = replace(workbench.toy_v3().model, mtp_layers=())
    pair = Pair(toy, "deepseek_v3")
    print(pair.decoding("toy_v3", 64, 8, options.rounds, goal=2))
    print(pair.generation("toy_v3", 64, 64, options.rounds, goal=2))
    for length in (64, 256):
        print(pair.prefill("toy_v3", length, options.rounds, goal=1.3))
    for num_layers in options.layers:
        pair = Pair(v2_lite(num_layers), "deepseek_v2")
        print(pair.prefill(f"V2-Lite attention, {num_layers} layers", PIECE, options.rounds, goal=1.3))
        for context in options.contexts:
            goal = 20 if context == 4096 else None
            print(pair.decoding(f"V2-Lite attention, {num_layers} layers", context, 3, options.rounds, goal=goal))


def v2_lite(num_layers: int) -> ModelConfig:
    """DeepSeek-V2-Lite's attention and width, with little else."""
    config = workbench.config("deepseek-v2-lite")
    return replace(
        config,
        vocab_size=256,
        layers=(LayerConfig(config.layers[0].attention, SMALL),) * num_layers,
        max_position_embeddings=32768,
    )


class Pair:
    """Our decoder and the peer with its weights."""

    def __init__(self, config: ModelConfig, model_type: str) -> None:
        torch.manual_seed(0)
        self.decoder = Decoder(config)
        self.peers = {
            name: reference_of(self.decoder, model_type, attention="sdpa") for name in ("eager", "grouped_mm")
        }
        for name, peer in self.peers.items():
            peer.set_experts_implementation(name)

    def tokens(self, length: int) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        return torch.randint(0, self.decoder.config.vocab_size, (1, length), generator=draw)

    def decoding(self, name: str, context: int, steps: int, rounds: int, goal: float | None) -> str:
        """Tokens per second of single steps, the first of them behind `context` tokens."""
        total = steps * (rounds + 1)
        sides = {"ours": self.ours(context + total)} | {key: theirs(peer) for key, peer in self.peers.items()}
        tokens = self.tokens(context + total)
        for step in sides.values():
            for piece in tokens[:, :context].split(PIECE, dim=1):
                step(piece)
        seconds: dict[str, list[float]] = {key: [] for key in sides}
        for round_ in range(rounds + 1):
            first = context + steps * round_
            for key, step in sides.items():
                began = time.perf_counter()
                logits = [step(tokens[:, i : i + 1]) for i in range(first, first + steps)]
                seconds[key].append((time.perf_counter() - began) / steps)
                if key == "ours":
                    ours = logits
                else:
                    torch.testing.assert_close(torch.cat(ours), torch.cat(logits), rtol=1e-4, atol=1e-4)
        return line(f"{name}: decode at {context}", seconds, 1, goal)

    def generation(self, name: str, context: int, added: int, rounds: int, goal: float | None) -> str:
        """Tokens per second of `generate` as it is called, the reading of `context` tokens included."""
        tokens = self.tokens(context)
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds + 1):
            sides: dict[str, Callable[[], Tensor]] = {"ours": lambda: generate(self.decoder, tokens, added).tokens}
            for key, peer in self.peers.items():
                sides[key] = partial(peer.generate, tokens, max_new_tokens=added, do_sample=False)
            found = {}
            for key, side in sides.items():
                began = time.perf_counter()
                found[key] = side()
                seconds.setdefault(key, []).append(time.perf_counter() - began)
            assert all(torch.equal(found["ours"], found[key]) for key in self.peers)
        return line(f"{name}: generate {added} after {context}", seconds, added, goal)

    def prefill(self, name: str, length: int, rounds: int, goal: float | None) -> str:
        """Tokens per second of a whole sequence into an empty cache."""
        tokens = self.tokens(length)
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds + 1):
            sides = {"ours": self.ours(length)} | {key: theirs(peer) for key, peer in self.peers.items()}
            logits = {}
            for key, step in sides.items():
                began = time.perf_counter()
                logits[key] = step(tokens)
                seconds.setdefault(key, []).append(time.perf_counter() - began)
            for key in self.peers:
                torch.testing.assert_close(logits["ours"], logits[key], rtol=1e-4, atol=1e-4)
        return line(f"{name}: prefill of {length}", seconds, length, goal)

    def ours(self, max_length: int) -> Callable[[Tensor], Tensor]:
        cache = self.decoder.new_cache(1, max_length)
        return lambda piece: self.decoder(piece, cache).logits


def theirs(peer: Any) -> Callable[[Tensor], Tensor]:
    cache = DynamicCache(config=peer.config)
    return lambda piece: peer(piece, past_key_values=cache).logits


def line(name: str, seconds: dict[str, list[float]], num_tokens: int, goal: float | None) -> str:
    """Medians without the first round, which warms up; the peer's is its fastest."""
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    ours = medians.pop("ours")
    fastest = min(medians, key=lambda key: medians[key])
    wanted = "" if goal is None else f" (goal {goal})"
    return (
        f"{name:45} {num_tokens / ours:8.1f} tokens/s, peer ({fastest}) {num_tokens / medians[fastest]:8.1f}:"
        f" ratio {medians[fastest] / ours:.2f}{wanted}"
    )


if __name__ == "__main__":
    main()
