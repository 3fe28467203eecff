"""Published configurations: read as the classes of `transformers` read them, or refused in one line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from published_reference import READINGS, hf_config

import workbench
from workbench.model.config import CompressedAttention, GroupedQueryAttention, MixtureOfExperts, ModelConfig
from workbench.model.published import MODEL_TYPES, config_names, data_folder, from_hf

# Fields without which a file of this type means nothing: the reference class has no default for them.
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 4},
    "glm4_moe": {"head_dim": 128},  # its default is odd
    "dots1": {"n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 4},
}

ONE_OF = st.sampled_from
EVERYWHERE = {
    "vocab_size": ONE_OF([11, 1000]),
    "num_hidden_layers": ONE_OF([3, 5]),
    "max_position_embeddings": ONE_OF([64, 8192]),
    "rms_norm_eps": ONE_OF([1e-5, 1e-3]),
    "initializer_range": ONE_OF([0.01, 0.5]),
    "tie_word_embeddings": st.booleans(),
    "rope_theta": ONE_OF([500, 5e5]),
    "torch_dtype": st.just("bfloat16"),
    "use_cache": st.booleans(),
    "hidden_size": ONE_OF([1024, 2048]),
    "intermediate_size": ONE_OF([20, 40]),
    "num_experts_per_tok": ONE_OF([1, 3]),
}
HEADS = {"num_attention_heads": ONE_OF([8, 16]), "num_key_value_heads": ONE_OF([2, 4])}
GROUPED = {"head_dim": ONE_OF([6, 16])}
LATENT = {
    "q_lora_rank": ONE_OF([None, 12]),
    "kv_lora_rank": st.just(24),
    "qk_nope_head_dim": st.just(10),
    "qk_rope_head_dim": ONE_OF([4, 8]),
    "v_head_dim": st.just(14),
    "moe_intermediate_size": ONE_OF([18, 26]),
    "n_shared_experts": ONE_OF([0, 1, 2]),
    "routed_scaling_factor": ONE_OF([1.0, 2.5]),
    "first_k_dense_replace": ONE_OF([0, 2, 9]),
    "norm_topk_prob": st.booleans(),
}
GROUPS = {
    "n_routed_experts": ONE_OF([16, 32]),
    "n_group": ONE_OF([4, 8]),
    "topk_group": ONE_OF([2, 4]),
    "num_experts_per_tok": ONE_OF([1, 3]),
}
# Fields that only make sense together.
WINDOWS = {"num_hidden_layers": st.just(2), "layer_types": st.just(["full_attention", "sliding_attention"])}
RATIOS = {"num_hidden_layers": ONE_OF([5, 6]), "compress_ratios": ONE_OF([[0, 4, 128, 4, 0, 4, 4], [128] * 8])}
TOGETHER: dict[str, tuple[dict[str, st.SearchStrategy], ...]] = {
    "deepseek_v2": ({"topk_method": st.just("group_limited_greedy"), **GROUPS},),
    "deepseek_v3": (GROUPS,),
    "deepseek_v32": (GROUPS, {"num_hidden_layers": st.just(2), "mlp_layer_types": st.just(["sparse", "dense"])}),
    "deepseek_v4": (
        RATIOS,
        {"moe_intermediate_size": st.just(26), "intermediate_size": st.just(26)},
        {
            "num_hidden_layers": st.just(2),
            "layer_types": st.just(["heavily_compressed_attention", "sliding_attention"]),
            "mlp_layer_types": st.just(["moe", "hash_moe"]),
        },
    ),
    "glm4_moe": (GROUPS, {**HEADS, "head_dim": ONE_OF([8, 16])}),
    "dots1": (
        HEADS,
        GROUPS,
        {"num_hidden_layers": st.just(2), "layer_types": st.just(["full_attention", "sliding_attention"])},
    ),
    **dict.fromkeys(("llama", "qwen2", "qwen3_moe", "mixtral", "olmoe"), (HEADS,)),
    "gpt_oss": (
        HEADS,
        {"num_hidden_layers": st.just(2), "layer_types": st.just(["full_attention", "sliding_attention"])},
    ),
}
FURTHER: dict[str, dict[str, st.SearchStrategy]] = {
    "deepseek_v2": {
        **LATENT,
        "n_routed_experts": ONE_OF([16, 32]),
        "topk_method": ONE_OF(["greedy", None]),
        "n_group": ONE_OF([1, None]),
    },
    "deepseek_v3": {
        **LATENT,
        "rope_interleave": st.booleans(),
        "norm_topk_prob": st.booleans() | st.none(),
    },
    "deepseek_v32": {
        **LATENT,
        "q_lora_rank": ONE_OF([12, 20]),
        "index_n_heads": ONE_OF([2, 3]),
        "index_head_dim": ONE_OF([64, 96]),
        "index_topk": ONE_OF([5, 6]),
        "num_nextn_predict_layers": ONE_OF([0, 1]),
    },
    "deepseek_v4": {
        "head_dim": ONE_OF([64, 128]),
        "qk_rope_head_dim": ONE_OF([8, 16]),
        "q_lora_rank": ONE_OF([12, 20]),
        "o_groups": ONE_OF([2, 4]),
        "o_lora_rank": ONE_OF([6, 10]),
        "sliding_window": ONE_OF([4, 7]),
        "compress_rate_csa": ONE_OF([2, 3]),
        "compress_rates": st.just({"compressed_sparse_attention": 5, "heavily_compressed_attention": 9}),
        "compress_rope_theta": ONE_OF([900, 9e4]),
        "index_n_heads": ONE_OF([2, 3]),
        "index_head_dim": ONE_OF([64, 96]),
        "index_topk": ONE_OF([5, 6]),
        "n_routed_experts": ONE_OF([16, 32]),
        "routed_scaling_factor": ONE_OF([1.0, 3.5]),
        "scoring_func": ONE_OF(["sigmoid", "sqrtsoftplus"]),
        "num_hash_layers": ONE_OF([0, 1]),
        "swiglu_limit": ONE_OF([5.0, 9.0]),
        "hc_mult": ONE_OF([2, 3]),
        "hc_sinkhorn_iters": ONE_OF([3, 4]),
        "hc_eps": ONE_OF([1e-5, 1e-4]),
        "num_nextn_predict_layers": ONE_OF([0, 1]),
        "norm_topk_prob": st.booleans(),
    },
    "llama": {**GROUPED, "attention_bias": st.booleans(), "num_key_value_heads": ONE_OF([16, None])},
    "qwen2": {
        **GROUPED,
        "use_sliding_window": st.booleans(),
        "sliding_window": ONE_OF([7, 9]),
        "max_window_layers": ONE_OF([0, 2]),
        "attention_bias": st.booleans(),
    },
    "qwen3_moe": {
        **GROUPED,
        "attention_bias": st.booleans(),
        "use_sliding_window": st.booleans(),
        "sliding_window": ONE_OF([7, None]),
        "num_experts": ONE_OF([16, 32]),
        "moe_intermediate_size": ONE_OF([18, 26]),
        "norm_topk_prob": st.booleans(),
        "decoder_sparse_step": ONE_OF([1, 2]),
        "mlp_only_layers": ONE_OF([None, [], [1]]),
    },
    "glm4_moe": {
        **GROUPED,
        **{name: LATENT[name] for name in ("moe_intermediate_size", "n_shared_experts", "first_k_dense_replace")},
        "head_dim": ONE_OF([16, 32]),
        "attention_bias": st.booleans(),
        "use_qk_norm": st.booleans(),
        "partial_rotary_factor": ONE_OF([0.25, 1.0]),
        "norm_topk_prob": st.booleans(),
        "routed_scaling_factor": ONE_OF([1.5, 2.5]),
    },
    "dots1": {
        **GROUPED,
        **{name: LATENT[name] for name in ("moe_intermediate_size", "n_shared_experts", "first_k_dense_replace")},
        "attention_bias": st.booleans(),
        "sliding_window": ONE_OF([7, None]),
        "max_window_layers": ONE_OF([0, 2]),
        "norm_topk_prob": st.booleans() | st.none(),
        "n_group": ONE_OF([1, None]),
        "topk_group": ONE_OF([1, None]),
        "routed_scaling_factor": ONE_OF([1.5, 2.5]),
    },
    "mixtral": {**GROUPED, "sliding_window": ONE_OF([None, 9]), "num_local_experts": ONE_OF([4, 16])},
    "olmoe": {
        "num_key_value_heads": ONE_OF([None, 16]),
        "num_experts": ONE_OF([8, 16]),
        "norm_topk_prob": st.booleans(),
        "attention_bias": st.booleans(),
        "clip_qkv": st.none(),
    },
    "gpt_oss": {
        **GROUPED,
        "sliding_window": ONE_OF([7, 9]),
        "num_local_experts": ONE_OF([8, 16]),
        "attention_bias": st.booleans(),
        "swiglu_alpha": st.just(1.5),
        "swiglu_limit": st.just(5.0),
        "layer_types": st.just(None),
    },
}
YARN = {
    "factor": ONE_OF([4, 8.0]),
    "original_max_position_embeddings": ONE_OF([32, 16]),
    "beta_fast": ONE_OF([16, None]),
    "beta_slow": ONE_OF([0.5, None]),
    "mscale": ONE_OF([0.0, 0.7]),
    "mscale_all_dim": ONE_OF([0.0, 1.3]),
    "attention_factor": ONE_OF([None, 1.25]),
    "truncate": st.booleans(),
}
LLAMA3 = {
    "factor": ONE_OF([8.0]),
    "low_freq_factor": st.just(1.0),
    "high_freq_factor": st.just(4.0),
    "original_max_position_embeddings": st.just(32),
}
KIND = ONE_OF(["rope_type", "type"])


def with_kind(kind: str, fields: dict[str, st.SearchStrategy], needed: tuple[str, ...]) -> st.SearchStrategy[dict]:
    required = {name: fields[name] for name in needed}
    optional = {name: strategy for name, strategy in fields.items() if name not in needed}
    return st.builds(lambda name, said: {name: kind, **said}, KIND, st.fixed_dictionaries(required, optional=optional))


SCALINGS = st.one_of(
    st.none(),
    with_kind("yarn", YARN, ("factor",)),
    with_kind("llama3", LLAMA3, tuple(LLAMA3)),
)
POSITIONS = st.one_of(
    st.just({}),
    st.builds(lambda scaling: {"rope_scaling": scaling}, SCALINGS),
    st.builds(
        lambda scaling, theta: {"rope_parameters": {**(scaling or {"rope_type": "default"}), **theta}},
        SCALINGS,
        st.fixed_dictionaries({}, optional={"rope_theta": ONE_OF([300.0, 4e4])}),
    ),
)


@pytest.mark.parametrize("kind", READINGS)
@settings(max_examples=25, deadline=None, phases=[Phase.reuse, Phase.generate, Phase.shrink])
@given(st.data())
def test_reads_what_the_reference_class_reads(kind: str, data: st.DataObject) -> None:
    """Any subset of the fields; the rest are the class's own defaults, odd sizes and all."""
    plain = {"model_type": kind, **NEEDED.get(kind, {})}
    plain |= data.draw(st.fixed_dictionaries({}, optional=EVERYWHERE | FURTHER[kind]))
    plain |= data.draw(POSITIONS)
    for together in TOGETHER.get(kind, ()):
        plain |= data.draw(st.just({}) | st.fixed_dictionaries(together))
    if kind in ("deepseek_v3", "glm4_moe"):
        plain[data.draw(ONE_OF(["num_mtp_layers", "num_nextn_predict_layers"]))] = data.draw(ONE_OF([0, 1, 3]))
    reference = hf_config(copy.deepcopy(plain))
    assert from_hf(plain) == READINGS[kind](reference)


