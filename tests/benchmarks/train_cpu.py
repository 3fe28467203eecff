"""Training speed on a CPU against `transformers`, with the same weights and the same tokens.

    python tests/benchmarks/train_cpu.py [--rounds 9] [--threads 2]

One step is forward, backward and AdamW update of `toy_v3`'s configuration (without its further prediction depth, which
the peer cannot train). Loss and gradients are asserted equal before anything is timed; every expert implementation
of the peer is timed and its fastest is the yardstick; steps are interleaved; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from wide_reference import reference_of

from workbench.model.decoder import Decoder
from workbench.train.recipes import NoBalance, toy_v3
from workbench.train.state import TrainState

PEER_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)

    recipe = replace(toy_v3(), balance=NoBalance(), seed=0)
    recipe = replace(recipe, model=replace(recipe.model, mtp_layers=()))
    shape = (recipe.batch_size, recipe.sequence_length + 1)
    tokens = torch.randint(0, recipe.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))

    assert_equal_loss_and_gradients(recipe, tokens)
    ours = {dtype: our_step(replace(recipe, dtype=dtype), tokens) for dtype in ("float32", "bfloat16")}
    peers = {f"peer {name}": peer_step(recipe, tokens, name) for name in PEER_IMPLEMENTATIONS}
    peers = without_the_hopeless(peers)
    seconds = interleaved({**ours, **peers}, options.rounds)

    tokens_per_step = recipe.batch_size * recipe.sequence_length
    for name, median in seconds.items():
        print(f"{name:18} {median * 1000:8.1f} ms/step {tokens_per_step / median:9.0f} tokens/s")
    fastest = min((name for name in seconds if name.startswith("peer")), key=lambda name: seconds[name])
    print(f"yardstick: {fastest} in float32, torch {torch.__version__}, {options.threads} threads")
    print(f"bfloat16 compute ratio {seconds[fastest] / seconds['bfloat16']:.2f}")
    print(f"float32 ratio {seconds[fastest] / seconds['float32']:.2f}")


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def assert_equal_loss_and_gradients(recipe, tokens: torch.Tensor) -> None:
    """In float64: in float32 a token whose experts score alike may be sent elsewhere by either side's rounding."""
    decoder = TrainState(recipe).decoder
    peer = reference_of(decoder, "deepseek_v3", attention="sdpa").train().double()
    decoder = decoder.double()
    losses = {}
    for name, model in (("ours", decoder), ("peer", peer)):
        losses[name] = next_token_loss(model(tokens[:, :-1]).logits, tokens)
        losses[name].backward()
    torch.testing.assert_close(losses["ours"], losses["peer"], rtol=1e-4, atol=1e-4)
    reference = dict(peer.named_parameters())
    for name, parameter in decoder.named_parameters():
        theirs = reference[name if name.startswith("lm_head") else f"model.{name}"]
        assert parameter.grad is not None and theirs.grad is not None, name
        scale = float(theirs.grad.abs().max().clamp(min=1e-12))
        torch.testing.assert_close(parameter.grad / scale, theirs.grad / scale, rtol=1e-4, atol=1e-4, msg=name)
    print(f"equal: loss {losses['ours'].item():.6f}, {len(reference)} gradients within 1e-4 of their largest entry")


def our_step(recipe, tokens: torch.Tensor) -> Callable[[], None]:
    from workbench.train.loop import gather_gradients

    state = TrainState(recipe)

    def step() -> None:
        for parameter in state.master.values():
            parameter.grad = None
        next_token_loss(state.decoder(tokens[:, :-1]).logits, tokens).backward()
        gather_gradients(state)
        state.optimizer.step()
        state.copy_master_to_decoder()

    return step


def peer_step(recipe, tokens: torch.Tensor, implementation: str) -> Callable[[], None]:
    torch.manual_seed(recipe.seed)
    peer = reference_of(Decoder(recipe.model), "deepseek_v3", attention="sdpa").train()
    peer.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        next_token_loss(peer(tokens[:, :-1], use_cache=False).logits, tokens).backward()
        optimizer.step()

    return step


def without_the_hopeless(peers: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """The implementations whose second step takes less than three times that of the fastest."""
    seconds = {}
    for name, step in peers.items():
        step()
        began = time.perf_counter()
        step()
        seconds[name] = time.perf_counter() - began
    fastest = min(seconds.values())
    for name, taken in seconds.items():
        if taken >= 3 * fastest:
            print(f"{name:18} {taken * 1000:8.1f} ms/step, {taken / fastest:.1f} times the fastest: timed this once")
    return {name: step for name, step in peers.items() if seconds[name] < 3 * fastest}


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each step, all of them run in turn `rounds` times after one warm-up each."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
