"""Cache sizes: the published widths by hand, and predicted equals measured for every kind of attention."""

from __future__ import annotations

import pytest

from workbench.analysis import bytes_per_token, cache_table, variants
from workbench.model.config import (
    DenseFeedForward,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    ModelConfig,
)


def model(attention: GroupedQueryAttention | LatentAttention, num_layers: int = 2) -> ModelConfig:
    layer = LayerConfig(attention, DenseFeedForward(intermediate_size=16))
    return ModelConfig(vocab_size=16, hidden_size=32, layers=(layer,) * num_layers)


V3_ATTENTION = LatentAttention(
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
SMALL_LATENT = LatentAttention(
    num_attention_heads=4, q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
SMALL_GROUPED = GroupedQueryAttention(num_attention_heads=6, num_key_value_heads=3, head_dim=10)


def test_deepseek_v3_widths():
    one_layer = bytes_per_token(model(V3_ATTENTION, 1), "bfloat16")
    assert one_layer == {"MHA": 2 * 2 * 128 * 128, "GQA": 2 * 2 * 8 * 128, "MQA": 2 * 2 * 128, "MLA": 2 * 576}
    # The published 576 elements over 61 layers: 70 272 bytes a token.
    assert bytes_per_token(model(V3_ATTENTION, 61))["MLA"] == 70_272


def test_the_models_own_attention_is_one_of_the_kinds():
    assert variants(model(SMALL_LATENT))["MLA"] == model(SMALL_LATENT)
    assert variants(model(SMALL_GROUPED))["GQA"] == model(SMALL_GROUPED)


def test_a_grouped_model_gets_deepseeks_latent_proportions():
    attention = variants(model(SMALL_GROUPED))["MLA"].layers[0].attention
    assert isinstance(attention, LatentAttention)
    assert (attention.kv_lora_rank, attention.qk_rope_head_dim) == (40, 6)  # 4 heads; half a head, made even


def test_overrides_reach_their_kinds_only():
    table = cache_table(model(SMALL_LATENT), [1], num_attention_heads=8, num_key_value_heads=4, kv_lora_rank=100)
    elements = dict(zip(table["kind"], table["elements_per_token"], strict=True))
    assert elements == {"MHA": 2 * 2 * 8 * 8, "GQA": 2 * 2 * 4 * 8, "MQA": 2 * 2 * 8, "MLA": 2 * (100 + 4)}


def test_table_multiplies_batch_context_and_precision():
    table = cache_table(
        model(SMALL_LATENT), [10, 1000], batch_sizes=[1, 3], precisions=["float32", "bfloat16", "float8"]
    )
    assert len(table) == 4 * 3 * 2 * 2
    assert set(table["provenance"]) == {"predicted"}
    mla = table[table["kind"] == "MLA"]
    keys = zip(mla["precision"], mla["batch_size"], mla["context"], strict=True)
    sizes = dict(zip(keys, mla["bytes"], strict=True))
    assert sizes["float32", 1, 10] == 2 * 28 * 10 * 4
    assert sizes["bfloat16", 3, 1000] == 3 * 1000 * 2 * 28 * 2
    # A byte for each of 24 numbers and a float32 scale for all of them, BF16 for the 4 that are positional.
    assert sizes["float8", 3, 1000] == 3 * 1000 * 2 * (24 + 4 + 4 * 2)


@pytest.mark.parametrize("attention", [SMALL_LATENT, SMALL_GROUPED], ids=["latent", "grouped"])
def test_predicted_equals_measured(attention):
    from workbench.analysis.probe import measured_cache_table

    arguments = {"batch_sizes": [1, 2], "precisions": ["float32", "bfloat16"]}
    measured = measured_cache_table(model(attention), [7, 33], **arguments)
    predicted = cache_table(model(attention), [7, 33], **arguments)
    assert set(measured["provenance"]) == {"measured"}
    columns = [name for name in predicted.columns if name != "provenance"]
    assert measured[columns].equals(predicted[columns])


def test_a_kind_can_really_run():
    import torch

    from workbench.model.decoder import Decoder

    tokens = torch.arange(12).view(2, 6)
    for config in variants(model(SMALL_GROUPED)).values():
        assert Decoder(config)(tokens).logits.shape == (2, 6, 16)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: cache_table(model(SMALL_LATENT), [0]), "context=0 must be at least 1"),
        (lambda: cache_table(model(SMALL_LATENT), [1], batch_sizes=[2, 0]), "batch_size=0 must be at least 1"),
        (lambda: cache_table(model(SMALL_LATENT), [1], num_key_value_heads=3), "num_key_value_heads=3 must divide"),
        (lambda: cache_table(model(SMALL_LATENT), [1], num_key_value_heads=0), "num_key_value_heads=0"),
        (lambda: cache_table(model(SMALL_LATENT), [1], num_attention_heads=0), "num_attention_heads=0"),
        (lambda: cache_table(model(SMALL_LATENT), [1], kv_lora_rank=-1), "kv_lora_rank=-1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, line):
    with pytest.raises(ValueError, match=line) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_float8_cannot_be_measured():
    from workbench.analysis.probe import measured_cache_table

    with pytest.raises(ValueError, match="precision='float8' must be one of float32, bfloat16, float16"):
        measured_cache_table(model(SMALL_LATENT), [1], precisions=["float8"])
