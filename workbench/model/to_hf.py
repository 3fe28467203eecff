"""Our configurations as published ones: the content of config.json for `transformers` and its kind.

Each writer is one published type: what it holds fixed, and the fields for what it leaves free. A configuration with
anything else is refused, so that what was written means what was given.
"""

from __future__ import annotations

from collections.abc import Callable

from workbench.model.attention_config import (
    CompressedAttention,
    GroupedQueryAttention,
    LatentAttention,
    SparseLatentAttention,
)
from workbench.model.config import ModelConfig
from workbench.model.feed_forward_config import MixtureOfExperts
from workbench.model.hf_write.deepseek import deepseek_v2, deepseek_v3, deepseek_v32
from workbench.model.hf_write.deepseek_v4 import deepseek_v4
from workbench.model.hf_write.neighbours import dots1, glm4_moe, gpt_oss, llama, mixtral, olmoe, qwen2, qwen3_moe
from workbench.model.hf_write.parts import Fields
from workbench.model.require import require


def to_hf(config: ModelConfig, *, model_type: str | None = None) -> Fields:
    """The content of a config.json that means `config`, of the type that fits it or of `model_type`.

    Special tokens are no part of our configurations; they are written as none.

    Raises:
        ValueError: the type cannot express the configuration; the line says what it holds instead.
    """
    model_type = fitting_type(config) if model_type is None else model_type
    known = ", ".join(WRITERS)
    require(model_type in WRITERS, f"model_type={model_type!r} must be one of {known}")
    architecture, write = WRITERS[model_type]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **write(config),
    }


def fitting_type(config: ModelConfig) -> str:
    """The published type that a configuration looks like; whether it fits, its writer says."""
    attention = config.layers[0].attention
    experts = next((x.feed_forward for x in config.layers if isinstance(x.feed_forward, MixtureOfExperts)), None)
    match attention, experts:
        case CompressedAttention(), _:
            return "deepseek_v4"
        case SparseLatentAttention(), _:
            return "deepseek_v32"
        case LatentAttention(), MixtureOfExperts(scoring_func="softmax"):
            return "deepseek_v2"
        case LatentAttention(), _:
            return "deepseek_v3"
        case GroupedQueryAttention(qkv_bias=True, o_bias=False), None:
            return "qwen2"
        case GroupedQueryAttention(), None:
            return "llama"
        case GroupedQueryAttention(sinks=True), _:
            return "gpt_oss"
        case GroupedQueryAttention(qk_norm="full"), _:
            return "olmoe"
        case GroupedQueryAttention(qk_norm="head", partial_rotary_factor=1.0), MixtureOfExperts(scoring_func="sigmoid"):
            return "dots1"
        case GroupedQueryAttention(), MixtureOfExperts(scoring_func="sigmoid"):
            return "glm4_moe"
        case GroupedQueryAttention(qk_norm="head"), _:
            return "qwen3_moe"
        case _:
            return "mixtral"


WRITERS: dict[str, tuple[str, Callable[[ModelConfig], Fields]]] = {
    "llama": ("LlamaForCausalLM", llama),
    "qwen2": ("Qwen2ForCausalLM", qwen2),
    "mixtral": ("MixtralForCausalLM", mixtral),
    "qwen3_moe": ("Qwen3MoeForCausalLM", qwen3_moe),
    "olmoe": ("OlmoeForCausalLM", olmoe),
    "gpt_oss": ("GptOssForCausalLM", gpt_oss),
    "glm4_moe": ("Glm4MoeForCausalLM", glm4_moe),
    "dots1": ("Dots1ForCausalLM", dots1),
    "deepseek_v2": ("DeepseekV2ForCausalLM", deepseek_v2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", deepseek_v3),
    "deepseek_v32": ("DeepseekV32ForCausalLM", deepseek_v32),
    "deepseek_v4": ("DeepseekV4ForCausalLM", deepseek_v4),
}
