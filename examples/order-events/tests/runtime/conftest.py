# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Where pytest finds the fixtures."""

import pytest

pytest.register_assert_rewrite("harness")  # before it is imported, hence E402 below

from harness.fixtures import *  # noqa: E402, F403
