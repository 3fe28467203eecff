"""What a view shows equals what the record holds; names and settings that make no sense are refused or harmless."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.browser import recorded
from workbench.analysis import cache_table, max_violation
from workbench.model.config import DenseFeedForward, LatentAttention, LayerConfig, ModelConfig
from workbench.record import Controls, RunWriter, Tail
from workbench.widgets import Bars, Heatmap, Lines, Table, cache, curves, dashboard, live, routing


@pytest.fixture
def writer(tmp_path: Path):
    writer = recorded.create(tmp_path / "run-001")
    writer.status("running")
    writer.write(recorded.evaluation(0))
    recorded.write_steps(writer, 1, 160)
    yield writer
    writer.close()


def config(layers: int = 4) -> ModelConfig:
    attention = LatentAttention(
        num_attention_heads=8, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    layer = LayerConfig(attention=attention, feed_forward=DenseFeedForward(intermediate_size=64))
    return ModelConfig(vocab_size=256, hidden_size=64, layers=(layer,) * layers)


def shown_loads(heatmap: Heatmap) -> np.ndarray:
    """The counts in the very bytes that the front end gets."""
    headers, arrays = live.encode([heatmap])
    index = headers[0]["detail"]
    assert arrays.types[index] == "i4"
    return np.frombuffer(arrays.buffers[index], dtype="<i4").reshape(headers[0]["rows"], headers[0]["columns"])


@pytest.mark.parametrize("step", [1, 39, 160])
def test_routing_at_a_step_is_what_the_record_holds(writer: RunWriter, step: int) -> None:
    view = routing(writer.folder)
    grid, imbalance = view.primitives(step=step)
    assert isinstance(grid, Heatmap) and isinstance(imbalance, Bars)
    held = Tail(writer.folder).load_at(step)
    np.testing.assert_array_equal(held, recorded.load(step))
    np.testing.assert_array_equal(shown_loads(grid), held)
    np.testing.assert_allclose(grid.values_PQ, held / held.mean(1, keepdims=True))
    np.testing.assert_allclose(imbalance.values, max_violation(held))
    assert f"step {step}" in grid.title
    assert grid.row_names == recorded.layer_names()


def test_routing_without_a_step_is_the_newest(writer: RunWriter) -> None:
    view = routing(writer.folder)
    np.testing.assert_array_equal(shown_loads(view.primitives()[0]), recorded.load(160))  # type: ignore[arg-type]
    recorded.write_steps(writer, 161, 170)
    np.testing.assert_array_equal(shown_loads(view.primitives()[0]), recorded.load(170))  # type: ignore[arg-type]


def test_dead_experts_are_marked_and_counted(writer: RunWriter) -> None:
    grid, imbalance = routing(writer.folder).primitives(step=5)
    assert isinstance(grid, Heatmap) and isinstance(imbalance, Bars) and grid.marked_PQ is not None
    dead = recorded.load(5) < 0.01 * recorded.load(5).mean(1, keepdims=True)
    assert dead[-1, 3]
    np.testing.assert_array_equal(grid.marked_PQ, dead)
    assert imbalance.notes[-1] == f"{dead[-1].sum()} dead"
    assert f"{dead.sum()} of {dead.size} experts are dead" in grid.summary


@pytest.mark.parametrize(
    ("step", "line"), [(999, "no load of step 999"), ("7", "must be a whole number"), (True, "must be a whole number")]
)
def test_a_step_that_is_not_there_is_one_line(writer: RunWriter, step: object, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        routing(writer.folder).primitives(step=step)
    assert "\n" not in str(caught.value)


def test_curves_show_the_record_and_label_every_floor(writer: RunWriter) -> None:
    writer.write(recorded.step_event(161))
    writer.flush()
    snapshot = Tail(writer.folder).snapshot()
    loss, terms, rate = curves(writer.folder).primitives()
    assert isinstance(loss, Lines) and isinstance(terms, Lines) and isinstance(rate, Lines)
    lines = {line.name: line for line in loss.lines}
    np.testing.assert_array_equal(lines["training, each step"].y, snapshot.series["nats_per_byte"].values)
    assert lines["training, each step"].faint and not lines["training"].faint
    np.testing.assert_array_equal(lines["validation"].x, [0, 50, 100, 150])
    np.testing.assert_array_equal(lines["validation"].y, [e.nats_per_byte for e in snapshot.evaluations])
    assert {(r.name.split()[0], r.y) for r in loss.references} == set(recorded.FLOORS.items())
    labels = [label["text"] for label in live.encode([loss])[0][0]["labels"]]
    assert {"uniform 5.54", "unigram 3.31", "bigram 2.45"} <= set(labels)
    assert [line.name for line in terms.lines] == ["next token", "MTP 1", "balance", "z"]
    assert {(r.name.split()[0], r.y) for r in terms.references} == set(recorded.TOKEN_FLOORS.items())
    np.testing.assert_array_equal(rate.lines[0].y, snapshot.series["learning_rate"].values)


def test_curves_mark_spikes_and_changes(writer: RunWriter) -> None:
    controls = Controls(writer.folder)
    controls.set(learning_rate=1e-3)
    controls.applied(controls.pending()[0].id, 161)
    loss, _, rate = curves(writer.folder).primitives()
    assert isinstance(loss, Lines) and isinstance(rate, Lines)
    marked = {(marker.kind, marker.x) for marker in loss.markers}
    assert marked == {("spike", 150), ("change", 161)}
    spike = next(marker for marker in loss.markers if marker.kind == "spike")
    assert spike.y == recorded.step_event(150).nats_per_byte
    assert [marker.label for marker in rate.markers] == ["learning rate → 0.001"]


def test_the_dashboard_is_all_of_it(writer: RunWriter) -> None:
    found = dashboard(writer.folder).primitives(step=3)
    assert [type(primitive) for primitive in found] == [Lines, Heatmap, Bars, Lines, Lines, Table]
    np.testing.assert_array_equal(shown_loads(found[1]), recorded.load(3))  # type: ignore[arg-type]
    table = found[5]
    assert isinstance(table, Table)
    rows = {row[0]: row for row in table.cells()}
    assert rows["token 2 ahead (MTP 1)"][1:] == ["31.0% right", "counting 22.0%"]
    assert "bigram floor" in rows and "stdlib_code" in rows
    assert rows["stdlib_code, training part"][1:] == ["read 1.60 times", "⚠ repeats: it may be memorised"]
    assert table.summary.endswith("Read more than once: stdlib_code.")


def test_text_that_was_not_read_through_is_no_warning(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path / "run-001")
    recorded.write_steps(writer, 1, 99)
    table = dashboard(writer.folder).primitives()[-1]
    writer.close()
    assert isinstance(table, Table)
    assert ["stdlib_code, training part", "read 0.99 times", ""] in [list(row) for row in table.cells()]
    assert "Read more than once" not in table.summary


def test_a_run_without_a_step_yet(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path / "run-001")
    stored = dashboard(writer.folder).bundle()
    assert "No step recorded yet." in stored["text/plain"]
    writer.close()


def test_a_model_without_experts(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path / "run-001", layers=0, experts=0)
    recorded.write_steps(writer, 1, 3, layers=0, experts=0)
    assert "This model routes nothing" in dashboard(writer.folder).bundle()["text/plain"]
    writer.close()


def test_one_step_is_enough_for_every_view(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path / "run-001")
    recorded.write_steps(writer, 1, 1)
    assert "step 1" in dashboard(writer.folder).bundle()["text/plain"]
    writer.close()


def test_names_of_runs_and_corpora_are_data(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    writer = recorded.create(tmp_path / "run-001")
    recorded.write_steps(writer, 1, 50, corpus=evil)
    writer.close()
    # The record takes no such name, but anyone can rename a folder.
    folder = writer.folder.rename(tmp_path / evil)
    stored = dashboard(folder).bundle()
    assert evil in stored["text/plain"]
    assert "<img" not in stored["image/svg+xml"] and "&lt;img" in stored["image/svg+xml"]
    figure = json.dumps(stored["application/vnd.plotly.v1+json"])
    assert "<img" not in figure and "&lt;img" in figure


def test_no_run_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        curves(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


def test_cache_shows_the_table_of_the_analysis() -> None:
    chart, tokens = cache(config()).primitives(heads=4, latent="16", batch=3, precision="float32")
    assert isinstance(chart, Lines) and isinstance(tokens, Bars)
    table = cache_table(
        config(),
        [1024, 131072],
        batch_sizes=(3,),
        precisions=("float32",),
        num_attention_heads=4,
        kv_lora_rank=16,
    )
    for line in chart.lines:
        rows = table.query("kind == @line.name")
        assert [line.y[0], line.y[-1]] == list(rows["bytes"])
        assert tokens.values[tokens.names.index(line.name)] == rows["bytes_per_token"].iloc[0]
    assert [line.name for line in chart.lines] == ["MHA", "GQA", "MQA", "MLA"]


def test_cache_starts_from_the_configuration() -> None:
    text = cache(config(), live=False).bundle()["text/plain"]
    assert "8 heads · latent width 32 · batch 1 · bfloat16" in text


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"heads": "many"}, "Heads: 'many' is not a number"),
        ({"heads": 0}, "Heads: '0' must be a whole number"),
        ({"latent": 1.5}, "Latent width: '1.5' must be a whole number"),
        ({"batch": "inf"}, "Batch: 'inf' must be a finite number"),
        ({"precision": "float3"}, "float3"),
        ({"colour": 1}, "'colour' is no control of this view"),
    ],
)
def test_bad_cache_settings_are_one_line(values: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        cache(config()).primitives(**values)
    assert "\n" not in str(caught.value)
