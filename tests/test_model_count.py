"""Counts equal what `transformers` holds, to the last parameter, and what was published, to the tolerance it allows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from published_reference import hf_config

import workbench
from workbench.model.config import (
    CompressedAttention,
    DenseFeedForward,
    GroupedQueryAttention,
    HeavyCompression,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    SparseCompression,
    SparseLatentAttention,
)
from workbench.model.count import (
    attention_cache_bytes,
    cache_bytes,
    decode_flops_per_token,
    parameters,
    training_flops_per_token,
)
from workbench.model.published import config_names, data_folder, from_hf

MILLION = 2**20
SMALL = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_experts_per_tok": 2}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 14,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 2, "topk_group": 1}
V4 = {
    "num_hidden_layers": 5,
    "compress_ratios": [0, 4, 128, 128, 4],
    "compress_rate_hca": 6,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 14,
    "o_groups": 2,
    "o_lora_rank": 6,
    "index_n_heads": 3,
    "index_head_dim": 10,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_hash_layers": 2,
    "hc_mult": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "V2": {"model_type": "deepseek_v2", **LATENT},
    "V2, queries uncompressed": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None},
    "V3": {"model_type": "deepseek_v3", **LATENT, **GROUPS, "n_shared_experts": 1},
    "V3, no shared experts": {"model_type": "deepseek_v3", **LATENT, **GROUPS, "n_shared_experts": 0},
    "V3.2": {"model_type": "deepseek_v32", **LATENT, **GROUPS, "index_n_heads": 3, "index_head_dim": 12},
    "V4": {"model_type": "deepseek_v4", **V4},
    "Llama": {"model_type": "llama", **GROUPED},
    "Llama, biases, tied": {"model_type": "llama", **GROUPED, "attention_bias": True, "tie_word_embeddings": True},
    "Qwen2": {"model_type": "qwen2", **GROUPED},
    "Qwen3": {
        "model_type": "qwen3_moe",
        **GROUPED,
        "num_experts": 6,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "Qwen3, biases": {"model_type": "qwen3_moe", **GROUPED, "num_experts": 6, "attention_bias": True},
    "GLM": {"model_type": "glm4_moe", **GROUPED, "head_dim": 12, "n_routed_experts": 6, "attention_bias": True},
    "GLM, normed": {"model_type": "glm4_moe", **GROUPED, "head_dim": 12, "n_routed_experts": 6, "use_qk_norm": True},
    "dots": {
        "model_type": "dots1",
        **GROUPED,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "Mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 5, "sliding_window": 9},
    "OLMoE": {"model_type": "olmoe", **GROUPED, "head_dim": 6, "num_experts": 6},
    "gpt-oss": {"model_type": "gpt_oss", **GROUPED, "num_local_experts": 6},
    "gpt-oss, no biases": {"model_type": "gpt_oss", **GROUPED, "num_local_experts": 6, "attention_bias": False},
}


def held(plain: dict[str, Any]) -> int:
    """Parameters of the model that `transformers` builds; tied weights are one."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(plain))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_a_small_model_counts(name: str) -> None:
    plain = SMALL | CASES[name]
    if plain["model_type"] == "deepseek_v4":
        del plain["intermediate_size"]
    config = from_hf(plain)
    assert parameters(config).total == held(plain)
    idle = 0
    for layer in config.layers:
        if isinstance(e := layer.feed_forward, MixtureOfExperts):
            biases = e.expert_bias * (2 * e.moe_intermediate_size + config.hidden_size)
            one = 3 * config.hidden_size * e.moe_intermediate_size + biases
            idle += (e.n_routed_experts - e.num_experts_per_tok) * one
    count, embedding = parameters(config), config.vocab_size * config.hidden_size
    assert count.active == count.total - idle
    # Tied, the one matrix is the head too, which a token meets.
    assert count.active_without_embedding == count.active - (0 if config.tie_word_embeddings else embedding)
    assert count.active_without_embedding_and_head == count.active_without_embedding - embedding


@pytest.mark.parametrize("name", config_names())
def test_every_parameter_of_a_published_model_counts(name: str) -> None:
    plain = json.loads((data_folder() / "models" / f"{name}.json").read_text())
    assert parameters(workbench.config(name)).total == held(plain)


def selection_biases(config: ModelConfig, layers: tuple[LayerConfig, ...]) -> int:
    experts = (layer.feed_forward for layer in layers)
    return sum(e.n_routed_experts for e in experts if isinstance(e, MixtureOfExperts) and e.topk_method == "noaux_tc")


def shipped(config: ModelConfig) -> int:
    """What V3's checkpoint holds: selection biases, and an embedding and a head of its own for every MTP layer."""
    count = parameters(config)
    both = 2 * config.vocab_size * config.hidden_size * len(config.mtp_layers)
    return count.total + count.mtp + both + selection_biases(config, (*config.layers, *config.mtp_layers))