@pytest.mark.parametrize("kind", READINGS)
def test_an_empty_file_is_the_class_with_its_defaults(kind: str) -> None:
    plain = {"model_type": kind, **NEEDED.get(kind, {})}
    if kind in ("deepseek_v3", "glm4_moe"):
        plain["num_nextn_predict_layers"] = 1
    assert from_hf(plain) == READINGS[kind](hf_config(plain))


def test_prediction_depths_that_a_file_does_not_state_are_none() -> None:
    for kind in ("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe"):
        assert from_hf({"model_type": kind, "head_dim": 128}).mtp_layers == ()
        assert len(from_hf({"model_type": kind, "head_dim": 128, "num_nextn_predict_layers": 2}).mtp_layers) == 2
    assert from_hf({"model_type": "deepseek_v4", "num_nextn_predict_layers": 1}).mtp_layers == ()


def test_what_the_reference_ignores_is_ignored() -> None:
    v2 = {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "norm_topk_prob": True}
    experts = from_hf(v2).layers[0].feed_forward
    assert isinstance(experts, MixtureOfExperts) and not experts.norm_topk_prob
    grouped = from_hf(v2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2})
    experts = grouped.layers[0].feed_forward
    assert isinstance(experts, MixtureOfExperts)
    assert (experts.topk_method, experts.n_group, experts.topk_group) == ("group_limited_greedy", 4, 2)
    assert from_hf(v2 | {"quantization_config": {}, "auto_map": {}, "a_key_of_tomorrow": 3}) == from_hf(v2)


