"""A run by Triton twins alone; see tests/test_kernels_twins.py. `impl="fused"` never falls back to another form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_rules import DEVICE
from published_models import small
from tiny import tiny_recipe

from workbench.model.config import ModelConfig
from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.train.events import Evaluation, Step
from workbench.train.loop import train
from workbench_kernels.quantize_blockwise import FP8
from workbench_kernels.tier import using


def models() -> dict[str, ModelConfig]:
    return {"V3": tiny_recipe().model}


@pytest.mark.parametrize("name", models())
def test_trains_as_the_definitions_do(name: str) -> None:
    recipe = replace(
        tiny_recipe(), device=DEVICE, batch_size=2, sequence_length=12, steps=2, evaluation_batches=1, sample_tokens=2
    )
    events = {impl: list(train(replace(recipe, impl=impl))) for impl in ("fused", "reference")}
    for ours, theirs in zip(events["fused"], events["reference"], strict=True):
        if isinstance(ours, Step):
            assert ours.losses_nats == pytest.approx(theirs.losses_nats, rel=1e-5)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
            np.testing.assert_array_equal(ours.load_LE, theirs.load_LE)
        if isinstance(ours, Evaluation):
            assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, rel=1e-5)
            assert ours.sample == theirs.sample
