"""Plain data refuses a value of a wrong kind where it is given, in one line that names the field."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import pytest

from workbench.model import config as spec
from workbench.text import BytePairs, CopyTask, Files, MarkovTask, Mixture, StdlibCode
from workbench.train.optimizer import AdamW
from workbench.train.recipes import AuxiliaryLoss, LossFreeBias, toy_v3
from workbench.train.schedule import WarmupCosine, WarmupStableDecay

RECIPE = toy_v3()
MODEL = RECIPE.model
LAYER = MODEL.layers[0]


def given(good: Any, field: str, value: object) -> None:
    """What the constructor checks: called by itself, as the tests' own checks of annotations would come before it."""
    changed = copy(good)
    object.__setattr__(changed, field, value)
    changed.__post_init__()


@pytest.mark.parametrize(
    ("good", "field", "value", "words"),
    [
        (MODEL, "layers", [LAYER], "=[LayerConfig(attention=LatentAttention(num_attention_heads=8, q_lora_rank=96,"
         "... must be a tuple of LayerConfig"),
        (MODEL, "layers", (1,), "=(1,) must be a tuple of LayerConfig"),
        (MODEL, "hidden_size", True, "=True must be a whole number"),
        (MODEL, "tie_word_embeddings", 1, "=1 must be True or False"),
        (LAYER, "feed_forward", 3, "=3 must be DenseFeedForward or MixtureOfExperts"),
        (spec.Rope(), "rope_theta", "1e4", "='1e4' must be a finite number"),
        (spec.Rope(), "scaling", 1.0, "=1.0 must be Yarn or Llama3Scaling or None"),
        (AdamW(learning_rate=1.0), "learning_rate", "x", "='x' must be a finite number"),
        (AdamW(learning_rate=1.0), "learning_rate", True, "=True must be a finite number"),
        (RECIPE, "mtp_weight", float("inf"), "=inf must be a finite number"),
        (RECIPE, "sample_tokens", 1.5, "=1.5 must be a whole number"),
        (RECIPE, "sample_top_p", 0.0, "=0.0 must lie in (0, 1]"),
        (RECIPE, "sample_temperature", -1.0, "=-1.0 must be 0 or more"),
        (RECIPE, "dtype", "float64", "='float64' must be one of float32, bfloat16"),
        (RECIPE, "seed", "0", "='0' must be a whole number"),
        (RECIPE, "balance", None, "=None must be NoBalance or AuxiliaryLoss or LossFreeBias"),
        (RECIPE, "text", StdlibCode(), "=StdlibCode() must be a Mixture; one corpus alone is Mixture({corpus: 1})"),
        (WarmupCosine(warmup_steps=1), "warmup_steps", 0.5, "=0.5 must be a whole number"),
        (WarmupStableDecay(warmup_steps=1, decay_steps=1), "decay_steps", None, "=None must be a whole number"),
        (AuxiliaryLoss(), "per", "token", "='token' must be one of batch, sequence"),
        (LossFreeBias(), "centred", 0, "=0 must be True or False"),
        (BytePairs(300), "vocab_size", "a", "='a' must be a whole number"),
        (CopyTask(), "length", 2.5, "=2.5 must be a whole number"),
        (MarkovTask(), "concentration", "1", "='1' must be a finite number"),
        (Files("x"), "path", Path("x"), f"={Path('x')!r} must be text"),
    ],
)  # fmt: skip
def test_a_wrong_kind_is_one_line(good: Any, field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        given(good, field, value)
    assert str(caught.value) == field + words


def test_the_constructor_checks() -> None:
    make: Any = Files
    with pytest.raises(ValueError, match=r"path=.* must be text"):
        make(Path("x"))


def test_whole_numbers_stand_for_numbers() -> None:
    given(RECIPE, "mtp_weight", 0)
    given(AdamW(learning_rate=1.0), "learning_rate", 1)
    assert Mixture({CopyTask(): 2}).weights
