"""What a view shows, apart from how it is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.widgets.controls import Control
from workbench.widgets.primitives import Primitive


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One picture with its words. `state` is announced when it changes; `ended`: no newer frame will come by itself."""

    version: int
    title: str
    status: str
    primitives: tuple[Primitive, ...]
    controls: tuple[Control, ...] = ()
    state: str = ""
    ended: bool = False


class Content(ABC):
    """Where frames come from. `key` names it within a notebook: a second live view of the same replaces the first."""

    key: str

    @abstractmethod
    def frame(self, values: Mapping[str, Any], have: int | None = None) -> Frame | None:
        """The picture for the values of the controls; None when version `have` is still the newest.

        Raises:
            ValueError: a value is not allowed.
        """

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether no newer frame will come by itself."""

    @property
    @abstractmethod
    def settles(self) -> bool:
        """Whether a live view becomes a static figure by itself when the content ends."""

    @abstractmethod
    def act(self, action: str, given: Mapping[str, Any]) -> str:
        """Do what an `Action` control asks for; the answer is one line for the reader.

        Raises:
            ValueError: it cannot be done.
        """

    @abstractmethod
    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back once, on any thread, when the content has ended."""


class StillContent(Content):
    """A content that never changes by itself, only with its controls, if it has any; its `key` is set by subclasses."""

    @abstractmethod
    def picture(self, values: Mapping[str, Any]) -> Frame:
        """The one picture for the values of the controls.

        Raises:
            ValueError: a value is not allowed.
        """

    def frame(self, values: Mapping[str, Any], have: int | None = None) -> Frame | None:
        return self.picture(values) if have is None else None

    @property
    def ended(self) -> bool:
        return False

    @property
    def settles(self) -> bool:
        return False

    def act(self, action: str, given: Mapping[str, Any]) -> str:
        raise ValueError(f"this view has no action {action!r}")

    def on_end(self, callback: Callable[[], None]) -> None:
        raise AssertionError("a still view has no end")
