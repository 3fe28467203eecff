"""Published configurations: a Hugging Face `config.json` of any known type, and those that come with the workbench."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.model.config import ModelConfig, require
from workbench.model.hf_read.deepseek import deepseek_v2, deepseek_v3, deepseek_v32
from workbench.model.hf_read.deepseek_v4 import deepseek_v4
from workbench.model.hf_read.fields import Fields
from workbench.model.hf_read.neighbours import dots1, glm4_moe, gpt_oss, llama, mixtral, olmoe, qwen2, qwen3_moe

MODEL_TYPES: dict[str, Callable[[Fields], ModelConfig]] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "deepseek_v4": deepseek_v4,
    "kimi_k2": deepseek_v3,
    "glm4_moe": glm4_moe,
    "dots1": dots1,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "llama": llama,
    "qwen2": qwen2,
}


def from_hf(source: Mapping[str, Any] | str | Path) -> ModelConfig:
    """The model that a Hugging Face configuration describes: its fields, a `config.json`, or a folder with one.

    A field that is left out means what the class of this `model_type` in `transformers` 5.23 takes it for, with one
    difference: prediction depths that a file does not state are none (see `deepseek_v3`). Where that class ignores a
    field, so does this. Fields that do not change the model are ignored; one that asks for what is not modelled is
    refused.

    Raises:
        ValueError: one line, naming the file or field, what it says and what is supported.
    """
    plain = source if isinstance(source, Mapping) else read_json(Path(source))
    known = ", ".join(MODEL_TYPES)
    require("model_type" in plain, f"the configuration lacks the field 'model_type'; supported: {known}")
    kind = plain["model_type"]
    require(isinstance(kind, str) and kind in MODEL_TYPES, f"model_type={kind!r} is not supported; supported: {known}")
    return MODEL_TYPES[kind](Fields(plain, f"a configuration of model_type {kind!r}"))


def config(name: str) -> ModelConfig:
    """The published configuration of this name, such as `deepseek-v3`.

    Raises:
        ValueError: there is none; the line lists the names.
    """
    known = config_names()
    require(name in known, f"no published configuration {name!r}; there are: {', '.join(known)}")
    return from_hf(data_folder() / "models" / f"{name}.json")


def config_names() -> tuple[str, ...]:
    """What `config` opens."""
    return tuple(sorted(path.name.removesuffix(".json") for path in (data_folder() / "models").glob("*.json")))


def data_folder() -> Path:
    """Where the published facts lie: in the package as installed from a wheel, else at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "data"


def read_json(path: Path) -> Mapping[str, Any]:
    """The mapping in a JSON file, or in the `config.json` of a folder.

    Raises:
        ValueError: there is no such file, or it holds no mapping.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    require(isinstance(plain, dict), f"{file}: must hold a mapping, not {type(plain).__name__}")
    return plain
