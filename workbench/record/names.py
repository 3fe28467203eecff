"""Run names: one folder name directly below a root."""

from __future__ import annotations

import re
from pathlib import Path

_ALLOWED = re.compile(r"[^\W_][\w.-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_MAX_BYTES = 120


def validate_name(root: str | Path, name: str) -> Path:
    """The folder of a run yet to be made: `root / name`.

    Raises:
        ValueError: the name is not allowed, or there is something of that name.
    """
    path = checked_path(root, name)
    if path.is_symlink() or path.exists():
        raise ValueError(f"the run {name!r} exists already in {root}; choose another name or delete it first")
    return path


def checked_path(root: str | Path, name: str) -> Path:
    """`root / name` for a name that is safe on every system, whether or not it exists.

    Raises:
        ValueError: the name is not allowed, or it is a link out of the root.
    """
    if not _ALLOWED.fullmatch(name) or name.endswith("."):
        rule = "letters, digits, '.', '_' and '-', beginning with a letter or digit, not ending in '.'"
        raise ValueError(f"run name {name!r} is not allowed; a name has {rule}")
    if len(name.encode()) > _MAX_BYTES:
        raise ValueError(f"run name {name[:20]!r}... is longer than {_MAX_BYTES} bytes")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"run name {name!r} is reserved by Windows; choose another")
    path = Path(root) / name
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise ValueError(f"the run {name!r} is a link that leads out of {root}")
    return path


def fresh_folder(root: str | Path, stem: str) -> Path:
    """The first of `root/stem-001`, `-002`, .. beyond every one that exists; it is not made.

    Raises:
        ValueError: the stem is not allowed as a name.
    """
    root = Path(root)
    checked_path(root, f"{stem}-001")
    pattern = re.compile(re.escape(stem) + r"-([0-9]+)")
    taken = [int(found[1]) for entry in _entries(root) if (found := pattern.fullmatch(entry.name))]
    return validate_name(root, f"{stem}-{max(taken, default=0) + 1:03d}")


def _entries(root: Path) -> list[Path]:
    return list(root.iterdir()) if root.is_dir() else []
