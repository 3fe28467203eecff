"""The tensors in a folder of safetensors files: what there is, where it lies, and reading it piece by piece.

The headers are read and checked here, and the numbers with plain reads instead of a memory map, whose pages would count
as memory beside the model's own. Nothing in a file can name code.

Source: the format's definition, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_HEADER = 100_000_000
_PIECE_BYTES = 8 * 2**20


class Stored(NamedTuple):
    """A tensor in a file: its numbers lie row by row from byte `start` on."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder with `model.safetensors`, or with shards and their index, by name.

    Raises:
        ValueError: there are no such files or both kinds, a file is missing, cut or damaged, index and shards do not
            agree, a name leads out of the folder, or a tensor has a dtype that is not read.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; only one of them can be the model")
    if single.is_file():
        return _header(single)
    if index.is_file():
        return _sharded(folder, read_json(index))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(f"{folder} holds only pickled weights ({pickles[0]}), which can run code: convert them first")
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} instead of a JSON object")
    return value


def _sharded(folder: Path, index: dict[str, Any]) -> dict[str, Stored]:
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of names")
    found: dict[str, Stored] = {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {shard!r}; a shard must be a .safetensors file in the folder itself")
        if not (folder / shard).is_file():
            raise ValueError(f"{INDEX} names {shard}, which is not in {folder}")
        for name, stored in _header(folder / shard).items():
            if name in found:
                raise ValueError(f"tensor {name} is in two shards, {found[name].file.name} and {shard}")
            found[name] = stored
    for name in sorted(set(where) | set(found)):
        if name not in found:
            raise ValueError(f"{INDEX} names tensor {name}, which is not in {where[name]} nor in any other shard")
        if where.get(name) != found[name].file.name:
            raise ValueError(f"tensor {name} is in {found[name].file.name}; {INDEX} says {where.get(name, 'nothing')}")
    return found


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, which together must fill it, each byte once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{path} is cut or no safetensors file: {size} bytes, a header of {length}")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            found = {name: _stored(name, path, 8 + length, entry) for name, entry in entries.items()}
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(f"the header of {path} is damaged") from None
    end = 8 + length
    for stored in sorted(found.values(), key=lambda stored: (stored.start, stored.nbytes)):
        if stored.start != end:
            raise ValueError(f"{path} is damaged: tensor {stored.name} starts at byte {stored.start} instead of {end}")
        end += stored.nbytes
    if end != size:
        raise ValueError(f"{path} is cut or damaged: {size} bytes, its header describes {end}")
    return found


def _stored(name: str, path: Path, first: int, entry: dict[str, Any]) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} in {path} has dtype {entry['dtype']}; readable are {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
        raise TypeError("sizes are whole numbers")
    stored = Stored(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), first + begin)
    if end - begin != stored.nbytes:
        raise ValueError(f"{path} is damaged: tensor {name} of shape {list(stored.shape)} has {end - begin} bytes")
    return stored


def read_all(file: BufferedReader, stored: Stored) -> Tensor:
    """A whole stored tensor, on the CPU; for small ones."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    for part, numbers in read_beside(file, stored, tensor):
        part.copy_(numbers)
    return tensor


def read_beside(
    file: BufferedReader, stored: Stored, view: Tensor, *, multiple: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (part of `view`, the stored numbers of that part), in the file's order, some megabytes at a time.

    `view` has the stored numbers in the stored order, whatever its own shape, dtype, strides and device. Matrices are
    cut after a multiple of `multiple` rows, apart from their end. The numbers are valid until the next pair.
    """
    file.seek(stored.start)
    for part in _parts(view, _PIECE_BYTES // stored.dtype.itemsize, multiple):
        if part.numel() == 0:
            continue
        buffer = bytearray(part.numel() * stored.dtype.itemsize)
        if file.readinto(buffer) != len(buffer):
            raise ValueError(f"{stored.file} ends inside tensor {stored.name}")
        yield part, torch.frombuffer(buffer, dtype=stored.dtype).view(part.shape)


def _parts(view: Tensor, limit: int, multiple: int) -> Iterator[Tensor]:
    """Consecutive pieces of at most `limit` numbers, or of `multiple` rows of a matrix where these are more."""
    if view.numel() <= limit or view.dim() == 0:
        yield view
        return
    row = max(view[0].numel(), 1)
    if row > limit and view.dim() > 2:
        for inner in view:
            yield from _parts(inner, limit, multiple)
        return
    rows = max(limit // row // multiple, 1) * multiple
    for first in range(0, len(view), rows):
        yield view[first : first + rows]
