"""The life of a view: displayed once, pulled, steered, replaced by its static form at the end, closed on a re-run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display

from tests.browser import recorded
from tests.test_widgets_views import config
from workbench.record import Controls, RunWriter, Snapshot, Tail
from workbench.widgets import View, cache, dashboard, routing
from workbench.widgets.base import Canvas

WIDGET = "application/vnd.jupyter.widget-view+json"
STATIC = {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"}


@pytest.fixture
def screen() -> Iterator[list[dict[str, Any]]]:
    """Everything that is displayed."""
    shell = InteractiveShell.instance()
    publisher = CapturingDisplayPublisher()
    shell.display_pub = publisher
    yield publisher.outputs
    InteractiveShell.clear_instance()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[bytes]]]:
    """Everything that a widget sends to its front end."""
    messages: list[tuple[dict[str, Any], list[bytes]]] = []
    monkeypatch.setattr(Canvas, "send", lambda self, content, buffers=None: messages.append((content, buffers or [])))
    return messages


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RunWriter]:
    writer = recorded.create(tmp_path / "run-001")
    writer.status("running")
    recorded.write_steps(writer, 1, 60)
    yield writer
    writer.close()


class InProcess:
    """A run of this process, as `live.Run` offers it to views."""

    live = True

    def __init__(self, writer: RunWriter) -> None:
        self.writer = writer
        self.callbacks: list[Any] = []

    @property
    def folder(self) -> Path:
        return self.writer.folder

    def snapshot(self) -> Snapshot:
        return self.writer.history.snapshot()

    def load_at(self, step: int) -> np.ndarray:
        return self.writer.load_at(step)

    def on_end(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def end(self) -> None:
        """Finish on another thread, as a trainer does."""

        def finish() -> None:
            self.writer.status("finished")
            for callback in self.callbacks:
                callback()

        thread = threading.Thread(target=finish)
        thread.start()
        thread.join()


def ask(view: View, kind: str, **fields: Any) -> None:
    """What the front end does: one custom message."""
    assert view.widget is not None
    view.widget._handle_custom_msg({"kind": kind, "view": "front", "values": {}, "stamp": "{}", **fields}, [])


def test_static_is_displayed_once_and_makes_no_widget(
    writer: RunWriter, screen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Canvas, "__init__", lambda self: pytest.fail("a widget was made"))
    view = routing(writer.folder, live=False)
    display(view)
    writer.status("finished")
    view.bundle()
    assert len(screen) == 1
    assert set(screen[0]["data"]) == STATIC
    assert not screen[0].get("update")


def test_without_a_kernel_the_default_is_static(writer: RunWriter) -> None:
    assert not routing(writer.folder).live


def test_live_is_a_widget_and_words(writer: RunWriter, screen: list[dict[str, Any]]) -> None:
    view = routing(writer.folder, live=True)
    display(view)
    assert set(screen[0]["data"]) == {WIDGET, "text/plain"}
    assert screen[0]["data"]["text/plain"].startswith("run-001 · routing: running · step 60 of 300")
    view.close()


def test_a_pull_gets_the_newest_frame_and_then_the_same(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]
) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    ask(view, "pull", have=None)
    frame, buffers = sent.pop()
    assert (frame["kind"], frame["view"], frame["stamp"], frame["still"]) == ("frame", "front", "{}", False)
    header = frame["panels"][0]
    loads = np.frombuffer(buffers[header["detail"]], "<i4").reshape(header["rows"], header["columns"])
    np.testing.assert_array_equal(loads, Tail(writer.folder).load_at(60))
    ask(view, "pull", have=frame["version"])
    assert sent.pop() == ({"view": "front", "kind": "same"}, [])
    recorded.write_steps(writer, 61, 61)
    ask(view, "pull", have=frame["version"])
    newer, buffers = sent.pop()
    assert newer["version"] != frame["version"] and "step 61" in newer["panels"][0]["title"]
    view.close()


def test_the_very_buffer_of_a_replayed_step(writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]) -> None:
    view = dashboard(writer.folder, live=True)
    view.show()
    for step in (7, 42, 7):
        ask(view, "pull", have=None, values={"step": step})
        frame, buffers = sent.pop()
        header = next(panel for panel in frame["panels"] if panel["kind"] == "heatmap")
        loads = np.frombuffer(buffers[header["detail"]], "<i4").reshape(header["rows"], header["columns"])
        np.testing.assert_array_equal(loads, Tail(writer.folder).load_at(step))
        values = np.frombuffer(buffers[header["values"]], "<f4").reshape(loads.shape)
        np.testing.assert_allclose(values, loads / loads.mean(1, keepdims=True), rtol=1e-6)
    view.close()


def test_what_cannot_be_shown_is_one_line(writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    ask(view, "pull", have=None, values={"step": 999})
    note, _ = sent.pop()
    assert note["kind"] == "note" and note["answers"] == "pull" and "step 999" in note["text"]
    view.close()


def test_the_end_on_another_thread_replaces_every_output(writer: RunWriter, screen: list[dict[str, Any]]) -> None:
    run = InProcess(writer)
    view = routing(run, live=True)
    view.show()
    view.show()
    run.end()
    assert [bool(output.get("update")) for output in screen] == [False, False, True, True]
    for first, last in zip(screen[:2], screen[2:], strict=True):
        assert set(last["data"]) == STATIC
        assert last["transient"]["display_id"] == first["transient"]["display_id"]
        assert "finished" in last["data"]["text/plain"]
    assert view.widget is None and not view.live


def test_a_tail_that_sees_the_end_settles_without_an_answer(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]
) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    writer.status("finished")
    ask(view, "pull", have=None)
    assert not sent
    assert set(screen[-1]["data"]) == STATIC and screen[-1]["update"]


def test_an_ended_run_stays_live_for_replay_until_it_is_kept(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]
) -> None:
    writer.status("finished")
    view = routing(writer.folder, live=True)
    view.show()
    ask(view, "pull", have=None, values={"step": 5})
    assert set(screen[0]["data"]) == {WIDGET, "image/svg+xml", "text/plain"}, "nothing else would show it later"
    frame, _ = sent.pop()
    assert frame["still"] and "step 5" in frame["panels"][0]["title"]
    ask(view, "keep", values={"step": 5})
    assert set(screen[-1]["data"]) == STATIC
    assert "Expert load at step 5" in screen[-1]["data"]["text/plain"]


def test_running_the_cell_again_closes_the_view_before(writer: RunWriter, screen: list[dict[str, Any]]) -> None:
    run = InProcess(writer)
    first, second = routing(run, live=True), routing(run, live=True)
    other = dashboard(run, live=True)
    for view in (first, other, second):
        view.show()
    assert first.widget is None and second.widget is not None and other.widget is not None
    run.end()
    # The closed one is not touched again: two updates, of the second and of the other kind of view.
    assert sum(bool(output.get("update")) for output in screen) == 2


def test_a_closed_view_answers_nothing(writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    widget = view.widget
    assert widget is not None
    view.close()
    widget._handle_custom_msg({"kind": "pull", "view": "front", "values": {}}, [])
    assert not sent


def test_buttons_are_rows_in_the_record(writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]) -> None:
    view = dashboard(writer.folder, live=True)
    view.show()
    for action in ("pause", "step", "resume", "stop"):
        ask(view, "act", action=action, given={})
    ask(view, "act", action="set", given={"learning_rate": " 2e-4 ", "balance_speed": ""})
    pending = Controls(writer.folder).pending()
    assert [control.kind for control in pending] == ["pause", "step", "resume", "stop", "set"]
    assert pending[-1].change is not None
    assert (pending[-1].change.learning_rate, pending[-1].change.balance_speed) == (2e-4, None)
    assert [message["kind"] for message, _ in sent] == ["note"] * 5
    assert sent[-1][0]["text"] == "From the next step on: learning rate 2e-4."
    view.close()


@pytest.mark.parametrize(
    ("action", "given", "line"),
    [
        ("set", {"learning_rate": "fast", "balance_speed": ""}, "Learning rate: 'fast' is not a number"),
        ("set", {"learning_rate": "-1", "balance_speed": ""}, "learning_rate=-1.0 must be"),
        ("set", {"learning_rate": "", "balance_speed": " "}, "type a learning rate or a balance speed"),
        ("set", {"learning_rate": "nan"}, "must be a finite number"),
        ("explode", {}, "no action 'explode'"),
    ],
)
def test_bad_input_is_one_line_and_no_row(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any], action: str, given: dict[str, str], line: str
) -> None:
    view = dashboard(writer.folder, live=True)
    view.show()
    ask(view, "act", action=action, given=given)
    assert line in sent[-1][0]["text"] and "\n" not in sent[-1][0]["text"]
    assert Controls(writer.folder).pending() == ()
    view.close()


def test_a_view_without_controls_steers_nothing(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]
) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    ask(view, "act", action="stop", given={})
    assert "no action 'stop'" in sent[-1][0]["text"]
    assert Controls(writer.folder).pending() == ()
    view.close()


@pytest.mark.parametrize(
    ("status", "enabled"),
    [
        ("running", {"pause", "stop", "set"}),
        ("paused", {"resume", "step", "stop", "set"}),
        ("finished", set()),
    ],
)
def test_buttons_follow_the_run_and_say_why_not(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any], status: str, enabled: set[str]
) -> None:
    writer.status(status)
    view = dashboard(writer.folder, live=True)
    view.show()
    ask(view, "pull", have=None)
    actions = {control["name"]: control for control in sent[-1][0]["controls"] if control["kind"] == "action"}
    assert {name for name, control in actions.items() if control["enabled"]} == enabled
    assert all(status in control["why"] for control in actions.values())
    slider = next(control for control in sent[-1][0]["controls"] if control["kind"] == "slider")
    assert (slider["minimum"], slider["maximum"], slider["value"]) == (1, 60, None)
    view.close()


@pytest.mark.parametrize(
    ("recipe", "experts", "fields"),
    [
        ('{"balance": {"kind": "LossFreeBias"}}', 8, ["learning_rate", "balance_speed"]),
        ('{"balance": {"kind": "AuxiliaryLoss"}}', 8, ["learning_rate"]),
        ('{"balance": {"kind": "LossFreeBias"}}', 0, ["learning_rate"]),
    ],
    ids=["bias", "loss", "no experts"],
)
def test_a_field_is_there_only_where_it_acts(
    tmp_path: Path, screen: list[dict[str, Any]], sent: list[Any], recipe: str, experts: int, fields: list[str]
) -> None:
    layers = ("layer 1",) if experts else ()
    about = {"text_fingerprint": "0" * 64, "layer_names": layers, "num_experts": experts, "hardware": {}}
    writer = RunWriter.create(tmp_path / "run", recipe_json=recipe, seed=0, total_steps=9, **about)
    writer.status("running")
    view = dashboard(writer.folder, live=True)
    view.show()
    ask(view, "pull", have=None)
    apply = next(control for control in sent[-1][0]["controls"] if control["name"] == "set")
    assert [field["name"] for field in apply["fields"]] == fields
    if "balance_speed" not in fields:
        ask(view, "act", action="set", given={"balance_speed": "1e-3"})
        assert "it has no balance_speed to set" in sent[-1][0]["text"]
        assert not Controls(writer.folder).pending()
    view.close()
    writer.close()


@pytest.mark.parametrize(
    ("form", "name", "beginning"),
    [
        ("csv", "run-001_routing.csv", b"panel,"),
        ("svg", "run-001_routing.svg", b"<?xml"),
        ("html", "run-001_routing.html", b"<!doctype"),
    ],
)
def test_exports(
    writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any], form: str, name: str, beginning: bytes
) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    ask(view, "export", format=form, values={"step": 9})
    answer, buffers = sent.pop()
    assert answer["kind"] == "file" and answer["name"] == name
    assert buffers[0].startswith(beginning) and b"step 9" in buffers[0]
    ask(view, "export", format="exe")
    assert "must be svg, csv or html" in sent.pop()[0]["text"]
    view.close()


def test_the_data_table_has_the_exact_numbers(writer: RunWriter, screen: list[dict[str, Any]], sent: list[Any]) -> None:
    view = routing(writer.folder, live=True)
    view.show()
    ask(view, "data", values={"step": 9})
    tables = sent.pop()[0]["tables"]
    assert tables[0]["columns"] == ["layer", "expert", "× the layer's mean", "tokens"]
    assert [int(row[3]) for row in tables[0]["rows"]] == recorded.load(9).ravel().tolist()
    view.close()


def test_cache_is_drawn_anew_only_for_new_settings(screen: list[dict[str, Any]], sent: list[Any]) -> None:
    view = cache(config(), live=True)
    view.show()
    assert screen[0]["data"]["image/svg+xml"].startswith("<?xml")
    ask(view, "pull", have=None)
    first = sent.pop()[0]
    assert first["still"]
    ask(view, "pull", have=first["version"])
    assert sent.pop()[0]["kind"] == "same"
    ask(view, "pull", have=None, values={"heads": "4", "latent": "32", "batch": "2", "precision": "float8"})
    assert "4 heads" in sent.pop()[0]["status"]
    ask(view, "pull", have=None, values={"heads": "x"})
    assert "is not a number" in sent.pop()[0]["text"]
    ask(view, "keep", values={"heads": "4"})
    assert "4 heads" in screen[-1]["data"]["text/plain"]
