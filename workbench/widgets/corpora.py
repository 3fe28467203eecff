"""Which experts take which corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from workbench.analysis import DocumentRouting, load_fractions, specialization
from workbench.widgets.base import View
from workbench.widgets.content import Frame, StillContent
from workbench.widgets.primitives import Bars, Heatmap, Primitive
from workbench.widgets.routing import HIGHEST_COLOR, Z_TICKS


def corpora(documents: DocumentRouting) -> View:
    """One heatmap of relative load per corpus, and how far the corpora differ in each layer. A figure, never live."""
    return View(CorporaContent(documents), live=False)


class CorporaContent(StillContent):
    """What one model did with one set of documents; it does not change."""

    def __init__(self, documents: DocumentRouting) -> None:
        self.key = f"corpora:{id(documents)}"
        self._documents = documents

    def picture(self, values: Mapping[str, Any]) -> Frame:
        names = dict.fromkeys(self._documents.labels)
        return Frame(
            version=1,
            title="What each corpus asks of the experts",
            status=f"{len(self._documents.labels)} validation documents of {', '.join(names)} · measured",
            primitives=tuple(corpora_primitives(self._documents)),
            ended=True,
        )


def corpora_primitives(documents: DocumentRouting) -> list[Primitive]:
    """What `corpora` shows of these documents."""
    shown: list[Primitive] = []
    loads = documents.by_corpus()
    for name, load_LE in loads.items():
        relative_LE = np.nan_to_num(load_fractions(load_LE) * load_LE.shape[1])
        layer, expert = np.unravel_index(relative_LE.argmax(), relative_LE.shape)
        shown.append(
            Heatmap(
                title=f"Expert load on {name}",
                x_label="routed expert",
                y_label="layer",
                z_label="× the layer's mean",
                values_PQ=relative_LE,
                row_names=documents.layer_names,
                column_name="expert",
                low=0.0,
                high=HIGHEST_COLOR,
                z_ticks=Z_TICKS,
                detail_PQ=load_LE,
                detail_label="tokens",
                span=6,
                summary=(
                    f"On {name}, expert {expert} of {documents.layer_names[layer]} is the busiest: "
                    f"{relative_LE.max():.3g} times its layer's mean."
                ),
            )
        )
    if len(loads) > 1:
        difference_L = specialization(loads)
        shown.append(
            Bars(
                title="How far the corpora differ",
                x_label="Jensen-Shannon divergence of their loads (nats)",
                y_label="layer",
                names=documents.layer_names,
                values=difference_L,
                notes=("",) * len(difference_L),
                summary=f"The corpora differ by {difference_L.mean():.3g} nats on average over the layers.",
                span=6,
            )
        )
    return shown
