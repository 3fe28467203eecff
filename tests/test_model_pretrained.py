"""Published folders in and out: the same bits, the same logits as `transformers`, every damage refused in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_models import BUILT, difference, make, reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from workbench.blocks.router import Router
from workbench.model.decoder import Decoder
from workbench.model.hf_folder.fill import plan
from workbench.model.hf_folder.fp8 import dequantize
from workbench.model.hf_folder.progress_bar import progress_bar
from workbench.model.hf_folder.safetensors_folder import tensors_in
from workbench.model.pretrained import load, save

ALLOWED = 1e-5
V3 = BUILT["deepseek_v3"]
PREDICTING = replace(V3, mtp_layers=(V3.layers[-1],) * 2)
INDEX = "model.safetensors.index.json"


def assert_same(one: Decoder, other: Decoder) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
    """Change the tensors of a file by their names."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_what_was_saved_is_loaded_bit_by_bit(name: str, shard: int, tmp_path: Path) -> None:
    decoder = make(BUILT[name])
    save(decoder, tmp_path / "saved", max_shard_bytes=shard)
    assert (tmp_path / "saved" / INDEX).exists() == (shard < 100_000)
    assert_same(load(tmp_path / "saved", config=decoder.config), decoder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_transformers_reads_what_was_saved(name: str, shard: int, tmp_path: Path) -> None:
    decoder = make(BUILT[name])
    save(decoder, tmp_path / "saved", max_shard_bytes=shard)
    assert difference(decoder, reference(tmp_path / "saved")) <= ALLOWED


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_what_transformers_saved_is_loaded(name: str, shard: str, tmp_path: Path) -> None:
    save(make(BUILT[name]), tmp_path / "ours")
    peer = reference(tmp_path / "ours")
    torch.manual_seed(3)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert difference(load(tmp_path / "theirs", config=BUILT[name]), peer) <= ALLOWED


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_file_or_the_one_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    decoder = make(V3, dtype)
    save(decoder, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]
    assert_same(load(tmp_path / "saved", config=V3), decoder)
    asked = load(tmp_path / "saved", config=V3, dtype=torch.float16)
    assert asked.norm.weight.dtype == torch.float16
    assert asked.get_submodule("layers.1.mlp.gate").e_score_correction_bias.dtype == torch.float32
    for key, tensor in asked.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[key].to(tensor.dtype)), key


