"""Published checkpoints in and out: a folder of config.json and safetensors, as `transformers` has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workbench.model.config import MixtureOfExperts, ModelConfig, require
from workbench.model.decoder import Decoder
from workbench.model.hf_folder.fill import Reading, plan
from workbench.model.hf_folder.names import mtp_depths, written
from workbench.model.hf_folder.new_folder import new_folder
from workbench.model.hf_folder.progress_bar import progress_bar
from workbench.model.hf_folder.safetensors_folder import INDEX, SINGLE, Stored, read_json, tensors_in
from workbench.model.to_hf import to_hf

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load(
    folder: str | Path,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool | Callable[[int, int], None] = True,
) -> Decoder:
    """The decoder that a published folder holds.

    Weights go piece by piece from the files into the decoder's own storage, and FP8 weights are multiplied out on the
    way, so that memory stays near the decoder's own. Everything that the headers of the files can tell is checked
    before any is allocated. No code of the folder is run.

    `dtype=None` takes that of the stored embedding. `progress` is called with (bytes done, bytes in all); True draws a
    bar on the error stream when it takes longer than a second.

    `config=None` reads config.json; prediction layers that it names and of which the files hold nothing (`transformers`
    drops them when it saves) are left out. A given `config` is obeyed: prediction layers beyond its own stay unread.
    Copies of the embedding and the head, in prediction layers or beside a tied embedding, must equal the original.

    Raises:
        ValueError: a file or tensor is missing, cut, damaged, misshapen, not expected, or there twice; only pickled
            weights; a dtype or quantisation that is not read. One line says which; nothing is loaded by halves.
    """
    folder = Path(folder)
    require(dtype is None or dtype in FLOATS, f"dtype={dtype} must be one of {', '.join(map(str, FLOATS))}")
    published = read_json(folder / "config.json")
    stored = tensors_in(folder)
    obeyed = config is not None
    config = _stored_config(published, stored) if config is None else config
    with torch.device("meta"):
        decoder = Decoder(config)
    reading = plan(
        stored,
        decoder.state_dict(),
        model_type=str(published.get("model_type")),
        quantization=published.get("quantization_config"),
        num_hidden_layers=len(config.layers),
        num_mtp_layers=len(config.mtp_layers),
        may_stay_empty=set(idle_biases(config)),
        skip_further_mtp=obeyed,
        tied=config.tie_word_embeddings,
    )
    materialise(decoder, dtype or reading.dtype_of("embed_tokens.weight"), torch.device(device))
    advance = progress if callable(progress) else progress_bar(f"loading {folder.name}") if progress else _silent
    fill(decoder, reading, advance)
    return decoder


def save(
    decoder: Decoder,
    folder: str | Path,
    *,
    model_type: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a new folder that `transformers` and `load` read: config.json and safetensors, in shards when it is large.

    `model_type=None` takes the published type that the configuration fits. The folder appears whole or not at all, and
    is on the disk when `save` returns. Prediction layers are written as published, but without their copies of
    embedding and head.

    Raises:
        ValueError: the folder exists, no published type (or not that one) can express the configuration, or a
            selection bias is not 0 where the type has none.
    """
    require(max_shard_bytes > 0, f"max_shard_bytes={max_shard_bytes} must be above 0")
    config = decoder.config
    published = to_hf(config, model_type=model_type)
    state = dict(decoder.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key in idle_biases(config):
        bias = state.pop(key, None)
        require(bias is None or not bias.any(), f"{key} is not 0, and {published['model_type']} has no selection bias")
    dtype = str(decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    places = written(state, published["model_type"], num_hidden_layers=len(config.layers))
    with new_folder(Path(folder)) as building:
        (building / "config.json").write_text(json.dumps(published | {"torch_dtype": dtype}, indent=2) + "\n")
        tensors = {name: place.view(state[place.key]) for name, place in places.items()}
        shards = list(_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes))
        where: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            whole = {n: tensors[n].detach().reshape(places[n].shape).cpu().contiguous() for n in names}
            save_file(whole, building / file, metadata={"format": "pt"})
            where |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": where}
            (building / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def idle_biases(config: ModelConfig) -> Iterator[str]:
    """Keys of the selection biases of routers that choose without one; published files do not hold them."""
    named = [(f"layers.{i}", layer) for i, layer in enumerate(config.layers)]
    named += [(f"mtp_layers.{i}.layer", layer) for i, layer in enumerate(config.mtp_layers)]
    for name, layer in named:
        if isinstance(layer.feed_forward, MixtureOfExperts) and layer.feed_forward.topk_method != "noaux_tc":
            yield f"{name}.mlp.gate.e_score_correction_bias"


def _stored_config(published: dict[str, Any], stored: Mapping[str, Stored]) -> ModelConfig:
    """What config.json says, but for prediction layers of which nothing is stored."""
    config = ModelConfig.from_hf(published)
    return config if mtp_depths(stored, len(config.layers)) else replace(config, mtp_layers=())


def materialise(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> None:
    """Give a decoder on the meta device storage of its own, unfilled; a tied head stays tied."""
    kept = set(decoder.state_dict())
    constants = [name for name, _ in decoder.named_buffers() if name not in kept]
    assert not constants, f"{constants[0]} would lose its values: it is in no state dict"
    decoder.to(dtype).to_empty(device=device)
    if decoder.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight


@torch.no_grad()
def fill(decoder: Decoder, reading: Reading, advance: Callable[[int, int], None]) -> None:
    """Put the stored numbers where they belong, then compare the copies with their originals."""
    state: Mapping[str, Tensor] = decoder.state_dict()
    for key in reading.empty:
        state[key].zero_()
    done = 0
    for numbers in reading.pieces(state, reading.places):
        numbers.part.copy_(numbers.values)
        advance(done := done + numbers.nbytes, reading.nbytes)
    for numbers in reading.pieces(state, reading.copies):
        same = torch.equal(numbers.part, numbers.values.to(numbers.part))
        require(
            same, f"{numbers.stored.name} in {numbers.stored.file.name} differs from {numbers.key}, which it repeats"
        )
        advance(done := done + numbers.nbytes, reading.nbytes)


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, cut so that each group stays within `limit` bytes, or holds a single larger tensor."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _silent(done: int, total: int) -> None:
    """No progress is shown."""
