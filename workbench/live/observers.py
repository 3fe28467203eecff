"""Those who want to know that a run has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Observers:
    """Callbacks that are called once, each in spite of what another raises; `errors` keeps that."""

    def __init__(self) -> None:
        self.errors: tuple[BaseException, ...] = ()
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []
        self._told = False

    def add(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the time comes, on the thread that tells; at once when it has come."""
        with self._lock:
            if not self._told:
                self._waiting.append(callback)
                return
        callback()

    def tell(self) -> None:
        """Call them all."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._told = True
        for callback in waiting:
            try:
                callback()
            except BaseException as error:  # noqa: BLE001
                self.errors += (error,)
