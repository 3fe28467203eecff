"""A run by Triton twins alone; see tests/test_kernels_twins.py. What `impl="fused"` cannot run raises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import sparse_recipe, tiny_recipe

from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.train.events import Evaluation, Step
from workbench.train.loop import train
from workbench.train.recipes import Recipe
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