def test_loading_draws_no_random_numbers_and_leaves_the_folder_alone(tmp_path: Path) -> None:
    save(make(V3), tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    state = torch.get_rng_state()
    load(tmp_path / "saved", config=V3)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


def test_a_tied_head_stays_tied_and_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    decoder = make(BUILT["llama, tied"])
    save(decoder, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = load(tmp_path / "saved", config=decoder.config)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    edit(tmp_path / "saved", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(load(tmp_path / "saved", config=decoder.config), decoder)
    edit(tmp_path / "saved", lambda t: t["lm_head.weight"][3].add_(1))
    with pytest.raises(ValueError, match=r"lm_head.weight in model.safetensors differs from embed_tokens.weight"):
        load(tmp_path / "saved", config=decoder.config)


def stacked(tensors: dict[str, Tensor]) -> None:
    """Per-expert tensors as `transformers` holds them in memory: gate over up, experts stacked."""
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors.pop(f"{stem}{e}.{part}_proj.weight") for e in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{stem}gate_up_proj": torch.cat((gate, up), dim=1), f"{stem}down_proj": down}


def test_stacked_experts_are_read_as_single_ones_are(tmp_path: Path) -> None:
    decoder = make(V3)
    save(decoder, tmp_path / "saved")
    edit(tmp_path / "saved", stacked)
    assert_same(load(tmp_path / "saved", config=V3), decoder)


def test_mixtral_may_have_either_of_its_two_spellings(tmp_path: Path) -> None:
    decoder = make(BUILT["mixtral"])
    save(decoder, tmp_path / "saved")
    spelled = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

    def respell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[".".join(spelled.get(word, word) for word in name.split("."))] = tensors.pop(name)

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.5.w3.weight" in file.keys()  # noqa: SIM118
    edit(tmp_path / "saved", respell)
    assert_same(load(tmp_path / "saved", config=decoder.config), decoder)


def test_prediction_layers_are_layers_after_the_last(tmp_path: Path) -> None:
    decoder = make(PREDICTING)
    save(decoder, tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "self_attn.o_proj", "mlp.experts.7.up_proj"):
        assert f"model.layers.4.{part}.weight" in names
    assert_same(load(tmp_path / "saved", config=PREDICTING), decoder)
    assert difference(decoder, reference(tmp_path / "saved")) <= ALLOWED

    def repeat(tensors: dict[str, Tensor]) -> None:
        for layer in (3, 4):
            tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    edit(tmp_path / "saved", repeat)
    assert_same(load(tmp_path / "saved", config=PREDICTING), decoder)
    main = load(tmp_path / "saved", config=V3)
    assert torch.equal(main.norm.weight, decoder.norm.weight) and not main.mtp_layers
    edit(tmp_path / "saved", lambda t: t["model.layers.4.shared_head.head.weight"][5].add_(1))
    with pytest.raises(ValueError, match=r"layers.4.shared_head.head.weight in .* differs from lm_head.weight"):
        load(tmp_path / "saved", config=PREDICTING)


@pytest.mark.parametrize("shape", [(130, 200), (128, 128), (1, 300), (257, 3)])
@pytest.mark.parametrize("block", [(128, 128), (32, 16)])
def test_fp8_is_multiplied_by_the_scale_of_its_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight, scale = quantized(torch.randn(shape, generator=torch.Generator().manual_seed(4)), block)
    expected = torch.tensor(
        [
            [float(weight[i, j].float()) * float(scale[i // block[0], j // block[1]]) for j in range(shape[1])]
            for i in range(shape[0])
        ]
    )
    torch.testing.assert_close(dequantize(weight, scale, block=block), expected, rtol=0, atol=0)


def quantized(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """FP8 and the numbers to multiply it by, one per block, each its own."""
    scale = torch.rand(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])) + 0.5
    return (weight / 2).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def all_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make every projection FP8 in blocks of 128 x 128, and the rest bfloat16; returns what the FP8 ones mean."""
    torch.manual_seed(2)
    expected = {}
    for name, tensor in list(tensors.items()):
        if "proj" in name:
            pairs = [quantized(matrix, (128, 128)) for matrix in tensor.reshape(-1, *tensor.shape[-2:])]
            weights, scales = (torch.stack(part) for part in zip(*pairs, strict=True))
            tensors[name] = weights.reshape(tensor.shape)
            tensors[f"{name}_scale_inv"] = scales.reshape(*tensor.shape[:-2], *scales.shape[1:])
            values = torch.stack([dequantize(*pair, block=(128, 128)) for pair in pairs])
            expected[name] = values.reshape(tensor.shape).to(torch.bfloat16)
        elif "e_score" not in name:
            tensors[name] = tensor.to(torch.bfloat16)
    return expected


@pytest.mark.parametrize("form", ["single experts", "stacked experts"])
def test_an_fp8_folder_is_loaded_as_its_dequantised_weights(form: str, tmp_path: Path) -> None:
    wide = replace(V3, hidden_size=200)
    decoder = make(wide)
    save(decoder, tmp_path / "saved")
    expected: dict[str, Tensor] = {}

    def quantise(tensors: dict[str, Tensor]) -> None:
        if form == "stacked experts":
            stacked(tensors)
        expected.update(all_fp8(tensors))

    edit(tmp_path / "saved", quantise)
    edit_json(
        tmp_path / "saved" / "config.json",
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    )
    loaded = load(tmp_path / "saved", config=wide)
    assert loaded.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(
        loaded.get_parameter("layers.0.mlp.down_proj.weight"), expected["model.layers.0.mlp.down_proj.weight"]
    )
    stack, stem = loaded.get_parameter("layers.2.mlp.experts.gate_up_proj"), "model.layers.2.mlp.experts."
    for e in range(8):
        if form == "stacked experts":
            assert torch.equal(stack[e], expected[f"{stem}gate_up_proj"][e])
        else:
            assert torch.equal(stack[e, 20:], expected[f"{stem}{e}.up_proj.weight"])
    edit(tmp_path / "saved", lambda t: t.pop("model.layers.0.mlp.down_proj.weight_scale_inv"))
    with pytest.raises(ValueError, match=r"down_proj.weight in .* is FP8 and has no .*down_proj.weight_scale_inv"):
        load(tmp_path / "saved", config=wide)


@pytest.mark.parametrize("fp8", [True, False])
def test_large_tensors_are_read_some_megabytes_at_a_time(fp8: bool, tmp_path: Path) -> None:
    model_type, key = ("llama", "lm_head.weight") if fp8 else ("gpt_oss", "layers.0.mlp.experts.gate_up_proj")
    torch.manual_seed(6)
    if fp8:
        weight, scale = quantized(torch.randn(9001, 1100), (128, 128))
        tensors, expected = {key: weight, f"{key}_scale_inv": scale}, dequantize(weight, scale, block=(128, 128))
    else:
        expected = torch.randn(2, 2 * 1300, 1000)
        turns = torch.stack(expected.mT.chunk(2, dim=-1), dim=-1).flatten(-2)
        tensors = {f"model.{key}": turns.contiguous()}
    save_file(tensors, tmp_path / "model.safetensors")
    target = {key: torch.full_like(expected, torch.nan)}
    reading = plan(
        tensors_in(tmp_path),
        target,
        model_type=model_type,
        quantization=None,
        num_hidden_layers=1,
        num_mtp_layers=0,
        may_stay_empty=set(),
        skip_further_mtp=False,
        tied=False,
    )
    read = []
    for piece in reading.pieces(target, reading.places):
        piece.part.copy_(piece.values)
        read.append(piece.nbytes)
    assert torch.equal(target[key], expected)
    assert len(read) > 1 and max(read) <= 8 * 2**20 and sum(read) == reading.nbytes


def shard_of(folder: Path, name: str) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


NORM, UP = "model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(NORM), r"lacks tensor model.norm.weight of shape \[48\]"),
    "missing expert": (lambda t: t.pop(UP), r"lacks tensor model.layers.1.mlp.experts.3.up_proj.weight of shape"),
    "missing bias": (
        lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
        r"lacks tensor model.layers.1.mlp.gate.e_score_correction_bias of shape \[8\]",
    ),
    "extra": (
        lambda t: t.update({"model.extra": t[NORM].clone()}),
        r"model.extra in model.safetensors is not expected",
    ),
    "extra layer": (
        lambda t: t.update({"model.layers.3.input_layernorm.weight": t[NORM].clone()}),
        r"model.layers.3.input_layernorm.weight in model.safetensors is not expected",
    ),
    "misshapen": (lambda t: t.update({NORM: torch.ones(49)}), r"model.norm.weight .* has shape \[49\]; \[48\] is"),
    "turned": (lambda t: t.update({UP: t[UP].T.contiguous()}), r"has shape \[48, 20\]; \[20, 48\] is expected"),
    "twice": (
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 48, 20)}),
        r"layers.1.mlp.experts.* fills layers.1.mlp.experts.down_proj a second time",
    ),
    "whole numbers": (lambda t: t.update({NORM: torch.ones(48, dtype=torch.int64)}), r"floating-point one is expected"),
    "unread dtype": (
        lambda t: t.update({NORM: torch.ones(48, dtype=torch.uint8)}),
        r"model.norm.weight in .* has dtype U8; readable are F64, F32",
    ),
    "scale of nothing": (
        lambda t: t.update({f"{NORM}_scale_inv": torch.ones(1, 1)}),
        r"model.norm.weight_scale_inv scales no FP8 tensor",
    ),
}


@pytest.mark.parametrize("name", TENSOR_DAMAGE)
def test_a_wrong_tensor_is_named(name: str, tmp_path: Path) -> None:
    save(make(V3), tmp_path / "saved")
    change, line = TENSOR_DAMAGE[name]
    edit(tmp_path / "saved", change)
    refused(tmp_path / "saved", line)


def refused(folder: Path, line: str) -> None:
    """One line, and the folder as it was."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=line) as caught:
        load(folder, config=V3)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    save(make(V3), tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(tmp_path / "saved", r"model.safetensors is cut or")
    file.write_bytes(whole + b"\0")
    refused(tmp_path / "saved", r"model.safetensors is cut or")
    file.write_bytes(whole[:8] + b"[" + whole[9:])
    refused(tmp_path / "saved", r"the header of .*model.safetensors is damaged")


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


SAME_SIZE = "model.layers.0.input_layernorm.weight"
HEADER_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (
        lambda h: h[NORM].update(data_offsets=h[SAME_SIZE]["data_offsets"]),
        r"is damaged: tensor .* starts at",
    ),
    "other size": (
        lambda h: h[NORM].update(data_offsets=h["lm_head.weight"]["data_offsets"]),
        r"\[48\] has 11712 bytes",
    ),
    "hole": (lambda h: h.pop(NORM), r"is damaged: tensor|is cut or damaged"),
    "no offsets": (lambda h: h[NORM].pop("data_offsets"), r"header of .* is damaged"),
    "negative": (lambda h: h[NORM].update(shape=[-48]), r"header of .* is damaged"),
    "words": (lambda h: h[NORM].update(shape=["48"]), r"header of .* is damaged"),
}


@pytest.mark.parametrize("name", HEADER_DAMAGE)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    save(make(V3), tmp_path / "saved")
    change, line = HEADER_DAMAGE[name]
    with_header(tmp_path / "saved" / "model.safetensors", change)
    refused(tmp_path / "saved", line)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(make(V3), folder, max_shard_bytes=20_000)
    index = json.loads((folder / INDEX).read_text())
    where, shard = index["weight_map"], shard_of(folder, NORM)
    other = next(name for name in where.values() if name != shard)

    def says(weight_map: Any, line: str) -> None:
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        refused(folder, line)

    says(where | {NORM: "model-9.safetensors"}, r"names model-9.safetensors, which is not in")
    for name in (
        f"../saved/{shard}",
        f"/tmp/{shard}",
        "..",
        "a/../b.safetensors",
        "c\\d.safetensors",
        "config.json",
    ):
        says(where | {NORM: name}, r"a shard must be a .safetensors file in the folder itself")
    says(where | {NORM: other}, rf"tensor model.norm.weight is in {shard}; .* says {other}")
    says(where | {"model.more": other}, r"names tensor model.more, which is not in")
    says({name: file for name, file in where.items() if name != NORM}, r"model.norm.weight is in .* says nothing")
    says({NORM: 3}, r"has no weight_map of names")
    says(where | {"x": other}, r"names tensor x,")
    (folder / INDEX).write_text(json.dumps(index))
    edit(folder, lambda t: t.update({NORM: torch.ones(48)}), file=other)
    refused(folder, r"tensor model.norm.weight is in two shards")


def test_a_cut_or_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save(make(V3), folder, max_shard_bytes=20_000)
    shard = folder / shard_of(folder, NORM)
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    refused(folder, rf"{shard.name} is cut or damaged")
    shard.unlink()
    refused(folder, rf"index.json names {shard.name}, which is not in")


class Payload:
    """A pickle that would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pickle_ran").touch, ())


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(make(V3), tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    refused(tmp_path / "saved", r"holds neither model.safetensors nor model.safetensors.index.json")
    torch.save({"x": Payload()}, tmp_path / "saved" / "pytorch_model.bin")
    refused(tmp_path / "saved", r"holds only pickled weights \(pytorch_model.bin\), which can run code")
    assert not (tmp_path / "pickle_ran").exists()


def test_remote_code_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    decoder = make(V3)
    save(decoder, tmp_path / "saved")
    (tmp_path / "saved" / "modeling_x.py").write_text("open('code_ran', 'w')\n")
    edit_json(tmp_path / "saved" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert_same(load(tmp_path / "saved", config=V3), decoder)
    assert not (tmp_path / "code_ran").exists()


def test_other_folders_and_wishes_are_refused_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with pytest.raises(ValueError, match=r"saved holds no config.json"):
        load(folder, config=V3)
    save(make(V3), folder)
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be one of torch.float64"):
        load(folder, config=V3, dtype=torch.int8)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    refused(folder, r"quant_method='mxfp4'; only 'fp8' in blocks is read")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [0, "a"]})
    refused(folder, r"weight_block_size=\[0, 'a'\] must be two whole numbers above 0")
    (folder / INDEX).write_text("{}")
    refused(folder, r"holds both model.safetensors and model.safetensors.index.json")
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        refused(folder, r"config.json (is no JSON|holds a list)")


def test_saving_refuses_what_is_there_and_what_no_type_has(tmp_path: Path) -> None:
    decoder = make(V3)
    (tmp_path / "there").mkdir()
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("there", {}, r"there exists already"),
        ("new", {"model_type": "gpt2"}, r"model_type='gpt2' must be one of llama, "),
        ("new", {"model_type": "llama"}, r"llama has GroupedQueryAttention; this configuration has LatentAttention"),
        ("new", {"max_shard_bytes": 0}, r"max_shard_bytes=0 must be above 0"),
    )
    for path, wishes, line in cases:
        with pytest.raises(ValueError, match=line):
            save(decoder, tmp_path / path, **wishes)
    idle = make(BUILT["mixtral"])
    for module in idle.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias[1] = 0.5
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate.e_score_correction_bias is not 0, and mixtral has no"):
        save(idle, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_save_that_fails_leaves_nothing_and_sweeps_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".saved.tmp-0123").mkdir()
    (tmp_path / ".saved.tmp-0123" / "model.safetensors").write_bytes(b"half")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("workbench.model.pretrained.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save(make(V3), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_progress_counts_the_bytes_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = make(V3)
    save(decoder, tmp_path / "saved", max_shard_bytes=20_000)
    calls: list[tuple[int, int]] = []
    load(tmp_path / "saved", config=V3, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in decoder.state_dict().values())
    assert calls[-1] == (total, total) and {total for _, total in calls} == {total}
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    said = capsys.readouterr()
    assert said.out == "" and said.err == ""


def test_slow_work_draws_a_bar_on_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    advance = progress_bar("loading x", delay_s=0.0)
    for done in (0, 5 * 10**8, 5 * 10**8 + 1, 10**9):
        advance(done, 10**9)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.removesuffix("\n").split("\r")[1:]
    assert [line.count("#") for line in lines] == [0, 12, 25] and lines[-1].endswith("1.00 of 1.00 GB")


def test_files_may_be_links_as_in_a_download_cache(tmp_path: Path) -> None:
    decoder = make(V3)
    save(decoder, tmp_path / "blobs", max_shard_bytes=20_000)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_same(load(tmp_path / "snapshot", config=V3), decoder)


MEASURE = """
import resource, sys, threading, time
from pathlib import Path
import torch
from workbench.model.config import ModelConfig
from workbench.model.pretrained import load

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()

folder = Path(sys.argv[1])
config = ModelConfig.from_json((folder.parent / "ours.json").read_text())
small = load(folder.parent / "small", config=ModelConfig.from_json((folder.parent / "small.json").read_text()))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident()
decoder = load(folder, config=config, dtype=getattr(torch, sys.argv[2]))
peak = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1])
held = sum(t.nbytes for t in decoder.state_dict().values())
print((peak * 1024 - before) / held, held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "shard", "fp8"),
    [
        ("float32", 10**10, False),
        ("float32", 2 * 10**7, False),
        ("bfloat16", 10**10, False),
        ("bfloat16", 10**10, True),
    ],
)
def test_loading_takes_little_more_memory_than_the_model(dtype: str, shard: int, fp8: bool, tmp_path: Path) -> None:
    experts = replace(V3.layers[1].feed_forward, moe_intermediate_size=256, n_routed_experts=16)
    wide = replace(
        V3, hidden_size=512, vocab_size=2000, layers=(V3.layers[0], *[replace(V3.layers[1], feed_forward=experts)] * 4)
    )
    for name, config in (("small", V3), ("ours", wide)):
        (tmp_path / f"{name}.json").write_text(config.to_json())
        save(make(config), tmp_path / name, max_shard_bytes=shard)
    if fp8:
        edit(tmp_path / "ours", all_fp8)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "ours"), dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ratio, held = map(float, done.stdout.split())
    sys.stdout.write(f"peak {ratio:.3f} x {held / 1e6:.0f} MB\n")
    assert held > 5e7 and 0.95 < ratio <= 1.3, (ratio, held)
