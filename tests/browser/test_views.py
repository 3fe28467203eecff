"""The views in a real JupyterLab: drawn from the record, operated by keyboard, static at the end, in both themes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import recorded
from tests.browser.heatmap import check_heatmap
from tests.browser.jupyter import JupyterServer, Lab, write_notebook
from workbench.record import Controls, RunWriter

CELLS = (
    "from workbench.widgets import cache, dashboard\ndashboard('runs/run-001')",
    "from workbench.train.recipes import toy_v3\ncache(toy_v3().model, live=True)",
)


@pytest.fixture
def writer(server: JupyterServer) -> Iterator[RunWriter]:
    """A run that this process writes and the notebook watches by its path."""
    writer = recorded.create(server.root / "runs" / "run-001")
    writer.status("running")
    writer.write(recorded.evaluation(0))
    recorded.write_steps(writer, 1, 30)
    yield writer
    writer.close()


def test_dashboard(browser: Browser, server: JupyterServer, writer: RunWriter, tmp_path: Path) -> None:
    write_notebook(server.root / "views.ipynb", *CELLS)
    lab = Lab(browser, server, width=1400, height=1500)
    lab.open("views.ipynb")
    lab.hide_side_bar()
    lab.run_all()
    view, page = lab.view("dashboard"), lab.page

    # The pixels are the colours of the recorded loads, and change with them.
    wait_for_step(lab, 30)
    before = check_step(lab, 30)
    recorded.write_steps(writer, 31, 60)
    wait_for_step(lab, 60)
    assert check_step(lab, 60) != before

    # The slider by keyboard: one step back is the load of that step; End follows the newest again.
    slider = view.get_by_label("Step shown")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    wait_for_step(lab, 59)
    check_step(lab, 59)
    expect(slider).to_have_attribute("aria-valuetext", "59")
    page.keyboard.press("End")
    wait_for_step(lab, 60)
    expect(slider).to_have_attribute("aria-valuetext", "newest (60)")

    # A cell under the arrow keys tells its exact numbers.
    canvas = view.locator(".wb-panel", has_text="Expert load").locator("canvas")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    tip = view.locator(".wb-tip:visible")
    expect(tip).to_contain_text("layer 2, expert 1")
    expect(tip).to_contain_text(f"{recorded.load(60)[1, 1]} tokens")

    # Buttons by keyboard are rows in the record; a bad number is one line and no row.
    view.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Enter")
    expect(view.locator(".wb-note")).to_contain_text("stands still")
    view.get_by_role("textbox", name="Learning rate").fill("fast")
    page.keyboard.press("Enter")
    expect(view.locator(".wb-note")).to_contain_text("'fast' is not a number")
    view.get_by_role("textbox", name="Learning rate").fill("2e-4")
    view.get_by_role("button", name="Apply").press("Space")
    expect(view.locator(".wb-note")).to_contain_text("learning rate 2e-4")
    expect(view.get_by_role("textbox", name="Learning rate")).to_have_value("")
    pending = Controls(writer.folder).pending()
    assert [control.kind for control in pending] == ["pause", "set"]
    writer.status("paused")
    expect(view.locator(".wb-note")).to_have_text("The run is now paused.")
    expect(view.get_by_role("button", name="Pause")).to_have_attribute("aria-disabled", "true")

    # The table behind the picture, and a file of it.
    view.get_by_role("button", name="Data").press("Enter")
    expect(view.get_by_role("region", name="Expert load at step 60").locator("tbody tr")).to_have_count(64)
    view.get_by_role("button", name="Data").press("Enter")
    with page.expect_download() as download:
        view.locator("summary").press("Enter")
        view.get_by_role("button", name="CSV table").press("Enter")
    assert "Expert load at step 60" in Path(download.value.path()).read_text()
    with page.expect_download() as download:
        view.locator("summary").press("Enter")
        view.get_by_role("button", name="PNG image").press("Enter")
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")

    # Both themes at both widths: nothing leaves the view at its sides.
    for dark in (False, True):
        lab.theme(dark)
        for width in (1400, 700):
            lab.resize(width, 1500)
            lab.screenshot(tmp_path / f"{'dark' if dark else 'light'}-{width}.png")
            assert view.evaluate("(v) => v.scrollWidth <= v.clientWidth")
    lab.theme(False)
    lab.resize(1400, 1500)

    # The end of the run: the static figure takes the place of the widget, and the notebook stores no widget.
    recorded.write_steps(writer, 61, 62)
    writer.status("finished")
    page.locator(".js-plotly-plot").first.wait_for()
    expect(view).to_have_count(0)
    (stored,) = lab.outputs(0)
    assert "application/vnd.jupyter.widget-view+json" not in stored["data"]
    assert {"application/vnd.plotly.v1+json", "image/svg+xml", "text/plain"} <= set(stored["data"])

    # The other view of the notebook: settings by keyboard, a bad one is one line.
    # Tall enough for both: JupyterLab takes cells far below the window out of the page.
    lab.resize(1400, 3000)
    sizes = lab.view("Cache size")
    sizes.get_by_role("textbox", name="Heads").fill("none")
    page.keyboard.press("Enter")
    expect(sizes.locator(".wb-note")).to_contain_text("'none' is not a number")
    sizes.get_by_role("textbox", name="Heads").fill("4")
    page.keyboard.press("Enter")
    sizes.get_by_label("Precision").select_option("float8")
    expect(sizes.locator(".wb-state")).to_contain_text("4 heads")
    expect(sizes.locator(".wb-state")).to_contain_text("float8")
    assert lab.errors == []


def wait_for_step(lab: Lab, step: int) -> None:
    expect(lab.view("dashboard").locator(".wb-panel-title", has_text="Expert load")).to_have_text(
        f"Expert load at step {step}"
    )


def check_step(lab: Lab, step: int) -> list[list[int]]:
    """The values behind the canvas and the colours on it are those of the recorded load; the colours are returned."""
    # A frame is drawn at once with the title, so the pixels are there when the title is.
    found = lab.heatmap(lab.view("dashboard"))
    check_heatmap(found, recorded.load(step))
    return found["rgb"]
