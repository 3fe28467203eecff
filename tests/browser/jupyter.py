"""A real JupyterLab with its own home, and a real Chromium to drive it: what the browser tests stand on."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

TOKEN = "browser-test"
PATIENCE_MS = 60_000

READY = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const session = panel?.sessionContext;
    const kernel = session?.session?.kernel;
    return Boolean(session?.isReady && kernel?.connectionStatus === 'connected' && kernel?.status === 'idle');
}"""

# Sent and not awaited: the promise of a cell that trains would hold `evaluate` for as long.
EXECUTE = "([command, args]) => { window.jupyterapp.commands.execute(command, args); }"

PROMPT = "(index) => window.jupyterapp.shell.currentWidget.content.widgets[index].prompt"

SHOW_CELL = """async (index) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = index;
    await notebook.scrollToItem(index, 'start');
}"""

OUTPUTS = "(index) => window.jupyterapp.shell.currentWidget.content.widgets[index].model.outputs.toJSON()"

# With no code of its own the request leaves the cells' numbers and outputs alone.
KERNEL_VALUE = """async (expression) => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const reply = await kernel.requestExecute(
        { code: '', silent: true, store_history: false, user_expressions: { value: expression } }).done;
    const value = reply.content.user_expressions.value;
    if (value.status !== 'ok') throw new Error(`${value.ename}: ${value.evalue}`);
    return value.data['text/plain'];
}"""

CELLS_DONE = """(count) => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter((w) => w.model.type === 'code');
    return cells.slice(0, count ?? cells.length).every((w) => w.model.executionCount !== null && w.prompt !== '*');
}"""

CELL_ERRORS = """() => window.jupyterapp.shell.currentWidget.content.widgets
    .flatMap((w) => w.model.type === 'code' ? w.model.outputs.toJSON() : [])
    .filter((o) => o.output_type === 'error').map((o) => `${o.ename}: ${o.evalue}`)"""

# The colour in the upper left quarter of every cell: the middle may carry the cross of a dead expert.
HEATMAP_PIXELS = """(canvas) => {
    const { header, values, detail } = canvas.wb, ratio = canvas.width / canvas.clientWidth;
    const context = canvas.getContext('2d'), rgb = [];
    for (let row = 0; row < header.rows; row++) for (let column = 0; column < header.columns; column++) {
        const q = canvas.wb.cell(row, column);
        const p = context.getImageData(Math.floor((q.x + q.w / 4) * ratio), Math.floor((q.y + q.h / 4) * ratio), 1, 1);
        rgb.push([...p.data.slice(0, 3)]);
    }
    return { title: header.title, rows: header.rows, columns: header.columns, low: header.low, high: header.high,
             values: [...values], detail: detail ? [...detail] : null, rgb };
}"""


@dataclass(frozen=True)
class JupyterServer:
    """A running JupyterLab: notebooks lie in `root`."""

    port: int
    root: Path

    def url(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={TOKEN}&reset"


@contextmanager
def jupyter_server(folder: Path) -> Iterator[JupyterServer]:
    """JupyterLab with home, settings and runtime files inside `folder`; the kernel is that of this Python."""
    home, root = folder / "home", folder / "notebooks"
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    root.mkdir(exist_ok=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    kernel = home / "data" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    port = free_port()
    environment = {
        **os.environ,
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.collaborative=False"]
    log = folder / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=sink, stderr=subprocess.STDOUT)
        try:
            wait_for_server(port, process, log)
            yield JupyterServer(port, root)
        finally:
            # SIGTERM lets the server end its kernels.
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_server(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers; its own log when it dies instead."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/status", headers={"Authorization": f"token {TOKEN}"})
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {process.returncode}:\n{log.read_text()}")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            try:
                process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
    raise RuntimeError(f"JupyterLab did not answer:\n{log.read_text()}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium of this machine, without a screen.

    Raises:
        RuntimeError: none is installed.
    """
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise RuntimeError("the browser tests need Chromium: install the package `chromium`")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, headless=True, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook with these code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


class Lab:
    """One open notebook."""

    def __init__(self, browser: Browser, server: JupyterServer, *, width: int = 1400, height: int = 1000) -> None:
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        context.set_default_timeout(PATIENCE_MS)
        self.server = server
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        # What JupyterLab itself reports about missing optional resources is not ours to mend.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def open(self, notebook: str) -> None:
        """Open a notebook and wait until its kernel can be spoken to: idle alone comes before the socket is open."""
        self.page.goto(self.server.url(notebook))
        self.page.wait_for_function(READY)

    def execute(self, command: str, **args: Any) -> None:
        """Start a command of JupyterLab."""
        self.page.evaluate(EXECUTE, [command, args])

    def run_all(self) -> None:
        """Run all cells and wait until each has ended; a cell that raised fails the test."""
        self.execute("notebook:run-all-cells")
        self.wait_for_cells()

    def run_cell(self, index: int) -> None:
        """Start one cell and bring it into view."""
        self.show_cell(index)
        self.execute("notebook:run-cell")

    def show_cell(self, index: int) -> None:
        """Scroll to a cell: those far outside the window are not part of the page."""
        self.page.evaluate(SHOW_CELL, index)

    def wait_for_cells(self, count: int | None = None) -> None:
        """Until every code cell, or each of the first `count`, has ended; one that raised fails the test."""
        self.page.wait_for_function(CELLS_DONE, arg=count)
        self.check_cells()

    def prompt(self, index: int) -> str:
        """What stands before a cell: its number, or `*` while it waits or runs."""
        return self.page.evaluate(PROMPT, index) or ""

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """The outputs of a cell as the notebook would store them."""
        return self.page.evaluate(OUTPUTS, index)

    def kernel_value(self, expression: str) -> Any:
        """A plain value computed in the kernel once it is idle."""
        return ast.literal_eval(self.page.evaluate(KERNEL_VALUE, expression))

    def check_cells(self) -> None:
        errors = self.page.evaluate(CELL_ERRORS)
        assert not errors, errors

    def resize(self, width: int, height: int = 1000) -> None:
        self.page.set_viewport_size({"width": width, "height": height})

    def hide_side_bar(self) -> None:
        """Give the notebook the whole width."""
        self.page.evaluate("() => window.jupyterapp.shell.collapseLeft()")

    def theme(self, dark: bool) -> None:
        """Switch JupyterLab's theme and wait until it is there."""
        name = "JupyterLab Dark" if dark else "JupyterLab Light"
        self.execute("apputils:change-theme", theme=name)
        self.page.wait_for_function(
            "(light) => document.body.dataset.jpThemeLight === light", arg="false" if dark else "true"
        )

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)

    def view(self, kind: str) -> Locator:
        """The live view whose title ends with `kind`."""
        return self.page.locator(".wb-view").filter(has=self.page.locator(".wb-title", has_text=kind))

    def heatmap(self, view: Locator) -> dict[str, Any]:
        """Title, values, details and the pixels on the screen of the heatmap in a view, row by row."""
        canvas = view.locator(".wb-panel", has_text="Expert load").locator("canvas")
        expect(canvas).to_be_visible()
        return canvas.evaluate(HEATMAP_PIXELS)