def mtp_active(config: ModelConfig) -> int:
    """What a token meets in the MTP layers, with embedding and head."""
    idle = 0
    for layer in config.mtp_layers:
        assert isinstance(layer.feed_forward, MixtureOfExperts)
        e = layer.feed_forward
        idle += (e.n_routed_experts - e.num_experts_per_tok) * 3 * config.hidden_size * e.moe_intermediate_size
    return parameters(config).mtp - idle + 2 * config.vocab_size * config.hidden_size


def decompressed(config: ModelConfig) -> int:
    """Cache bytes of a token in BF16 if every head's own keys and values were kept."""
    total = 0
    for layer in config.layers:
        a = layer.attention
        assert isinstance(a, LatentAttention)
        total += 2 * a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
    return total


def grouped_by_eight(config: ModelConfig) -> ModelConfig:
    """The same layers with 8 key/value heads of 128."""
    attention = GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    return replace(config, layers=tuple(replace(layer, attention=attention) for layer in config.layers))


def of(name: str) -> ModelConfig:
    return workbench.config(name)


def cache_of_v32(precision: Any) -> int:
    return cache_bytes(of("deepseek-v3.2"), MILLION, precision)


OURS: dict[str, Callable[[ModelConfig], float]] = {
    "total": lambda c: parameters(c).total,
    "total with MTP": lambda c: parameters(c).total + parameters(c).mtp,
    "total with MTP, no embedding and head": lambda c: (
        parameters(c).total + parameters(c).mtp - 2 * c.vocab_size * c.hidden_size
    ),
    "total with selection biases": lambda c: parameters(c).total + selection_biases(c, c.layers),
    "total with selection biases and MTP": lambda c: (
        parameters(c).total + parameters(c).mtp + selection_biases(c, (*c.layers, *c.mtp_layers))
    ),
    "checkpoint": shipped,
    "active": lambda c: parameters(c).active,
    "active without embedding": lambda c: parameters(c).active_without_embedding,
    "active without embedding and head": lambda c: parameters(c).active_without_embedding_and_head,
    "MTP": lambda c: parameters(c).mtp,
    "MTP active": mtp_active,
    "cache of one token": lambda c: cache_bytes(c, 1),
    "cache of one token, FP8": lambda c: cache_bytes(c, 1, "float8"),
    "cache growth per token": lambda c: cache_bytes(c, 5001) - cache_bytes(c, 5000),
    "cache of one token, decompressed": decompressed,
    "cache of one token over DeepSeek-V3's": lambda c: cache_bytes(c, 1) / cache_bytes(of("deepseek-v3"), 1),
    "cache of 1M tokens": lambda c: cache_bytes(c, MILLION),
    "cache of 1M tokens over V3.2's, FP8": lambda c: cache_bytes(c, MILLION, "float8_index4") / cache_of_v32("float8"),
    "cache of 1M tokens under V3.2's": lambda c: cache_of_v32("bfloat16") / cache_bytes(c, MILLION),
    "cache of 1M tokens over GQA8's, BF16": lambda c: (
        cache_bytes(c, MILLION, "float8_index4") / cache_bytes(grouped_by_eight(c), MILLION)
    ),
    "training FLOPs per token": lambda c: training_flops_per_token(c, 4096),
}
UNITS = {"": 1.0, "bytes": 1.0, "x": 1.0, "%": 0.01, "KB": 1e3, "GiB": 2.0**30, "B": 1e9, "T": 1e12, "GFLOPs": 1e9}
ROWS = list(csv.DictReader((data_folder() / "published.csv").read_text().splitlines()))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}: {row['quantity']} {row['value']}")
def test_published_numbers(row: dict[str, str]) -> None:
    """Ours lies within the tolerance, in the row's unit (0 is exact), or it is said to lie outside, and does."""
    ours = OURS[row["quantity"]](workbench.config(row["model"])) / UNITS[row["unit"]]
    apart = abs(ours - float(row["value"].replace(",", "")))
    assert row["source"] and row["convention"]
    if row["status"] == "not reproducible":
        assert apart > float(row["tolerance"])
    else:
        assert row["status"] in ("computed", "published")
        assert apart <= float(row["tolerance"]), f"ours is {ours}"


def test_the_known_misfits_are_listed() -> None:
    missed = {(row["model"], row["value"]) for row in ROWS if row["status"] == "not reproducible"}
    assert {("qwen2.5-72b", "394"), ("llama-3.1-405b", "2448")} <= missed


