"""What every test shares. The `gpu` tests also run where only torch, triton, numpy and pytest are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

# Before torch is imported: see the Makefile.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest

if find_spec("jaxtyping") and find_spec("beartype"):
    from jaxtyping import install_import_hook

    # The shapes that the code states are checked on every call; test_setup_shapes.py shows that they are.
    install_import_hook(["workbench.blocks", "workbench.model", "workbench.train"], "beartype.beartype")

if find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples on every run, and no verdict that depends on how busy the machine is.
    settings.register_profile("workbench", deadline=None, derandomize=True, database=None)
    settings.load_profile("workbench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="fail if any test but a gpu one was skipped")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The one Chromium of all tests: Playwright cannot be opened twice in a process."""
    from tests.browser.jupyter import chromium

    with chromium() as running:
        yield running


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fail-on-skip"):
        config.pluginmanager.register(_FailOnSkip())


class _FailOnSkip:
    """A skipped test proves nothing: where everything can be installed, only a missing GPU excuses it."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped, and that is a failure here", red=True)
            terminalreporter.line("\n".join(self.skipped))
