# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Keeps what became of the shutdown suite, for the template's `tasks.py fleet`; fixtures of yours belong in tests/handlers/conftest.py.

Here, and not beside the suite, as with `-n` the process that hears of all tests reads no conftest.py further down.
"""

from collections import Counter

import pytest

SUITE = "tests/runtime/test_shutdown.py"
outcomes: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid.startswith(f"{SUITE}::") and (report.when == "call" or not report.passed):
        outcomes[report.outcome] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.nodeid == SUITE and report.failed:
        outcomes[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    cache: pytest.Cache | None = getattr(session.config, "cache", None)
    if outcomes and cache and not hasattr(session.config, "workerinput"):
        cache.set("consumer/shutdown_suite", outcomes)