def test_saved_configurations_come_back() -> None:
    """What `transformers` writes after reading: the new style of rope, for V4 one mapping for each kind of layer."""
    for name in (
        "deepseek-v2",
        "deepseek-v3",
        "deepseek-v3.2",
        "deepseek-v4-pro",
        "gpt-oss-20b",
        "glm-4.5",
        "dots.llm1",
    ):
        plain = json.loads((data_folder() / "models" / f"{name}.json").read_text())
        saved = json.loads(hf_config(plain).to_json_string(use_diff=False))
        read = workbench.config(name)
        assert replace(from_hf(saved), mtp_layers=read.mtp_layers) == read, name


YARN_FIELDS = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "lacks the field 'model_type'; supported: deepseek_v2, .*gpt_oss.*qwen2"),
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; supported: deepseek_v2, .*deepseek_v4"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
        ({"model_type": "deepseek_v2"}, "of model_type 'deepseek_v2' lacks the field 'num_experts_per_tok'"),
        (
            {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"},
            "lacks the field 'n_group'",
        ),
        ({"model_type": "dots1"}, "lacks the field 'n_routed_experts'"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size='4096' must be a whole number"),
        ({"model_type": "llama", "hidden_size": None}, "hidden_size=None must be a whole number"),
        ({"model_type": "llama", "rms_norm_eps": True}, "rms_norm_eps=True must be a number"),
        ({"model_type": "llama", "tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu' is not supported .* it must be 'silu'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True is not supported .* it must be False"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads=5 must divide num_attention_heads=32"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads=0 must be above 0"),
        ({"model_type": "deepseek_v3", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "scoring_func='softmax' .* must be 'sigmoid'"),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, "topk_method='greedy' .* must be 'noaux_tc'"),
        ({"model_type": "deepseek_v3", "moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 8}, "num_key_value_heads=8 .* must be 128"),
        ({"model_type": "deepseek_v32", "q_lora_rank": None}, "q_lora_rank=None: the indexer reads"),
        ({"model_type": "deepseek_v32", "mlp_layer_types": ["dense"]}, "mlp_layer_types has 1 entries"),
        ({"model_type": "deepseek_v4", "compress_ratios": [16] * 43}, r"compress_ratios has \[16\]; .* 0, 4, 128"),
        ({"model_type": "deepseek_v4", "compress_ratios": [4]}, "compress_ratios has 1 entries"),
        ({"model_type": "deepseek_v4", "n_shared_experts": 2}, "n_shared_experts=2 is not supported"),
        (
            {"model_type": "deepseek_v4", "moe_intermediate_size": 3, "intermediate_size": 4},
            "intermediate_size=4 is not supported .* it must be 3",
        ),
        ({"model_type": "deepseek_v4", "scoring_func": "relu"}, "scoring_func='relu' is not supported"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0 is not supported .* it must be None"),
        ({"model_type": "olmoe", "head_dim": 4}, "num_attention_heads x head_dim = 64 must be hidden_size=2048"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        (
            {"model_type": "gpt_oss", "layer_types": ["linear"] * 36},
            r"layer_types has \['linear'\]; .* sliding_attention",
        ),
        ({"model_type": "gpt_oss", "sliding_window": None}, "layer_types has sliding_attention, but there is no"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type='linear' is not supported",
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, "rope parameters of .* lacks the field 'factor'"),
        ({"model_type": "llama", "rope_scaling": "yarn"}, "rope_scaling='yarn' must be a mapping"),
        ({"model_type": "llama", "rope_scaling": YARN_FIELDS | {"factor": 0.5}}, "factor=0.5 must be at least 1"),
        ({"model_type": "llama", "rope_parameters": {"full_attention": YARN_FIELDS}}, "differ by layer"),
    ],
)
def test_what_cannot_be_read_gets_one_line(plain: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf(plain)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for source, message in (
        (tmp_path / "none.json", "none.json: cannot be read \\(No such file"),
        (tmp_path, "config.json: cannot be read"),
        (str(tmp_path / "broken.json"), "broken.json: not JSON"),
        (tmp_path / "list.json", "list.json: must hold a mapping, not list"),
        (tmp_path / "bytes.json", "bytes.json: not JSON"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            ModelConfig.from_hf(source)
        assert "\n" not in str(caught.value)


def test_a_file_a_folder_and_a_mapping_are_read_alike(tmp_path: Path) -> None:
    plain = {"model_type": "llama", "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert from_hf(plain) == from_hf(tmp_path) == from_hf(str(tmp_path / "config.json"))


def test_published_configurations_open_by_name() -> None:
    names = config_names()
    assert len(names) == 22
    for name in names:
        plain = json.loads((data_folder() / "models" / f"{name}.json").read_text())
        assert plain["_source"], name
        read = workbench.config(name)
        kind = "deepseek_v3" if plain["model_type"] == "kimi_k2" else plain["model_type"]
        assert read == READINGS[kind](hf_config(plain)), name
        assert ModelConfig.from_json(read.to_json()) == read
    with pytest.raises(ValueError, match=r"no published configuration 'deepseek'; there are: deepseek-v2, .*qwen3-30b"):
        workbench.config("deepseek")


def test_every_type_is_published_or_a_twin() -> None:
    files = [json.loads(path.read_text()) for path in (data_folder() / "models").glob("*.json")]
    assert {plain["model_type"] for plain in files} == set(MODEL_TYPES)


def test_layer_patterns_of_the_reference() -> None:
    """What the tables say about layers, read off the result."""

    def compressions(name: str) -> list[str]:
        kinds = []
        for layer in workbench.config(name).layers:
            assert isinstance(layer.attention, CompressedAttention)
            kinds.append(type(layer.attention.compression).__name__)
        return kinds

    flash, pro = compressions("deepseek-v4-flash"), compressions("deepseek-v4-pro")
    assert flash[:4] == ["NoneType", "NoneType", "SparseCompression", "HeavyCompression"]
    assert (flash.count("SparseCompression"), flash.count("HeavyCompression")) == (21, 20)
    assert pro[:4] == ["HeavyCompression", "HeavyCompression", "SparseCompression", "HeavyCompression"]
    assert (pro.count("SparseCompression"), pro.count("HeavyCompression")) == (30, 31)
    windows = []
    for layer in workbench.config("gpt-oss-20b").layers:
        assert isinstance(layer.attention, GroupedQueryAttention)
        windows.append(layer.attention.sliding_window)
    assert windows == [128, None] * 12
