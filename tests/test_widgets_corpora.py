"""The figure of what each corpus asks of the experts shows exactly the loads that it was given."""

from __future__ import annotations

import numpy as np
import pytest

from workbench import widgets
from workbench.analysis import DocumentRouting
from workbench.widgets import Bars, Heatmap


def routing(labels: tuple[str, ...] = ("code", "prose", "code")) -> DocumentRouting:
    load = np.array([[[6, 2], [4, 4]], [[1, 3], [0, 4]], [[2, 6], [8, 0]]])
    return DocumentRouting(layer_names=("layer 1", "mtp 1"), labels=labels, load=load, indices={})


def test_each_corpus_has_a_heatmap_of_its_own_documents() -> None:
    code, prose, difference = widgets.corpora(routing()).primitives()
    assert isinstance(code, Heatmap) and isinstance(prose, Heatmap) and isinstance(difference, Bars)
    np.testing.assert_allclose(code.values_PQ, [[1, 1], [1.5, 0.5]])
    np.testing.assert_array_equal(prose.detail_PQ, [[1, 3], [0, 4]])
    assert "expert 1 of mtp 1 is the busiest: 2 times" in prose.summary
    assert difference.values[1] > difference.values[0] > 0


def test_one_corpus_is_compared_with_nothing() -> None:
    assert len(widgets.corpora(routing(("code",) * 3)).primitives()) == 1


def test_it_is_a_figure_without_a_widget_and_escapes_names() -> None:
    view = widgets.corpora(routing(("<img src=x onerror=alert(1)>", "prose", "prose")))
    bundle = view.bundle()
    assert not view.live and "<img" not in bundle["image/svg+xml"]
    with pytest.raises(ValueError, match="no action"):
        view._content.act("pause", {})
