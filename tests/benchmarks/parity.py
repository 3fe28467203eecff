"""How far logits lie from those of `transformers`: a fixed model of every published type, and random ones.

    python tests/benchmarks/parity.py [--draws 50]

The number is the largest difference of logits, divided by the largest logit where that is above 1. Bounds: 1e-5 in
float32, 1e-10 in float64. Of the random models the worst is shown; they are other ones on every run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from published_models import BUILT, difference, make
from random_models import MODELS, texts
from wide_reference import reference_of

DTYPES = torch.float32, torch.float64


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--draws", type=int, default=50)
    draws = arguments.parse_args().draws
    print(f"{'model':40} float32  float64")
    for name, config in BUILT.items():
        decoders = [make(config, dtype) for dtype in DTYPES]
        show(name, [difference(decoder, reference_of(decoder)) for decoder in decoders])
    for model_type in MODELS:
        show(f"{model_type}, worst of {draws} at random", worst(model_type, draws))


def worst(model_type: str, draws: int) -> list[float]:
    """The largest difference in each dtype that any of `draws` random models shows."""
    found = [0.0] * len(DTYPES)

    @settings(
        max_examples=draws,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        config = data.draw(MODELS[model_type])
        text = data.draw(texts(config))
        for i, dtype in enumerate(DTYPES):
            decoder = make(config, dtype)
            peer = reference_of(decoder, model_type, settle_ties=True)
            found[i] = max(found[i], difference(decoder, peer, text))

    draw()
    return found


def show(name: str, differences: list[float]) -> None:
    print(f"{name:40} " + "  ".join(f"{x:.1e}" for x in differences), flush=True)


if __name__ == "__main__":
    main()
