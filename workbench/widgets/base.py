"""The life of a view: opened, pulled by the front end that can be seen, and at the end a static figure."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from typing import Any

import anywidget
import traitlets
from IPython.core.getipython import get_ipython
from IPython.display import DisplayHandle, display

from workbench.widgets import bundle as files
from workbench.widgets import controls, live
from workbench.widgets.colors import color_table
from workbench.widgets.content import Content, Frame
from workbench.widgets.front_end import CSS, ESM
from workbench.widgets.primitives import Primitive

TABLE_ROWS = 200

# The open live view of each content in this process: running a cell again closes the one it opened before.
_open_views: dict[str, View] = {}


class Canvas(anywidget.AnyWidget):
    """The one widget class of the project. Everything but the colour table travels by custom message."""

    _esm = ESM
    _css = CSS
    lut = traitlets.Bytes(color_table()).tag(sync=True)


class View:
    """A content on the screen. As the last expression of a cell it shows itself; elsewhere, call `show()`.

    `live=True` opens a widget that the front end pulls at most ten times a second, and only while it is visible. When
    the content ends, on whatever thread, or when the reader asks to keep it, the widget's output is replaced by the
    static bundle. A content that has ended before it is shown stays live for replay until it is kept; its picture is
    stored beside the widget, for whoever opens the notebook without a kernel.
    `live=False` creates no widget: the static bundle is displayed once and never updated.
    `live=None` is live in a Jupyter kernel as long as the content has not ended. A kernel cannot tell whether a browser
    is looking: a notebook that runs without a screen passes False.
    """

    def __init__(self, content: Content, live: bool | None = None) -> None:
        self._content = content
        self._live = has_kernel() and not content.ended if live is None else live
        self._lock = threading.RLock()
        self._handles: list[DisplayHandle] = []
        self._widget: Canvas | None = None
        self._closed = False

    @property
    def live(self) -> bool:
        """Whether it is, or when shown becomes, a widget."""
        return self._live and not self._closed

    @property
    def widget(self) -> Canvas | None:
        """The open widget of a live view that has been shown."""
        return self._widget

    def primitives(self, **values: Any) -> list[Primitive]:
        """What it shows now, for the given values of its controls."""
        return list(self._frame(values).primitives)

    def bundle(self, **values: Any) -> dict[str, Any]:
        """The static form as a notebook stores it: plotly, SVG and text."""
        frame = self._frame(values)
        return files.bundle(frame.primitives, frame.title, frame.status)

    def show(self) -> None:
        """Display it here."""
        if not self.live:
            display(self.bundle(), raw=True)
            return
        with self._lock:
            first = self._widget is None
            if self._widget is None:
                self._open()
            assert self._widget is not None
            shown = self._widget._repr_mimebundle_() or ({}, {})
            data = dict(shown[0] if isinstance(shown, tuple) else shown)
            frame = self._frame({})
            data["text/plain"] = files.text(frame.primitives, frame.title, frame.status)
            if self._content.ended or not self._content.settles:
                # Nothing will replace it: a page without a kernel shows this picture, or nothing.
                data["image/svg+xml"] = files.svg(frame.primitives, frame.title, frame.status)
            handle = display(data, raw=True, display_id=True)
            if handle is not None:
                self._handles.append(handle)
            waits = first and self._content.settles and not self._content.ended
        # Outside the lock, and after the display: a run that has just ended calls back at once.
        if waits:
            self._content.on_end(self.settle)

    def _ipython_display_(self) -> None:
        self.show()

    def settle(self, values: Mapping[str, Any] | None = None) -> None:
        """Replace the widget by the static bundle, wherever it is displayed. A closed view stays as it is."""
        with self._lock:
            if self._closed or self._widget is None:
                return
            bundle = self.bundle(**(values or {}))
            for handle in self._handles:
                handle.update(bundle, raw=True)
            self.close()

    def close(self) -> None:
        """Close the widget; what is on the screen no longer changes."""
        with self._lock:
            self._closed = True
            if self._widget is not None:
                self._widget.close()
                self._widget = None
            if _open_views.get(self._content.key) is self:
                del _open_views[self._content.key]

    def _open(self) -> None:
        previous = _open_views.pop(self._content.key, None)
        if previous is not None:
            previous.close()
        self._widget = Canvas()
        self._widget.on_msg(self._receive)
        _open_views[self._content.key] = self

    def _frame(self, values: Mapping[str, Any]) -> Frame:
        frame = self._content.frame(values)
        assert frame is not None
        return frame

    def _receive(self, _widget: Any, message: dict[str, Any], _buffers: Any) -> None:
        """Answer one message of the front end. It may come on any thread of the kernel."""
        with self._lock:
            if self._closed:
                return
            try:
                self._answer(message)
            except (ValueError, OSError) as error:
                self._send(message, {"kind": "note", "text": str(error), "answers": message.get("kind")})

    def _answer(self, message: dict[str, Any]) -> None:
        values = message.get("values") or {}
        match message.get("kind"):
            case "pull":
                self._pull(message, values)
            case "act":
                action = str(message.get("action"))
                words = self._content.act(action, message.get("given") or {})
                self._send(message, {"kind": "note", "text": words, "done": action})
            case "data":
                tables = [_table(primitive) for primitive in self._frame(values).primitives if not primitive.empty]
                self._send(message, {"kind": "data", "tables": tables})
            case "export":
                self._export(message, values)
            case "keep":
                self.settle(values)

    def _pull(self, message: dict[str, Any], values: Mapping[str, Any]) -> None:
        frame = self._content.frame(values, have=message.get("have"))
        # Reading may have found the end of the run, and settled this view.
        if self._closed:
            return
        if frame is None:
            self._send(message, {"kind": "same"})
            return
        panels, arrays = live.encode(frame.primitives)
        answer = {
            "kind": "frame",
            "version": frame.version,
            "stamp": message.get("stamp"),
            "title": frame.title,
            "status": frame.status,
            "word": frame.state,
            "still": frame.ended,
            "controls": [controls.encode(control) for control in frame.controls],
            "panels": panels,
            "arrays": arrays.types,
        }
        self._send(message, answer, arrays.buffers)

    def _export(self, message: dict[str, Any], values: Mapping[str, Any]) -> None:
        frame = self._frame(values)
        # A file name that every system takes, whatever the run is called.
        stem = re.sub(r"[^\w-]+", "_", frame.title).strip("_") or "view"
        match message.get("format"):
            case "svg":
                name, kind, body = (
                    f"{stem}.svg",
                    "image/svg+xml",
                    files.svg(frame.primitives, frame.title, frame.status),
                )
            case "csv":
                name, kind, body = f"{stem}.csv", "text/csv", files.csv(frame.primitives)
            case "html":
                name, kind, body = f"{stem}.html", "text/html", files.html(frame.primitives, frame.title, frame.status)
            case other:
                raise ValueError(f"format={other!r} must be svg, csv or html")
        self._send(message, {"kind": "file", "name": name, "type": kind}, [body.encode()])

    def _send(self, message: dict[str, Any], answer: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        assert self._widget is not None
        self._widget.send({"view": message.get("view"), **answer}, buffers or [])


def has_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _table(primitive: Primitive) -> dict[str, Any]:
    frame = primitive.frame()
    newest = frame.tail(TABLE_ROWS)
    cut = f" (last {TABLE_ROWS} of {len(frame)} rows; the CSV file has all)" if len(frame) > TABLE_ROWS else ""
    rows = [[_cell(cell) for cell in row] for row in newest.itertuples(index=False)]
    return {"caption": primitive.title + cut, "columns": [str(name) for name in frame.columns], "rows": rows}


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"
