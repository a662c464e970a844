# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Imports the fixtures for pytest."""

import pytest

pytest.register_assert_rewrite("harness")  # before it is imported, hence E402 below

from harness.fixtures import *  # noqa: E402, F403
