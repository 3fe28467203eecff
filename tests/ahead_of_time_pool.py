"""Kernels compiled on all cores, for tests that then read what each uses."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from workbench_kernels.fused.ahead_of_time import Case, compile_case
from workbench_kernels.fused.cases import all_cases


class Compilation(NamedTuple):
    """One of `all_cases(kind)[op]`, for one target: a case itself cannot go to another process."""

    kind: str
    op: str
    index: int
    architecture: str

    @property
    def case(self) -> Case:
        return cases_of(self.kind)[self.op][self.index]


@cache
def cases_of(kind: str) -> dict[str, list[Case]]:
    return all_cases(kind)


def faults(compilation: Compilation) -> list[str]:
    """What the compiled kernel does that it may not."""
    case, architecture = compilation.case, compilation.architecture
    return compile_case(case, architecture).faults(case, architecture)


@contextmanager
def compiling(compilations: list[Compilation]) -> Iterator[dict[Compilation, Future[list[str]]]]:
    """The faults of all, as they become known; what nobody waits for any more is not begun."""
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield {compilation: pool.submit(faults, compilation) for compilation in compilations}
    finally:
        pool.shutdown(cancel_futures=True)