LATENT_A = LatentAttention(
    num_attention_heads=3, q_lora_rank=10, kv_lora_rank=130, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6
)
SPARSE_A = SparseLatentAttention(latent=LATENT_A, index_n_heads=2, index_head_dim=9, index_topk=6)
WINDOW_A = GroupedQueryAttention(num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=8)
V4_A = CompressedAttention(
    num_attention_heads=4, head_dim=10, qk_rope_head_dim=4, q_lora_rank=3, o_groups=2, o_lora_rank=3, sliding_window=8
)
HEAVY_A = replace(V4_A, compression=HeavyCompression(compress_ratio=5))
CSA_A = replace(V4_A, compression=SparseCompression(compress_ratio=3, index_n_heads=2, index_head_dim=7, index_topk=4))


@pytest.mark.parametrize(
    ("attention", "precision", "expected"),
    [
        # 8 of 20 tokens are left, each with 2 keys and 2 values of 6 numbers.
        (WINDOW_A, "bfloat16", 8 * 4 * 6 * 2),
        (WINDOW_A, "float8", 8 * 4 * (6 + 4)),  # one scale a vector
        # 130 numbers start a second block of 128; the 4 positional ones stay in BF16.
        (LATENT_A, "float32", 20 * 134 * 4),
        (LATENT_A, "float8", 20 * (130 + 2 * 4 + 4 * 2)),
        (SPARSE_A, "bfloat16", 20 * (134 + 9) * 2),
        (SPARSE_A, "float8", 20 * (130 + 8 + 8 + 9 + 4)),
        (SPARSE_A, "float8_index4", 20 * (130 + 8 + 8 + 5)),
        (V4_A, "bfloat16", 8 * 10 * 2),
        (HEAVY_A, "bfloat16", (8 + 4) * 10 * 2),
        (HEAVY_A, "float8", (8 + 4) * (6 + 4 * 2)),
        (CSA_A, "bfloat16", (8 + 6) * 10 * 2 + 6 * 7 * 2),
        (CSA_A, "float8", (8 + 6) * 14 + 6 * 7),
        (CSA_A, "float8_index4", (8 + 6) * 14 + 6 * 4),
    ],
)
def test_cache_bytes_of_twenty_tokens_by_hand(attention: Any, precision: Any, expected: int) -> None:
    assert attention_cache_bytes(attention, 20, precision) == expected
    assert attention_cache_bytes(attention, 0, precision) == 0
    config = ModelConfig(
        vocab_size=5, hidden_size=8, layers=(LayerConfig(attention, DenseFeedForward(intermediate_size=5)),) * 3
    )
    assert cache_bytes(config, 20, precision) == 3 * expected
    with pytest.raises(ValueError, match="context=-1 must be 0 or more"):
        cache_bytes(config, -1)


@pytest.mark.parametrize(
    ("attention", "decoding", "keys"),
    [
        # The new token sees 20; a window shows 8 of them. Training shows half of 20, or 8 less its ramp's half.
        (replace(WINDOW_A, sliding_window=None), 20 * 4 * 12, lambda mean: 48 * mean(20)),
        (WINDOW_A, 8 * 4 * 12, lambda mean: 48 * mean(20, 8)),
        # Absorbed: 130 + 4 for the score and 130 for the mix, of 6 tokens; the indexer's 2 heads look at all 20.
        (SPARSE_A, 6 * 3 * 264 + 20 * 18, lambda mean: 3 * 15 * mean(20, 6) + 18 * mean(20)),
        (V4_A, 8 * 4 * 20, lambda mean: 80 * mean(20, 8)),
        (HEAVY_A, (8 + 4) * 80, lambda mean: 80 * (mean(20, 8) + mean(20 / 5))),
        (CSA_A, (8 + 4) * 80 + 6 * 14, lambda mean: 80 * (mean(20, 8) + mean(20 / 3, 4)) + 14 * mean(20 / 3)),
    ],
)
def test_flops_at_twenty_tokens_by_hand(attention: Any, decoding: int, keys: Callable[..., float]) -> None:
    def mean(count: float, most: float = float("inf")) -> float:
        """The integral of min(t, most) from 0 to `count`, over `count`."""
        return count / 2 if most >= count else (most * most / 2 + most * (count - most)) / count

    config = ModelConfig(
        vocab_size=5, hidden_size=8, layers=(LayerConfig(attention, DenseFeedForward(intermediate_size=5)),)
    )
    active = parameters(config).active_without_embedding
    assert decode_flops_per_token(config, 20) == 2 * active + 2 * decoding
    assert training_flops_per_token(config, 20) == pytest.approx(6 * active + 6 * keys(mean), rel=1e-12)


def test_sparse_attention_stops_growing_but_for_its_indexer() -> None:
    v3, v32 = of("deepseek-v3"), of("deepseek-v3.2")
    grown = decode_flops_per_token(v32, 100_001) - decode_flops_per_token(v32, 100_000)
    assert grown == 61 * 2 * 64 * 128
    assert decode_flops_per_token(v3, 100_001) - decode_flops_per_token(v3, 100_000) == 61 * 2 * 128 * (2 * 512 + 64)
