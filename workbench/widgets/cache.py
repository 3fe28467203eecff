"""How much memory the past takes, with each kind of attention in the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np

from workbench.analysis import cache_table, variants
from workbench.analysis.cache import Precision
from workbench.widgets.axes import number
from workbench.widgets.base import View
from workbench.widgets.content import Frame, StillContent
from workbench.widgets.controls import Choice, Control, Number, parse_count
from workbench.widgets.primitives import Bars, Line, Lines

CONTEXTS = tuple(2**power for power in range(10, 18))
HEADS, LATENT, BATCH, PRECISION = "heads", "latent", "batch", "precision"


def cache(config: Any, live: bool | None = None) -> View:
    """Bytes of the key/value or latent cache against the context length, for MHA, GQA, MQA and MLA.

    `config` is a `ModelConfig`; heads, latent width, batch and precision can be changed when live. For `live` see
    `View`; this view has no end of its own: its menu keeps it as a figure.
    """
    return View(CacheContent(config), live)


class CacheContent(StillContent):
    """The cache of one configuration."""

    def __init__(self, config: Any) -> None:
        self._config = config
        latent = cast(Any, variants(config)["MLA"].layers[0].attention)
        self._defaults = {
            HEADS: str(latent.num_attention_heads),
            LATENT: str(latent.kv_lora_rank),
            BATCH: "1",
            PRECISION: "bfloat16",
        }
        self.key = f"cache:{hash(config)}"

    def picture(self, values: Mapping[str, Any]) -> Frame:
        chosen = self._defaults | {name: str(value) for name, value in values.items()}
        unknown = set(chosen) - set(self._defaults)
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is no control of this view: {', '.join(self._defaults)}")
        heads, latent, batch = (
            parse_count(label, chosen[name])
            for name, label in ((HEADS, "Heads"), (LATENT, "Latent width"), (BATCH, "Batch"))
        )
        if chosen[PRECISION] not in get_args(Precision):
            raise ValueError(f"Precision: {chosen[PRECISION]!r} must be one of {', '.join(get_args(Precision))}")
        return Frame(
            version=1,
            title="Cache size by kind of attention",
            status=f"{heads} heads · latent width {latent} · batch {batch} · {chosen[PRECISION]} · predicted",
            primitives=tuple(cache_primitives(self._config, heads, latent, batch, chosen[PRECISION])),
            controls=self._controls(),
            ended=True,
        )

    def _controls(self) -> tuple[Control, ...]:
        return (
            Number(name=HEADS, label="Heads", value=self._defaults[HEADS]),
            Number(name=LATENT, label="Latent width", value=self._defaults[LATENT]),
            Number(name=BATCH, label="Batch", value=self._defaults[BATCH]),
            Choice(name=PRECISION, label="Precision", options=get_args(Precision), value=self._defaults[PRECISION]),
        )


def cache_primitives(config: Any, heads: int, latent: int, batch: int, precision: str) -> list[Lines | Bars]:
    """What `cache` shows for these settings.

    Raises:
        ValueError: sizes that do not go together, or an unknown precision.
    """
    table = cache_table(
        config,
        CONTEXTS,
        batch_sizes=(batch,),
        precisions=(cast(Precision, precision),),
        num_attention_heads=heads,
        kv_lora_rank=latent,
    )
    by_kind = {str(kind): rows for kind, rows in table.groupby("kind", sort=False)}
    per_token = {kind: int(rows["bytes_per_token"].iloc[0]) for kind, rows in by_kind.items()}
    longest = {kind: int(rows["bytes"].iloc[-1]) for kind, rows in by_kind.items()}
    words = ", ".join(f"{kind} {number(size, 'bytes')}" for kind, size in longest.items())
    return [
        Lines(
            title="Cache against context length",
            x_label="context (tokens per sequence, k = 1024)",
            y_label="bytes of the whole batch (1 KiB = 1024 bytes)",
            x_scale="log2",
            y_scale="log2",
            x_unit="context",
            y_unit="bytes",
            lines=tuple(
                Line(
                    name=kind,
                    label=f"{kind}  {number(longest[kind], 'bytes', 3)}",
                    x=rows["context"].to_numpy(),
                    y=rows["bytes"].to_numpy(),
                    color=index,
                    points=True,
                )
                for index, (kind, rows) in enumerate(by_kind.items())
            ),
            summary=f"At {number(CONTEXTS[-1], 'context')} tokens: {words}.",
            span=7,
        ),
        Bars(
            title="One token of one sequence",
            x_label="bytes in all layers",
            y_label="attention",
            names=tuple(per_token),
            values=np.array(list(per_token.values()), dtype=np.float64),
            notes=tuple(
                "" if kind == "MHA" else f"{100 * size / per_token['MHA']:.3g} % of MHA"
                for kind, size in per_token.items()
            ),
            x_unit="bytes",
            summary=", ".join(f"{kind} {number(size, 'bytes')}" for kind, size in per_token.items()) + ".",
            span=5,
        ),
    ]
