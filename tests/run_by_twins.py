"""A run by Triton twins alone; see tests/test_kernels_twins.py. What `impl="fused"` cannot run raises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import sparse_recipe, tiny_recipe

from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.train.events import Evaluation, Step
from workbench.train.loop import train
from workbench.train.recipes import Recipe
from workbench_kernels import quantize_blockwise, scaled_mm_blockwise
from workbench_kernels.fused.cases import all_cases
from workbench_kernels.fused.tuned import Tuned
from workbench_kernels.quantize_blockwise import FP8
from workbench_kernels.tier import using


@pytest.mark.parametrize("recipe", [tiny_recipe(), sparse_recipe()])
def test_trains_as_the_definitions_do(recipe: Recipe) -> None:
    recipe = replace(recipe, batch_size=2, sequence_length=10, steps=2, evaluation_batches=1, sample_tokens=1)
    by_twins, by_definition = (list(train(replace(recipe, impl=impl))) for impl in ("fused", "reference"))
    for ours, theirs in zip(by_twins, by_definition, strict=True):
        if isinstance(ours, Step) and isinstance(theirs, Step):
            assert ours.losses_nats == pytest.approx(theirs.losses_nats, rel=1e-5, abs=1e-7)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
            np.testing.assert_array_equal(ours.load_LE, theirs.load_LE)
        if isinstance(ours, Evaluation) and isinstance(theirs, Evaluation):
            assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, rel=1e-5)
            assert ours.sample == theirs.sample


def test_writes_from_a_cache_in_fp8() -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_recipe().model)
    prompt = torch.randint(0, 256, (1, 5))
    with using("fused"):
        ours = generate(decoder, prompt, 4, cache_dtype=FP8)
    assert torch.equal(ours.tokens, generate(decoder, prompt, 4, cache_dtype=FP8).tokens)


def test_every_launch_can_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a GPU would look up in its file of measured launches: all kernels that have a tile to choose."""
    table = Tuned(tmp_path / "gpu.json")
    monkeypatch.setattr("workbench_kernels.fused.tuned.interpreting", lambda: False)
    monkeypatch.setattr("workbench_kernels.fused.tuned.tuned", lambda _: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    tiny = {"batch_size": 2, "sequence_length": 4, "steps": 1, "evaluation_batches": 1, "sample_tokens": 2}
    for recipe in (tiny_recipe(), sparse_recipe()):
        list(train(replace(recipe, impl="fused", **tiny)))
    values, scale = quantize_blockwise(torch.ones(1, 128), impl="fused")
    scaled_mm_blockwise(values, values, scale, scale, out_dtype=torch.float32, impl="fused")
    asked = {key.split()[0] for key in table.asked}
    tiled = {case.kernel.__name__ for cases in all_cases().values() for case in cases if case.tile}
    fixed = {name for name in tiled if any(word in name for word in ("expert_", "merge", "preprocess", "topk"))}
    assert asked == tiled - fixed
