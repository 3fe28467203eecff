"""Random small models of every published type against their class in `transformers`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from published_models import difference, make
from random_models import MODELS, cuts, texts
from wide_reference import reference_of

from workbench.model.config import ModelConfig
from workbench.model.parameter_count import parameters
from workbench.model.to_hf import to_hf


@pytest.mark.parametrize("model_type", MODELS)
@settings(max_examples=12, phases=[Phase.generate])
@given(data=st.data())
@torch.no_grad()
def test_a_random_model(model_type: str, data: st.DataObject) -> None:
    config = data.draw(MODELS[model_type])
    tokens = data.draw(texts(config))
    assert ModelConfig.from_hf(to_hf(config, model_type=model_type)) == config

    narrow = make(config)
    assert parameters(config).total == sum(parameter.numel() for parameter in narrow.parameters())
    assert difference(narrow, reference_of(narrow, model_type, settle_ties=True), tokens) <= 1e-5
    decoder = make(config, torch.float64)
    assert difference(decoder, reference_of(decoder, model_type, settle_ties=True), tokens) <= 1e-10

    full = decoder(tokens).logits
    cache = decoder.new_cache(len(tokens), tokens.shape[1])
    pieces = [decoder(piece, cache).logits for piece in tokens.split(data.draw(cuts(tokens.shape[1])), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-10, atol=1e-10)

    changed, other = data.draw(st.integers(0, tokens.shape[1] - 1)), tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % config.vocab_size
    after = decoder(other).logits
    torch.testing.assert_close(after[:, :changed], full[:, :changed], rtol=1e-12, atol=1e-12)
