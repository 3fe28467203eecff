"""Randomness from a name: the same key gives the same numbers in any process, in any order of asking."""

from __future__ import annotations

import hashlib

import numpy as np


def permutation(size: int, *key: str | int) -> np.ndarray:
    """The numbers 0..size-1 in an order that depends on `key` alone."""
    # Sorting raw words, since numpy promises the bits of a generator for ever and its shuffles only per version.
    return np.argsort(_philox(key).random_raw(size), kind="stable")


def generator(*key: str | int) -> np.random.Generator:
    """A generator whose draws depend on `key` and on numpy's version."""
    return np.random.Generator(_philox(key))


def _philox(key: tuple[str | int, ...]) -> np.random.Philox:
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little"))
