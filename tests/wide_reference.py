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
def widened(name: str) -> Any:
    """The module `name` of `transformers` once more, with a source that says float64 wherever it says float32.

    It casts to float32 by name in norms, softmax, rotary angles, routers and index scores, inside long functions.
    Rewriting those by hand would compare us with ourselves; its own text with wider casts does not.
    """
    file = import_module(name).__file__
    assert file is not None
    text, replaced = re.subn(r"torch\.float(32)?\b", "torch.float64", Path(file).read_text(encoding="utf-8"))
    text, doubled = re.subn(r"\.float\(\)", ".double()", text)
    assert replaced and doubled
    twin = f"{name}_float64"
    spec = spec_from_file_location(twin, file)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[twin] = module
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def modeling(model_type: str, dtype: torch.dtype) -> Any:
    """The module that defines a published type, in which nothing is computed in less than `dtype`."""
    name = f"transformers.models.{model_type}.modeling_{model_type}"
    return import_module(name) if dtype == torch.float32 else widened(name)


def reference_of(decoder: Decoder) -> Any:
    """The class of `transformers` for a decoder's configuration, in its dtype, holding exactly its weights."""
    fields, dtype = to_hf(decoder.config), decoder.embed_tokens.weight.dtype
    model_type, architecture = fields.pop("model_type"), fields.pop("architectures")[0]
    config = AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    kind = getattr(modeling(model_type, dtype), architecture)
    ropes = widened(modeling_rope_utils.__name__).ROPE_INIT_FUNCTIONS if dtype == torch.float64 else {}
    with patch.dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS, ropes):
        peer = kind(config).to(dtype).eval()
    if hasattr(peer, "set_experts_implementation"):
        peer.set_experts_implementation("eager")
    load(peer, decoder, model_type)
    return peer


def load(peer: Any, decoder: Decoder, model_type: str) -> None:
    """Copy every weight of the main model; neither side may have one that the other lacks."""
    config, state = decoder.config, dict(decoder.state_dict())
    for key in idle_biases(config):
        state.pop(key, None)
    named: dict[str, Tensor] = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in state.items()}
    if model_type == "gpt_oss":  # the one type whose class holds its experts in another order
        places = written(state, model_type, num_hidden_layers=len(config.layers))
        named = {name: place.view(state[place.key]).reshape(place.shape) for name, place in places.items()}
    said = peer.load_state_dict(named, strict=False)
    # Without shared experts the class has some of width 0; it has no prediction layers.
    missing = [key for key in said.missing_keys if peer.state_dict()[key].numel()]
    unexpected = [key for key in said.unexpected_keys if not key.startswith("model.mtp_layers.")]
    further = [key for key in unexpected if mtp_depth(key, len(config.layers)) is None]
    assert not missing and not further, said
