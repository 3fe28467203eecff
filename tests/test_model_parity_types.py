"""Every published type against its class in `transformers`: float32 as it is, float64 with its casts lifted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_models import BUILT, VOCABULARY, difference, make, tokens
from wide_reference import reference_of

from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.model.parameter_count import parameters


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_equal_the_reference(name: str, dtype: torch.dtype, allowed: float) -> None:
    decoder = make(BUILT[name], dtype)
    found = difference(decoder, reference_of(decoder))
    assert found <= allowed, f"{name}: {found:.2e}"


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("pieces", [[50], [1] * 50, [7, 1, 1, 20, 21]])
@torch.no_grad()
def test_cached_equals_full(name: str, pieces: list[int]) -> None:
    decoder = make(BUILT[name], torch.float64)
    cache = decoder.new_cache(2, 50)
    pieced = torch.cat([decoder(piece, cache).logits for piece in tokens().split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(pieced, decoder(tokens()).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("changed", [0, 17, 49])
@torch.no_grad()
def test_changing_a_token_changes_no_earlier_logit(name: str, changed: int) -> None:
    decoder, other = make(BUILT[name], torch.float64), tokens()
    other[:, changed] = (other[:, changed] + 1) % VOCABULARY
    before, after = decoder(tokens()).logits, decoder(other).logits
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, changed], after[:, changed])


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v4"])
def test_counts_equal_the_parameters(name: str) -> None:
    with torch.device("meta"):
        decoder = Decoder(BUILT[name])
    assert parameters(BUILT[name]).total == sum(parameter.numel() for parameter in decoder.parameters())


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral, windowed", "deepseek_v4"])
def test_what_a_window_dropped_cannot_be_taken_back(name: str) -> None:
    config = BUILT[name]
    with pytest.raises(ValueError, match="cannot go back to 4"):
        decoder = make(config)
        cache = decoder.new_cache(1, 20)
        decoder(tokens()[:1, :9], cache)
        cache.truncate(4)
    layer = replace(config.layers[-1]) if name != "deepseek_v4" else config.layers[1]
    with pytest.raises(ValueError, match=r"speculate=True takes drafts back"):
        generate(make(replace(config, mtp_layers=(layer,))), tokens()[:1, :4], 3, speculate=True)


def test_small_weights_stay_wide_in_a_narrow_model() -> None:
    decoder = make(BUILT["deepseek_v4"]).bfloat16()
    wide = {name.rpartition(".")[2] for name, p in decoder.named_parameters() if p.dtype == torch.float32}
    assert wide == {"fn", "base", "scale", "hc_fn", "hc_base", "hc_scale", "sinks", "position_bias"}
    assert decoder(tokens()).logits.isfinite().all()


def test_a_prediction_layer_cannot_route_by_token_id() -> None:
    config = BUILT["deepseek_v4"]
    with pytest.raises(ValueError, match=r"mtp_layers\[0\] routes by token id"):
        replace(config, mtp_layers=(config.layers[0],))
