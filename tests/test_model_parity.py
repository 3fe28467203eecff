"""Every published type against its class in `transformers`: float32 as it is, float64 with its casts lifted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_models import BUILT, VOCABULARY, difference, make, tokens, with_attention, with_experts
from torch.nn.functional import cross_entropy
from wide_reference import named_as_theirs, reference_of

from workbench.blocks.router import Router
from workbench.model.config import Rope
from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.model.parameter_count import parameters
from workbench.model.rotary import rotary_frequencies


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_equal_the_reference(name: str, dtype: torch.dtype, allowed: float) -> None:
    decoder = make(BUILT[name], dtype)
    found = difference(decoder, reference_of(decoder))
    assert found <= allowed, f"{name}: {found:.2e}"


@pytest.mark.parametrize("name", BUILT)
def test_gradients_equal_the_reference(name: str) -> None:
    decoder = make(BUILT[name], torch.float64)
    peer = reference_of(decoder)
    for side in (decoder, peer):
        cross_entropy(side(tokens()).logits.flatten(0, 1), tokens().roll(-1, 1).flatten()).backward()
    ours = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in decoder.named_parameters()}
    renamed = named_as_theirs(ours, peer.config.model_type, len(BUILT[name].layers))
    reference = {key: p.grad for key, p in peer.named_parameters() if p.numel()}
    assert renamed.keys() == reference.keys()
    for key, theirs in reference.items():
        theirs = torch.zeros_like(renamed[key]) if theirs is None else theirs
        torch.testing.assert_close(renamed[key], theirs, rtol=1e-8, atol=1e-10 * float(theirs.abs().max()), msg=key)
        # The choice of what to read has no gradient: an indexer learns from a loss of its own.
        assert theirs.any() != ("indexer" in key), key


V2 = BUILT["deepseek_v2"]
WRONG = {
    "interleaved positions": ("llama", with_attention(BUILT["llama"], rope=Rope(rope_interleave=True))),
    "another base": ("llama", with_attention(BUILT["llama"], rope=Rope(rope_theta=501.0))),
    "another window": ("mixtral, windowed", with_attention(BUILT["mixtral, windowed"], sliding_window=10)),
    "weights not normalised": ("mixtral", with_experts(BUILT["mixtral"], norm_topk_prob=False)),
    "weights normalised": ("deepseek_v2", with_experts(V2, norm_topk_prob=True)),
    "groups by their best two": ("deepseek_v2", with_experts(V2, topk_method="noaux_tc")),
    "no groups": ("deepseek_v2", with_experts(V2, topk_method="greedy", n_group=1, topk_group=1)),
    "fewer keys": ("deepseek_v32", with_attention(BUILT["deepseek_v32"], index_topk=2)),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_comparison_sees_another_model(mistake: str) -> None:
    name, wrong = WRONG[mistake]
    assert difference(make(wrong), reference_of(make(BUILT[name]))) > 1e-3


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "dots1", "deepseek_v4"])
@torch.no_grad()
def test_the_selection_biases_change_choices(name: str) -> None:
    decoder = make(BUILT[name])
    chosen = []
    for _ in range(2):
        routings = [x for x in decoder(tokens()).routing if x is not None]
        chosen.append(torch.stack([x.indices.sort(-1).values for x in routings[-1:]]))
        for module in decoder.modules():
            if isinstance(module, Router):
                module.e_score_correction_bias.zero_()
    assert (chosen[0] != chosen[1]).any(-1).float().mean() > 0.2


def test_rotary_frequencies_are_the_references_own() -> None:
    stretched = ("deepseek_v2", "deepseek_v3", "llama 3.1")
    for name in stretched:
        decoder = make(BUILT[name])
        ours = rotary_frequencies(BUILT[name].layers[0].attention, torch.float32, torch.device("cpu"))
        torch.testing.assert_close(ours, reference_of(decoder).model.rotary_emb.inv_freq, rtol=0, atol=0, msg=name)


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
