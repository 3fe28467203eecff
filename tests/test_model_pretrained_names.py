"""Names, shapes and configurations of every published type, against the files that `transformers` reads and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import (
    BIASED,
    BUILT,
    DENSE,
    LATENT,
    SOFTMAX,
    TYPES,
    YARN,
    alike,
    grouped,
    reference,
    sliding,
    with_attention,
    with_experts,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from workbench.model.config import ClampedActivation, HyperConnections, LayerConfig, ModelConfig, Rope
from workbench.model.hf_folder.fill import plan
from workbench.model.hf_folder.names import written
from workbench.model.hf_folder.safetensors_folder import tensors_in
from workbench.model.to_hf import fitting_type, to_hf


def peer_of(config: ModelConfig, folder: Path) -> Any:
    """The reference with weights of its own, built from nothing but the configuration that we write."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    torch.manual_seed(3)
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for tensor in peer.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
        else:
            tensor.random_(0, 5)
    return peer


def our_state(theirs: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The reference's tensors as a decoder of ours holds them, said without the code under test."""
    ours = {}
    for name, tensor in theirs.items():
        key = name.removeprefix("model.")
        if model_type == "gpt_oss":
            key = key.replace("mlp.router.", "mlp.gate.")
            if key.endswith("gate_up_proj"):
                tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1).mT.contiguous()
            if key.endswith("gate_up_proj_bias"):
                tensor = torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=-1)
            if key.endswith("down_proj"):
                tensor = tensor.mT.contiguous()
        ours[key] = tensor
    return ours


@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_finds_every_tensor_under_the_names_that_are_written(model_type: str, tmp_path: Path) -> None:
    config = TYPES[model_type]
    assert fitting_type(config) == model_type
    peer = peer_of(config, tmp_path / "saved")
    state = our_state(peer.state_dict(), model_type)
    places = written(state, model_type, num_hidden_layers=len(config.layers))
    tensors = {name: place.view(state[place.key]).reshape(place.shape).contiguous() for name, place in places.items()}
    save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    read = reference(tmp_path / "saved").state_dict()
    for name, tensor in peer.state_dict().items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("model_type", TYPES)
