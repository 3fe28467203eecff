"""What the parts of a decoder are called, and how they lie, in published files.

A file's tensor is a `Place`: a view of one of our parameters or buffers that has the file's numbers in the file's
order. The same places serve reading and writing. A tensor may have several spellings; the first is the one written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """`view` of the decoder's tensor `key` has the numbers of a stored tensor of `shape`, in the same order."""

    key: str
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor]


Spelling = dict[str, Place]
"""The stored tensors, by name, that together are one tensor of the decoder."""

# One expert's gate, up and down matrices.
_PLAIN_EXPERT, _NUMBERED_EXPERT = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")

# DeepSeek-V4 as published, from our names, in this order.
_V4 = (
    (r"^embed_tokens\.", "embed."),
    (r"^lm_head\.", "head."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.self_attn\.compressor\.indexer\.scorer\.weights_proj\.", ".attn.indexer.weights_proj."),
    (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
    (r"\.self_attn\.", ".attn."),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.position_bias$", ".ape"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.kv_norm\.", ".norm."),
    (r"\.q_([ab])_proj\.", r".wq_\1."),
    (r"\.o_([ab])_proj\.", r".wo_\1."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.mlp\.", ".ffn."),
)


def written(state: Mapping[str, Tensor], model_type: str, *, num_hidden_layers: int) -> Spelling:
    """Every tensor of a decoder's state as files of a published type name and shape it."""
    places: Spelling = {}
    for key, tensor in state.items():
        places |= next(iter(spellings(key, tensor, model_type, num_hidden_layers)))
    return places


def readable(state: Mapping[str, Tensor], model_type: str, *, num_hidden_layers: int) -> Spelling:
    """The same under every name that a file may use; a file must use one of a tensor's spellings."""
    places: Spelling = {}
    for key, tensor in state.items():
        for spelling in spellings(key, tensor, model_type, num_hidden_layers):
            places |= spelling
    return places


def spellings(key: str, tensor: Tensor, model_type: str, num_hidden_layers: int) -> Iterator[Spelling]:
    """Every way in which files of a published type hold the tensor `key`."""
    base = _numbered_on(key, num_hidden_layers)
    match model_type:
        case "gpt_oss":
            yield {_prefixed(base).replace(".mlp.gate.", ".mlp.router."): _gpt_oss_place(key, tensor)}
        case "deepseek_v4":
            yield from _v4(key, tensor, base)
        case "mixtral" if ".mlp." in base:
            sparse = base.replace(".mlp.", ".block_sparse_moe.")
            yield from _with_experts(key, tensor, f"model.{sparse}", _NUMBERED_EXPERT)
            yield from _with_experts(key, tensor, f"model.{base}", _PLAIN_EXPERT)
        case _:
            yield from _with_experts(key, tensor, _prefixed(base), _PLAIN_EXPERT)


def whole(key: str, tensor: Tensor) -> Place:
    """A tensor that a file holds as the decoder does."""
    return Place(key, tuple(tensor.shape), _itself)


def mtp_copies(model_type: str, num_hidden_layers: int, depths: int) -> dict[str, str]:
    """Names under which a file may repeat the embedding and head for its prediction layers, each with our key."""
    if model_type == "deepseek_v4":
        return {}
    layers = range(num_hidden_layers, num_hidden_layers + depths)
    copies = {f"model.layers.{i}.embed_tokens.weight": "embed_tokens.weight" for i in layers}
    return copies | {f"model.layers.{i}.shared_head.head.weight": "lm_head.weight" for i in layers}


def mtp_depth(name: str, num_hidden_layers: int) -> int | None:
    """Which layer after the last, from 0 on, a stored tensor belongs to; None for one of the main model."""
    found = re.match(r"model\.layers\.(\d+)\.", name) or re.match(r"mtp\.(\d+)\.", name)
    if found is None:
        return None
    depth = int(found[1]) - (num_hidden_layers if name.startswith("model.") else 0)
    return depth if depth >= 0 else None


def mtp_depths(names: Iterable[str], num_hidden_layers: int) -> set[int]:
    """Which layers after the last are prediction layers: those that norm an embedding."""
    found = {mtp_depth(name, num_hidden_layers) for name in names if name.endswith(".enorm.weight")}
    return {depth for depth in found if depth is not None}


def _prefixed(base: str) -> str:
    return base if base.startswith("lm_head.") else f"model.{base}"


def _numbered_on(key: str, num_hidden_layers: int) -> str:
    """Prediction layers are published as layers after the last."""
    found = re.fullmatch(r"mtp_layers\.(\d+)\.(layer\.|norm\.)?(.+)", key)
    if found is None:
        return key
    inner = {"layer.": "", "norm.": "shared_head.norm.", None: ""}[found[2]]
    return f"layers.{num_hidden_layers + int(found[1])}.{inner}{found[3]}"


def _v4(key: str, tensor: Tensor, base: str) -> Iterator[Spelling]:
    published = base
    for ours, theirs in _V4:
        published = re.sub(ours, theirs, published)
    for prefix in ("", "model."):
        yield from _with_experts(key, tensor, prefix + published, _NUMBERED_EXPERT)
    for prefix in ("", "model."):
        yield from _with_experts(key, tensor, prefix + base, _PLAIN_EXPERT)


def _with_experts(key: str, tensor: Tensor, name: str, matrices: tuple[str, str, str]) -> Iterator[Spelling]:
    """A tensor under `name`; stacked experts one by one first, then as a stack."""
    if name.endswith(".experts.gate_up_proj"):
        stem, (experts, width, columns) = name.removesuffix("gate_up_proj"), tensor.shape
        yield {
            f"{stem}{e}.{matrix}.weight": Place(key, (width // 2, columns), partial(_half_of_expert, e, half))
            for e in range(experts)
            for half, matrix in enumerate(matrices[:2])
        }
    if name.endswith(".experts.down_proj"):
        stem, shape = name.removesuffix("down_proj"), tuple(tensor.shape[1:])
        yield {
            f"{stem}{e}.{matrices[2]}.weight": Place(key, shape, partial(_expert, e)) for e in range(tensor.shape[0])
        }
    yield {name: whole(key, tensor)}


def _gpt_oss_place(key: str, tensor: Tensor) -> Place:
    """Experts are stored input first, with gate and up of each expert taking turns."""
    match key.rpartition(".experts.")[2]:
        case "gate_up_proj":
            experts, width, columns = tensor.shape
            return Place(key, (experts, columns, width), _turns_input_first)
        case "gate_up_proj_bias":
            return Place(key, tuple(tensor.shape), _turns)
        case "down_proj":
            experts, rows, columns = tensor.shape
            return Place(key, (experts, columns, rows), _input_first)
        case _:
            return whole(key, tensor)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _expert(expert: int, stack_EDF: Tensor) -> Tensor:
    return stack_EDF[expert]


def _half_of_expert(expert: int, half: int, stack_EFD: Tensor) -> Tensor:
    return stack_EFD[expert].chunk(2)[half]


def _turns_input_first(stack_EFD: Tensor) -> Tensor:
    return stack_EFD.unflatten(1, (2, -1)).permute(0, 3, 2, 1)


def _turns(bias_EF: Tensor) -> Tensor:
    return bias_EF.unflatten(1, (2, -1)).transpose(1, 2)


def _input_first(stack_EDF: Tensor) -> Tensor:
    return stack_EDF.transpose(1, 2)
