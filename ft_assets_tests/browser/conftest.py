"""A picture of the page on which a test failed."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

expect.set_options(timeout=60_000)  # ms; the default of 5 s is too short on a busy machine


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    if (
        outcome.get_result().when == "call"
        and outcome.get_result().failed
        and "person" in getattr(item, "funcargs", {})
    ):
        item.funcargs["person"].shot(f"failed_{item.name}")  # type: ignore[attr-defined]
