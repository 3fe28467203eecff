"""One server for all browser tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.jupyter import JupyterServer, jupyter_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    with jupyter_server(tmp_path_factory.mktemp("jupyter")) as running:
        yield running
