"""The main way on a GPU: a run trains there, goes on from a checkpoint, and its model writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny import tiny_recipe

from workbench import live
from workbench.model.generate import generate
from workbench.text import load
from workbench.train.recipes import toy_v3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]


@pytest.mark.parametrize("impl", ["auto", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_trains_resumes_and_writes(tmp_path: Path, dtype: str, impl: Literal["auto", "fused"]) -> None:
    recipe = replace(tiny_recipe(), device="cuda", dtype=dtype, steps=6, checkpoint_every=3, impl=impl)
    text = load(recipe.text, recipe.tokenizer)
    assert live.start(recipe, tmp_path / "run", text=text).wait(300) == "finished"
    assert live.resume(tmp_path / "run", text=text, steps=12).wait(300) == "finished"
    decoder = live.decoder(tmp_path / "run", device="cuda")
    prompt = torch.randint(0, 256, (1, 8), device="cuda")
    assert generate(decoder, prompt, 8).tokens.shape == (1, 16)


def test_toy_v3_learns_on_a_gpu(tmp_path: Path) -> None:
    recipe = replace(toy_v3(), device="cuda", steps=20, evaluate_every=20, evaluation_batches=2, sample_tokens=8)
    run = live.start(recipe, tmp_path / "toy")
    assert run.wait(500) == "finished"
    losses = run.snapshot().series["next_token"].values
    assert losses[-1] < losses[0] - 1
