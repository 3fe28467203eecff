"""Predicted floating-point operations: by hand on tiny models, and as torch counts those of the model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.model.config import (
    DenseFeedForward,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
)
from workbench.model.count import decode_flops_per_token, training_flops_per_token
from workbench.model.decoder import Decoder

DENSE = DenseFeedForward(intermediate_size=5)
GROUPED = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=6)
LATENT = LatentAttention(
    num_attention_heads=3, q_lora_rank=None, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6
)
COMPRESSED = replace(LATENT, q_lora_rank=10)


def model(*layers: LayerConfig) -> ModelConfig:
    return ModelConfig(vocab_size=11, hidden_size=8, layers=layers, max_position_embeddings=64)


def norm_gains(config: ModelConfig) -> int:
    """Parameters of the norms: the arithmetic counts 2 for each as for any other, torch counts products of matrices."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters() if parameter.ndim == 1)


# Width 8, 11 tokens. Head: 8 x 11 = 88. Feed-forward: 3 x 8 x 5 = 120. Two norms of a layer and the last: 24.
@pytest.mark.parametrize(
    ("attention", "parameters", "decode_growth", "training_growth"),
    [
        # q and o: 8 x 24 each, k and v: 8 x 12 each. A new token's 4 heads multiply 6 + 6 numbers with every key.
        pytest.param(GROUPED, 2 * 192 + 2 * 96 + 120 + 88 + 24, 2 * 4 * 12, 3 * 4 * 12, id="GQA"),
        # q: 8 x 27; down: 8 x 11, its norm 7; up: 7 x 33; o: 18 x 8. Absorbed, each head reads 7 + 4 numbers of
        # every latent for the score and 7 for the mix; in training 9 for the score and 6 for the mix.
        pytest.param(
            LATENT, 216 + 88 + 7 + 231 + 144 + 120 + 88 + 24, 2 * 3 * (11 + 7), 3 * 3 * (9 + 6), id="MLA, absorbed"
        ),
    ],
)
def test_counts_by_hand(
    attention: GroupedQueryAttention | LatentAttention, parameters: int, decode_growth: int, training_growth: int
) -> None:
    config = model(LayerConfig(attention, DENSE))
    assert decode_flops_per_token(config, 0) == 2 * parameters
    assert decode_flops_per_token(config, 10) == 2 * parameters + 10 * decode_growth
    assert training_flops_per_token(config, 10) == 6 * parameters + 10 * training_growth
    with pytest.raises(ValueError, match="context=-1 must be 0 or more"):
        decode_flops_per_token(config, -1)
    with pytest.raises(ValueError, match="context=0 must be 1 or more"):
        training_flops_per_token(config, 0)


def test_layers_add_up_and_only_chosen_experts_count() -> None:
    experts = MixtureOfExperts(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=3, n_shared_experts=1)
    one, both = model(LayerConfig(LATENT, DENSE)), model(LayerConfig(LATENT, DENSE), LayerConfig(GROUPED, experts))
    # Projections as above, two norms, the router, and three experts of three 8 x 3 matrices.
    added = 2 * 192 + 2 * 96 + 16 + 6 * 8 + 3 * 3 * 8 * 3
    assert decode_flops_per_token(both, 10) - decode_flops_per_token(one, 10) == 2 * added + 10 * 2 * 4 * 12
    assert training_flops_per_token(both, 10) - training_flops_per_token(one, 10) == 6 * added + 10 * 3 * 4 * 12


# On the meta device nothing is computed, and attention is torch's own, which the counter looks into.
@pytest.mark.parametrize("attention", [GROUPED, LATENT, COMPRESSED], ids=["GQA", "MLA", "MLA, queries compressed"])
@pytest.mark.parametrize("context", [2, 17])
def test_decoding_takes_as_much_as_torch_counts(
    attention: GroupedQueryAttention | LatentAttention, context: int
) -> None:
    """The new token is the last of the `context` that it sees."""
    config = model(LayerConfig(attention, DENSE), LayerConfig(attention, DENSE))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder, tokens = Decoder(config), torch.zeros(1, context, dtype=torch.int64)
        cache = decoder.new_cache(1, context)
        decoder(tokens[:, :-1], cache)
        before = counter.get_total_flops()
        decoder(tokens[:, -1:], cache)
    measured = counter.get_total_flops() - before
    assert measured == decode_flops_per_token(config, context) - 2 * norm_gains(config)


# Values as wide as keys: narrower ones are filled up for torch's own attention, which then multiplies by zeros.
@pytest.mark.parametrize(
    "attention",
    [GROUPED, replace(LATENT, v_head_dim=9), replace(COMPRESSED, v_head_dim=9)],
    ids=["GQA", "MLA", "MLA, queries compressed"],
)
def test_training_takes_as_much_as_torch_counts(attention: GroupedQueryAttention | LatentAttention) -> None:
    """But for the masked half of the scores, which torch counts and the arithmetic does not."""
    length = 16
    config = model(LayerConfig(attention, DENSE), LayerConfig(attention, DENSE))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Decoder(config)(torch.zeros(2, length, dtype=torch.int64)).logits.sum().backward()
    predicted = training_flops_per_token(config, length)
    attended = predicted - training_flops_per_token(config, length // 2)  # half of the attention's share
    assert counter.get_total_flops() / (2 * length) == predicted + 2 * attended - 6 * norm_gains(config)
