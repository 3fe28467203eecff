"""The classes of `transformers` with our weights: in float32 as they are, and with their float32 casts lifted."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, modeling_rope_utils

from workbench.model.decoder import Decoder
from workbench.model.hf_folder.names import mtp_depth, written
from workbench.model.pretrained import idle_biases
from workbench.model.to_hf import to_hf


@cache
def rewritten(name: str, *, wide: bool, settle_ties: bool) -> Any:
    """The module `name` of `transformers` once more, its own text changed in two ways.

    `wide`: it says float64 wherever it says float32. It casts by name in norms, softmax, rotary angles, routers and
    index scores, inside long functions; rewriting those by hand would compare us with ourselves.

    `settle_ties`: of equal index scores, which a ReLU makes common, the lowest index is chosen. There the reference is
    at fault: the order that `torch.topk` leaves ties in follows neither index nor value and changes with the number of
    keys. (With two index heads, 3 to 7 keys of 33, V3.2's outputs for 32 tokens moved by up to 0.3 to 0.5 when a 33rd
    followed them.)
    """
    file = import_module(name).__file__
    assert file is not None
    text = Path(file).read_text(encoding="utf-8")
    if wide:
        text, replaced = re.subn(r"torch\.float(32)?\b", "torch.float64", text)
        text, doubled = re.subn(r"\.float\(\)", ".double()", text)
        assert replaced and doubled
    if settle_ties:
        settled = r"index_scores.sort(dim=-1, descending=True, stable=True).indices[..., :\1]"
        text, found = re.subn(r"index_scores\.topk\((\w+), dim=-1\)\.indices", settled, text)
        assert found
    twin = f"{name}_{wide}_{settle_ties}"
    spec = spec_from_file_location(twin, file)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[twin] = module
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def modeling(model_type: str, dtype: torch.dtype, *, settle_ties: bool = False) -> Any:
    """The module that defines a published type, in which nothing is computed in less than `dtype`."""
    name = f"transformers.models.{model_type}.modeling_{model_type}"
    settle_ties &= model_type in ("deepseek_v32", "deepseek_v4")
    wide = dtype == torch.float64
    return rewritten(name, wide=wide, settle_ties=settle_ties) if wide or settle_ties else import_module(name)


def rope_functions(dtype: torch.dtype) -> Any:
    """While this lasts, the frequencies of stretched positions are computed in `dtype`."""
    name, wide = modeling_rope_utils.__name__, dtype == torch.float64
    functions = rewritten(name, wide=True, settle_ties=False).ROPE_INIT_FUNCTIONS if wide else {}
    return patch.dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS, functions)


def reference_of(
    decoder: Decoder, model_type: str | None = None, *, settle_ties: bool = False, attention: str = "eager"
) -> Any:
    """The class of `transformers` for a decoder's configuration, in its dtype, holding exactly its weights."""
    fields, dtype = to_hf(decoder.config, model_type=model_type), decoder.embed_tokens.weight.dtype
    named, architecture = fields.pop("model_type"), fields.pop("architectures")[0]
    config = AutoConfig.for_model(named, **fields)
    config._attn_implementation = attention
    kind = getattr(modeling(named, dtype, settle_ties=settle_ties), architecture)
    with rope_functions(dtype):
        peer = kind(config).to(dtype).eval()
    if hasattr(peer, "set_experts_implementation"):
        peer.set_experts_implementation("eager")
    load(peer, decoder, named)
    return peer


def load(peer: Any, decoder: Decoder, model_type: str) -> None:
    """Copy every weight of the main model; neither side may have one that the other lacks."""
    config, state = decoder.config, dict(decoder.state_dict())
    for key in idle_biases(config):
        state.pop(key, None)
    said = peer.load_state_dict(named_as_theirs(state, model_type, len(config.layers)), strict=False)
    # Without shared experts the class has some of width 0; it has no prediction layers.
    missing = [key for key in said.missing_keys if peer.state_dict()[key].numel()]
    unexpected = [key for key in said.unexpected_keys if not key.startswith("model.mtp_layers.")]
    further = [key for key in unexpected if mtp_depth(key, len(config.layers)) is None]
    assert not missing and not further, said


def named_as_theirs(tensors: dict[str, Tensor], model_type: str, num_hidden_layers: int) -> dict[str, Tensor]:
    """Weights of ours, or their gradients, under the names and in the shapes of the class in `transformers`."""
    if model_type == "gpt_oss":  # the one type whose class holds its experts in another order
        places = written(tensors, model_type, num_hidden_layers=num_hidden_layers)
        return {name: place.view(tensors[place.key]).reshape(place.shape) for name, place in places.items()}
    return {k if k.startswith("lm_head") else f"model.{k}": tensor for k, tensor in tensors.items()}
