"""Warnings are errors here, and where the engine logs instead of warning, the log is an error too.

A test with three parameters or more is a product of cases: the quick tier runs those that cover every pair of
values, the others are slow.
"""

import gc
import sys
from itertools import combinations

import pytest

from .hooks import everywhere


@pytest.fixture(autouse=True)
def nothing_is_only_logged(caplog):
    yield
    logged = [record.getMessage() for record in caplog.get_records("call") if "gradiometer" in record.name]
    assert not logged, logged


@pytest.fixture(autouse=True)
def no_hook_is_left_behind():
    yield
    if everywhere():
        gc.collect()
    assert everywhere() == 0


@pytest.fixture(autouse=True)
def nothing_stays_compiled():
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and any(dynamo.eval_frame.cached_backends.values()):
        dynamo.reset()
        dynamo.utils.counters.clear()


def pytest_collection_modifyitems(items):
    seen = {}
    for item in items:
        case = getattr(item, "callspec", None)
        if case is None or len(case.indices) < 3:
            continue
        pairs = set(combinations(sorted(case.indices.items()), 2))
        covered = seen.setdefault(item.nodeid.partition("[")[0], set())
        if pairs <= covered:
            item.add_marker(pytest.mark.slow)
        covered |= pairs
