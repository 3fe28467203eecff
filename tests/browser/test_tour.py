"""The tour in a real JupyterLab: a run is watched and steered by keyboard, and the record has all of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from playwright.sync_api import Browser, Locator, expect

from tests.browser.heatmap import check_heatmap
from tests.browser.jupyter import JupyterServer, Lab
from workbench.headless import read
from workbench.record import Controls, Snapshot, Tail

TOUR = Path(__file__).parents[2] / "notebooks" / "00_tour.ipynb"
# Small steps, and more of them than the test has time for.
GIVEN = {"fast": True, "live": True, "steps": 5000}
PATIENCE_SECONDS = 60
Seen = TypeVar("Seen")

TRAINERS = "[t.name for t in __import__('threading').enumerate() if t.name.startswith('run ')]"
# What a cell has shown stays in `Out`, under the number of the cell.
OPEN_VIEWS = "[name for name, shown in Out.items() if getattr(shown, 'widget', None) is not None]"

# JupyterLab draws a figure twice when its room has changed: at once, and again in its new size.
COUNT_DRAWINGS = """(output) => {
    output.drawings = 0;
    output.removeAllListeners('plotly_afterplot');
    output.on('plotly_afterplot', () => { output.drawings += 1; });
}"""


def test_tour(browser: Browser, server: JupyterServer) -> None:
    train, wait = copy_of_the_tour(server.root / "00_tour.ipynb")
    lab = Lab(browser, server, width=1400, height=1400)
    lab.open("00_tour.ipynb")
    lab.hide_side_bar()
    view, page = lab.view("dashboard"), lab.page

    # As a newcomer runs it, all cells at once: everything up to the stop happens while a cell waits for the run.
    lab.execute("notebook:run-all-cells")
    poll(lab, lambda: lab.prompt(train), str.isdigit)
    lab.check_cells()
    lab.show_cell(train)
    record = Tail(server.root / "runs" / "tour-001")

    # The heatmap moves with the training, and its pixels are the recorded loads.
    early_step, early = shown_load(lab, after=0)
    late_step, late = shown_load(lab, after=early_step)
    for step, found in ((early_step, early), (late_step, late)):
        wait_for(lab, record, lambda now, step=step: now.load_step >= step)
        check_heatmap(found, record.load_at(step))
    assert early["rgb"] != late["rgb"]

    # Pause: the record says so and gets no further step, whatever else arrives meanwhile.
    press(lab, "Pause", "Enter")
    paused_at = wait_for(lab, record, lambda now: now.status == "paused").step
    expect(view.locator(".wb-note")).to_have_text("The run is now paused.")
    expect(view.locator(".wb-state")).to_contain_text(f"paused · step {paused_at} of")
    view.get_by_role("textbox", name="Learning rate").focus()
    page.keyboard.type("1.25e-4")
    page.keyboard.press("Enter")
    expect(view.locator(".wb-note")).to_contain_text("From the next step on: learning rate 1.25e-4.")
    now = wait_for(lab, record, lambda now: bool(now.changes))
    assert now.changes == ((paused_at + 1, "learning_rate", 1.25e-4),)
    lab.check_cells()
    assert (now.status, now.step, lab.prompt(wait)) == ("paused", paused_at, "*")

    # Step: one, with the new learning rate; then it stands still again, and the view shows it.
    press(lab, "Step", "Space")
    now = wait_for(lab, record, lambda now: now.step > paused_at and now.status == "paused")
    assert now.step == paused_at + 1
    assert learning_rates(now)[paused_at + 1] == 1.25e-4 != learning_rates(now)[paused_at]
    step, found = shown_load(lab, after=paused_at)
    assert step == paused_at + 1
    check_heatmap(found, record.load_at(step))

    # Resume: on it goes, from the new learning rate.
    press(lab, "Resume", "Enter")
    now = wait_for(lab, record, lambda now: now.step >= paused_at + 3)
    assert now.status == "running"
    assert learning_rates(now)[paused_at + 2] == pytest.approx(1.25e-4, rel=0.01)
    shown_load(lab, after=paused_at + 1)

    # Stop: the view becomes a figure that the notebook can store, and the cell that waited goes on.
    assert lab.prompt(wait) == "*"
    press(lab, "Stop", "Space")
    stopped_at = wait_for(lab, record, lambda now: now.ended)
    assert stopped_at.status == "stopped"
    figure = page.locator(".jp-RenderedPlotly", has_text="tour-001 · dashboard")
    expect(figure).to_be_visible()
    expect(view).to_have_count(0)
    (stored,) = lab.outputs(train)
    assert {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"} <= set(stored["data"])
    assert "application/vnd.jupyter.widget-view+json" not in stored["data"]
    lab.wait_for_cells()
    (waited,) = lab.outputs(wait)
    assert f"stopped after {stopped_at.step} steps" in waited["text"]

    # The figure keeps its height whatever the window does, and follows its width.
    lab.show_cell(train)
    before = size(figure)
    for width, height in ((1400, 1000), (1100, 1000)):
        figure.evaluate(COUNT_DRAWINGS)
        lab.resize(width, height)
        poll(lab, lambda: figure.evaluate("(output) => output.drawings"), lambda drawings: drawings >= 2)
        assert size(figure) == [before[0] - (1400 - width), before[1]]

    # The cell again, and once more while its run goes on: one trainer and one dashboard, the newest.
    first = lab.kernel_value(OPEN_VIEWS)
    lab.run_cell(train)
    expect(view.locator(".wb-title")).to_have_text("tour-002 · dashboard")
    shown_load(lab, after=0)
    assert lab.kernel_value(TRAINERS) == ["run tour-002"]
    (second,) = set(lab.kernel_value(OPEN_VIEWS)) - set(first)
    lab.run_cell(train)
    expect(view.locator(".wb-title")).to_have_text("tour-003 · dashboard")
    shown_load(lab, after=0)
    assert lab.kernel_value(TRAINERS) == ["run tour-003"]
    (third,) = set(lab.kernel_value(OPEN_VIEWS)) - set(first)
    assert third != second
    replaced = Tail(server.root / "runs" / "tour-002").snapshot()
    assert (replaced.status, replaced.message) == ("stopped", "another run was started")

    last = Tail(server.root / "runs" / "tour-003")
    Controls(last.folder).stop()
    wait_for(lab, last, lambda now: now.ended)
    lab.check_cells()
    assert lab.errors == []


def copy_of_the_tour(path: Path) -> tuple[int, int]:
    """The tour with the parameters of this test, and the indices of the cells that train and that wait for it."""
    notebook = read(TOUR)
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    given = "\n".join(f"{name} = {value!r}" for name, value in GIVEN.items())
    notebook.cells.insert(place + 1, new_code_cell(given))
    nbformat.write(notebook, path)
    (train,) = (i for i, cell in enumerate(notebook.cells) if "widgets.dashboard(run" in cell.source)
    (wait,) = (i for i, cell in enumerate(notebook.cells) if cell.source.startswith("await run"))
    return train, wait


def press(lab: Lab, name: str, key: str) -> None:
    """Press a button of the dashboard by keyboard as soon as it can do something."""
    button = lab.view("dashboard").get_by_role("button", name=name)
    expect(button).to_have_attribute("aria-disabled", "false")
    button.focus()
    lab.page.keyboard.press(key)


def shown_load(lab: Lab, *, after: int) -> tuple[int, dict[str, Any]]:
    """The first heatmap seen of a step later than `after`, with that step: title, numbers and pixels of one moment."""
    view = lab.view("dashboard")
    expect(view.locator(".wb-panel-title", has_text="Expert load")).to_have_text(re.compile(r"at step \d+"))

    def look() -> tuple[int, dict[str, Any]]:
        found = lab.heatmap(view)
        return int(found["title"].split()[-1]), found

    return poll(lab, look, lambda seen: seen[0] > after)


def wait_for(lab: Lab, record: Tail, condition: Callable[[Snapshot], bool]) -> Snapshot:
    """What the record says as soon as `condition` holds of it."""
    return poll(lab, record.snapshot, condition)


def poll(lab: Lab, look: Callable[[], Seen], condition: Callable[[Seen], bool]) -> Seen:
    """What `look` sees as soon as `condition` holds of it."""
    until = monotonic() + PATIENCE_SECONDS
    while not condition(seen := look()):
        assert monotonic() < until, f"what was waited for did not come within {PATIENCE_SECONDS} s; last seen: {seen}"
        # The browser's own events are taken in meanwhile.
        lab.page.wait_for_timeout(50)
    return seen


def size(figure: Locator) -> list[float]:
    """Width of a plotly figure's drawing, and height of the output that it is in."""
    return figure.evaluate("(output) => [output.querySelector('.main-svg').clientWidth, output.clientHeight]")


def learning_rates(now: Snapshot) -> dict[int, float]:
    series = now.series["learning_rate"]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
