"""Warnings are errors here, and where the engine logs instead of warning, the log is an error too."""

import pytest


@pytest.fixture(autouse=True)
def nothing_is_only_logged(caplog):
    yield
    logged = [record.getMessage() for record in caplog.get_records("call") if "gradiometer" in record.name]
    assert not logged, logged