def test_every_tensor_that_transformers_writes_is_found(model_type: str, tmp_path: Path) -> None:
    config = TYPES[model_type]
    peer = peer_of(config, tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    state = our_state(peer.state_dict(), model_type)
    empty = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    reading = plan(
        tensors_in(tmp_path / "theirs"),
        {key: tensor.to("meta") for key, tensor in state.items()},
        model_type=model_type,
        quantization=None,
        num_hidden_layers=len(config.layers),
        num_mtp_layers=0,
        may_stay_empty=set(),
        skip_further_mtp=False,
        tied=False,
    )
    for piece in reading.pieces(empty, reading.places):
        piece.part.copy_(piece.values)
    for key, tensor in state.items():
        assert torch.equal(empty[key], tensor), key


@pytest.mark.parametrize("config", (*TYPES.values(), *BUILT.values()), ids=(*TYPES, *(f"built {n}" for n in BUILT)))
def test_what_is_written_is_read_as_the_same_configuration(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(to_hf(config)) == config


@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_understands_every_field(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields := to_hf(TYPES[model_type])))
    theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
    renamed = {"num_experts": "num_local_experts"} if model_type == "qwen3_moe" else {}
    elsewhere = {"rope_theta", "rope_scaling", "compress_ratios", "num_hash_layers", "partial_rotary_factor"}
    for name in fields.keys() - elsewhere:
        assert theirs[renamed.get(name, name)] == fields[name], name
    if model_type == "deepseek_v4":
        assert theirs["rope_parameters"]["main"]["rope_theta"] == fields["rope_theta"]
        rope = theirs["rope_parameters"]["compress"] | {"rope_theta": theirs["compress_rope_theta"]}
        assert rope["rope_theta"] == fields["compress_rope_theta"]
    else:
        rope = theirs["rope_parameters"]
        assert rope["rope_theta"] == fields["rope_theta"]
    for name, value in (fields["rope_scaling"] or {"rope_type": "default"}).items():
        assert rope[name] == value, name
    if model_type == "glm4_moe":
        assert rope["partial_rotary_factor"] == fields["partial_rotary_factor"]


V3, GLM, MIXTRAL = BUILT["deepseek_v3"], TYPES["glm4_moe"], TYPES["mixtral"]
STRETCHED = Rope(rope_interleave=True, scaling=YARN)
V4, GPT_OSS = TYPES["deepseek_v4"], TYPES["gpt_oss"]


MISFITS: dict[str, tuple[ModelConfig, str | None, str]] = {
    "streams": (replace(V3, hyper_connections=HyperConnections(hc_mult=2)), None, "hyper_connections=None only"),
    "no streams": (replace(V4, hyper_connections=None), None, "deepseek_v4 has hyper-connections"),
    "prediction layers": (replace(MIXTRAL, mtp_layers=MIXTRAL.layers[:1]), None, "mixtral has no prediction layers"),
    "dense prediction layer": (replace(V3, mtp_layers=V3.layers[:1]), None, "like the last layer only"),
    "two attentions": (
        replace(V3, layers=(*V3.layers, LayerConfig(replace(LATENT, v_head_dim=7), BIASED))),
        None,
        "deepseek_v3 has the same attention in every layer; this configuration has 2",
    ),
    "two kinds": (replace(V3, layers=(*V3.layers, GLM.layers[-1])), None, "same attention in every layer"),
    "two mixtures": (
        replace(V3, layers=(*V3.layers, LayerConfig(LATENT, replace(BIASED, num_experts_per_tok=2)))),
        None,
        "deepseek_v3 has one mixture of experts for all layers; this configuration has 2",
    ),
    "dense last": (replace(V3, layers=V3.layers[::-1]), None, "deepseek_v3 has its dense layers first"),
    "two dense widths": (
        replace(V3, layers=(LayerConfig(LATENT, replace(DENSE, intermediate_size=5)), *V3.layers)),
        None,
        r"deepseek_v3 has one intermediate_size; this configuration has \[5, 37\]",
    ),
    "no experts": (alike(LATENT, DENSE), None, "one mixture of experts for all layers; this configuration has 0"),
    "dense Mixtral layer": (alike(grouped(), DENSE, SOFTMAX), None, "mixtral has experts in every layer"),
    "softmax with V3": (with_experts(V3, scoring_func="softmax"), "deepseek_v3", "scoring_func='sigmoid' only"),
    "V2 normalised": (with_experts(BUILT["deepseek_v2"], norm_topk_prob=True), None, "norm_topk_prob=False only"),
    "V2 of V3's choice": (
        with_experts(BUILT["deepseek_v2"], topk_method="noaux_tc"),
        None,
        "topk_method greedy or group_",
    ),
    "V2 half layout": (with_attention(BUILT["deepseek_v2"], rope=Rope()), None, "rope_interleave=True only"),
    "GLM interleaved": (with_attention(GLM, rope=Rope(rope_interleave=True)), None, "rope_interleave=False only"),
    "GLM with an output bias": (with_attention(GLM, o_bias=True), None, "glm4_moe has o_bias=False only"),
    "Mixtral unnormalised": (with_experts(MIXTRAL, norm_topk_prob=False), None, "norm_topk_prob=True only"),
    "Mixtral with biases": (with_attention(MIXTRAL, qkv_bias=True), None, "mixtral has qkv_bias=False only"),
    "clamped V3": (
        with_experts(V3, activation=ClampedActivation(limit=3.0)),
        None,
        "deepseek_v3 has activation=None only",
    ),
    "gpt-oss of two windows": (
        replace(GPT_OSS, layers=(*GPT_OSS.layers, replace(GPT_OSS.layers[0], attention=grouped(sliding_window=3)))),
        None,
        r"gpt_oss has one sliding_window; this configuration has \[3, 7\]",
    ),
    "Qwen2 of two windows": (
        sliding(grouped(qkv_bias=True), DENSE, 4, None, 9),
        None,
        r"qwen2 has one sliding_window; this configuration has \[4, 9\]",
    ),
    "gpt-oss without offset": (with_experts(GPT_OSS, activation=ClampedActivation(limit=3.0)), None, "offset=1.0"),
    "Llama of partial heads": (
        alike(grouped(), DENSE, hidden_size=50),
        None,
        "hidden_size a multiple of num_attention_heads; 50 is none of 4",
    ),
    "wide OLMoE heads": (with_attention(TYPES["olmoe"], head_dim=14), None, "olmoe has head_dim=12 only"),
    "V4 predicting further": (replace(V4, mtp_layers=V4.layers[-1:]), None, "mtp_layers must be"),
    "V4 hashed late": (replace(V4, layers=V4.layers[::-1]), None, "deepseek_v4 has topk_method='hash' only"),
    "V4 unnormalised": (with_experts(V4, norm_topk_prob=False), None, "deepseek_v4 has norm_topk_prob=True only"),
    "V4 of another factor": (
        replace(V4, layers=(V4.layers[0], *with_attention(V4, rope=STRETCHED).layers[1:])),
        None,
        "deepseek_v4 has attention_factor=1.0 only; this configuration has None",
    ),
    "V4 stretched window": (
        with_attention(V4, rope=STRETCHED),
        None,
        "deepseek_v4 has scaling=None only",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_a_type_cannot_say_is_refused(name: str) -> None:
    config, model_type, line = MISFITS[name]
    with pytest.raises(ValueError, match=line) as caught:
        to_hf(config, model_type=model_type)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen2, windowed above", "dots1, windowed below"])
def test_windows_of_some_layers_are_said_layer_by_layer(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields := to_hf(BUILT[name])))
    windows = [layer.attention.sliding_window for layer in BUILT[name].layers]  # pyright: ignore[reportAttributeAccessIssue]
    assert fields["layer_types"] == ["full_attention" if w is None else "sliding_attention" for w in windows]
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.layer_types == fields["layer_types"]
    assert theirs.sliding_window == fields["sliding_window"] == max(w for w in windows if w is not None)


# What decides how the model computes, beyond the names and sizes that the tests above see.
SAID: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mixtral": {"sliding_window": 9},
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True, "attention_bias": False, "use_sliding_window": False},
    "olmoe": {"norm_topk_prob": False, "attention_bias": False},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.6, "first_k_dense_replace": 1},
    "dots1": {"attention_bias": False, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "gpt_oss": {
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "swiglu_limit": 5.0,
        "swiglu_alpha": 1.5,
    },
    "deepseek_v32": {"index_n_heads": 13, "index_head_dim": 8, "index_topk": 3, "num_nextn_predict_layers": 0},
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_ratios": [0, 3, 5],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "index_topk": 2,
        "swiglu_limit": 9.0,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 7,
        "hc_eps": 1e-5,
        "compress_rope_theta": 160000.0,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("model_type", SAID)
def test_a_configuration_says_how_the_model_computes(model_type: str) -> None:
    fields = to_hf(TYPES[model_type])
    assert {name: fields[name] for name in SAID[model_type]} == SAID[model_type]
