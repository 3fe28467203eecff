"""Which stored tensor goes where in a decoder: planned from names and shapes alone, then read piece by piece."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.model.hf_folder.fp8 import dequantize, scale_shape
from workbench.model.hf_folder.names import Place, Spelling, mtp_copies, mtp_depth, mtp_depths, readable, whole, written
from workbench.model.hf_folder.safetensors_folder import Stored, read_all, read_beside
from workbench.model.require import require

_FP8, _SCALES = torch.float8_e4m3fn, (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
_SUFFIX = "_scale_inv"


class Piece(NamedTuple):
    """`values` are stored numbers of the tensor `key`, `part` is where they belong; `nbytes` were read for them."""

    key: str
    stored: Stored
    part: Tensor
    values: Tensor
    nbytes: int


class Pair(NamedTuple):
    """A stored tensor, its place, and the scales of an FP8 one."""

    stored: Stored
    place: Place
    scale: Stored | None


@dataclass(frozen=True)
class Reading:
    """`places` fill every tensor of a decoder once, but for those in `empty`; `copies` repeat what is in `places`."""

    places: tuple[Pair, ...]
    copies: tuple[Pair, ...]
    empty: tuple[str, ...]
    block: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(pair.stored.nbytes for pair in (*self.places, *self.copies))

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype in which the tensor `key` is stored; bfloat16, which holds all of FP8's numbers, for FP8."""
        stored = next(pair.stored.dtype for pair in self.places if pair.place.key == key)
        return torch.bfloat16 if stored == _FP8 else stored

    def pieces(self, state: Mapping[str, Tensor], pairs: Iterable[Pair]) -> Iterator[Piece]:
        """The numbers of `pairs`, each beside the part of `state` where it belongs, file by file."""
        ordered = sorted(pairs, key=lambda pair: (pair.stored.file, pair.stored.start))
        for path, group in groupby(ordered, key=lambda pair: pair.stored.file):
            with path.open("rb") as file:
                for stored, place, scale in group:
                    view = place.view(state[place.key])
                    if scale is None:
                        for part, values in read_beside(file, stored, view):
                            yield Piece(place.key, stored, part, values, values.nbytes)
                        continue
                    with scale.file.open("rb") as scale_file:
                        scales = read_all(scale_file, scale)
                    for one, matrix, blocks in _matrices(stored, view, scales):
                        row = 0
                        for part, values in read_beside(file, one, matrix, multiple=self.block[0]):
                            wide = dequantize(values, blocks[row // self.block[0] :], block=self.block)
                            yield Piece(place.key, stored, part, wide, values.nbytes)
                            row += len(values)


def plan(
    stored: Mapping[str, Stored],
    state: Mapping[str, Tensor],
    *,
    model_type: str,
    quantization: Any,
    num_hidden_layers: int,
    num_mtp_layers: int,
    may_stay_empty: set[str],
    skip_further_mtp: bool,
    tied: bool,
) -> Reading:
    """Pair every stored tensor with its place in `state`, which may be on the meta device.

    Raises:
        ValueError: a tensor is missing, not expected, misshapen, there twice, or of a dtype that does not fit.
    """
    block = _block(quantization)
    scales = {name: tensor for name, tensor in stored.items() if name.endswith(_SUFFIX)}
    state = {key: tensor for key, tensor in state.items() if not (tied and key == "lm_head.weight")}
    names = readable(state, model_type, num_hidden_layers=num_hidden_layers)
    repeated = _copies(state, model_type, num_hidden_layers, num_mtp_layers, tied)
    further = {depth for depth in mtp_depths(stored, num_hidden_layers) if depth >= num_mtp_layers}
    skipped = further if skip_further_mtp else set()
    places: list[Pair] = []
    copies: list[Pair] = []
    for name, tensor in stored.items():
        if mtp_depth(name, num_hidden_layers) in skipped:
            continue
        if name in scales:
            weight = stored.get(name.removesuffix(_SUFFIX))
            require(weight is not None and weight.dtype == _FP8, f"{name} scales no FP8 tensor of the folder")
            continue
        place = names.get(name) or repeated.get(name)
        if place is None and 0 in tensor.shape:
            continue  # `transformers` writes shared experts of width 0 where there are none
        if place is None:
            raise ValueError(f"{name} in {tensor.file.name} is not expected: this {model_type} has no such tensor")
        pair = Pair(tensor, place, scales.get(name + _SUFFIX))
        _check(pair, state[place.key], block)
        (places if name in names else copies).append(pair)
    empty = _uncovered(places, state, may_stay_empty, written(state, model_type, num_hidden_layers=num_hidden_layers))
    return Reading(tuple(places), tuple(copies), empty, block)


def _copies(
    state: Mapping[str, Tensor], model_type: str, num_hidden_layers: int, num_mtp_layers: int, tied: bool
) -> Spelling:
    """What a file may hold a second time."""
    keys = mtp_copies(model_type, num_hidden_layers, num_mtp_layers)
    if tied:
        keys = dict.fromkeys((*keys, "lm_head.weight", "head.weight"), "embed_tokens.weight")
    return {name: whole(key, state[key]) for name, key in keys.items()}


def _block(quantization: Any) -> tuple[int, int]:
    """The size of the blocks that share a scale."""
    if quantization is None:
        return (128, 128)
    given = quantization if isinstance(quantization, dict) else {}
    method = given.get("quant_method")
    require(method == "fp8", f"quantization_config has quant_method={method!r}; only 'fp8' in blocks is read")
    block = given.get("weight_block_size", [128, 128])
    sound = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    require(sound, f"weight_block_size={block!r} must be two whole numbers above 0")
    return (block[0], block[1])


def _check(pair: Pair, target: Tensor, block: tuple[int, int]) -> None:
    (stored, place, scale), found = pair, list(pair.stored.shape)
    where = f"{stored.name} in {stored.file.name}"
    require(stored.shape == place.shape, f"{where} has shape {found}; {list(place.shape)} is expected")
    if stored.dtype == _FP8:
        if scale is None:
            raise ValueError(f"{where} is FP8 and has no {stored.name}{_SUFFIX}")
        blocks = list(scale_shape(stored.shape, block))
        require(
            list(scale.shape) == blocks, f"{scale.name} has shape {list(scale.shape)}; {blocks} is expected for {found}"
        )
        require(
            scale.dtype in _SCALES, f"{scale.name} has dtype {scale.dtype}; {', '.join(map(str, _SCALES))} are read"
        )
    elif target.is_floating_point():
        ordinary = stored.dtype.is_floating_point and stored.dtype.itemsize > 1
        require(ordinary, f"{where} has dtype {stored.dtype}; a floating-point one is expected")
    else:
        require(not stored.dtype.is_floating_point, f"{where} has dtype {stored.dtype}; whole numbers are expected")


def _uncovered(
    places: list[Pair], state: Mapping[str, Tensor], may_stay_empty: set[str], names: Spelling
) -> tuple[str, ...]:
    """Keys that no stored tensor fills, all of which may stay empty."""
    filled: Counter[str] = Counter()
    for stored, place, _ in places:
        filled[place.key] += math.prod(place.shape)
        require(
            filled[place.key] <= state[place.key].numel(),
            f"{stored.name} in {stored.file.name} fills {place.key} a second time: it is there under another name too",
        )
    missing = [key for key, tensor in state.items() if filled[key] < tensor.numel()]
    there = {stored.name for stored, _, _ in places}
    for key in missing:
        if key in may_stay_empty and not filled[key]:
            continue
        lacking = [(name, place.shape) for name, place in names.items() if place.key == key and name not in there]
        name, shape = lacking[0]
        more = f" and {len(lacking) - 1} more of the same stack" if len(lacking) > 1 else ""
        raise ValueError(f"the folder lacks tensor {name} of shape {list(shape)}{more}")
    return tuple(missing)


def _matrices(stored: Stored, view: Tensor, scales: Tensor) -> Iterator[tuple[Stored, Tensor, Tensor]]:
    """The matrices of a stack, or a single one: where each lies, its place and its scales."""
    if view.dim() == 2:
        yield stored, view, scales
        return
    for i, (inner, inner_scales) in enumerate(zip(view, scales, strict=True)):
        one = stored._replace(shape=stored.shape[1:], start=stored.start + i * (stored.nbytes // stored.shape[0]))
        yield from _matrices(one, inner, inner_scales)
