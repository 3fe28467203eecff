"""Train small mixture-of-experts language models and watch every part of them at work.

One letter per axis, the same everywhere; a tensor in the code is called `meaning_LETTERS`:

    B  sequences                    D  model width              E  routed experts
    T  query positions              H  query heads              A  active experts per token
    S  key positions                G  key/value heads          F  expert hidden width
    N  flattened tokens             K  query/key head width     M  prediction depth
    1  a kept axis                  U  value head width         V  vocabulary
                                    R  rotary width             L  layers
                                    C  latent width             J  expert groups
    W  recorded steps               O  residual streams         I  experts per group
    P  rows of a picture            Q  columns of a picture     X  several axes in one
    Y  keys that a query selects    Z  tokens pooled into one

Inside `workbench_kernels`, matrix products keep BLAS's M, N, K.

The way of the data, one direction only: text -> blocks -> model -> train -> record -> live -> analysis -> widgets ->
notebooks. Rooms and the names below load when they are first used, so that `import workbench` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import analysis as analysis
    from workbench import blocks as blocks
    from workbench import headless as headless
    from workbench import live as live
    from workbench import model as model
    from workbench import record as record
    from workbench import text as text
    from workbench import train as train
    from workbench import widgets as widgets
    from workbench.doctor import examine
    from workbench.model.config import ModelConfig as ModelConfig
    from workbench.model.decoder import Decoder as Decoder
    from workbench.model.published import config as config
    from workbench.text import Files as Files
    from workbench.text import Mixture as Mixture
    from workbench.text import StdlibCode as StdlibCode
    from workbench.text import StdlibProse as StdlibProse
    from workbench.train.recipes import Recipe as Recipe
    from workbench.train.recipes import small_v3 as small_v3
    from workbench.train.recipes import toy_v3 as toy_v3

    __version__: str
    doctor = examine

_ROOMS = ("analysis", "blocks", "doctor", "headless", "live", "model", "record", "text", "train", "widgets")
_HOME = {
    "Decoder": "workbench.model.decoder",
    "Files": "workbench.text",
    "Mixture": "workbench.text",
    "ModelConfig": "workbench.model.config",
    "Recipe": "workbench.train.recipes",
    "StdlibCode": "workbench.text",
    "StdlibProse": "workbench.text",
    "config": "workbench.model.published",
    "small_v3": "workbench.train.recipes",
    "toy_v3": "workbench.train.recipes",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("moe-workbench")
    if name in _ROOMS:
        return importlib.import_module(f"workbench.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"__version__", *_ROOMS, *_HOME})
