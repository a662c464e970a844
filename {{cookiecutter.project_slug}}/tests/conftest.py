# cookiecutter-consumer {{ cookiecutter._template_version }} | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Stores the result of the shutdown suite for `tasks.py fleet`; your fixtures belong in tests/handlers/conftest.py.

Not beside the suite: with `-n`, the process that collects all results reads only this conftest.py.
"""

from collections import Counter

import pytest

SUITE = "tests/runtime/test_shutdown.py"
KINDS = ("passed", "skipped", "failed", "error")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for kind in KINDS for one in terminalreporter.stats.get(kind, ())]
    outcomes = Counter(one.outcome for one in reports if one.nodeid.partition("::")[0] == SUITE)
    cache: pytest.Cache | None = getattr(terminalreporter.config, "cache", None)
    if outcomes and cache:
        cache.set("consumer/shutdown_suite", outcomes)
