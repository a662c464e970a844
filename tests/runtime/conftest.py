"""The fixtures of the harness; the real program is here one that can misbehave."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("harness")

from consumer_harness import ConsumerHarness  # noqa: E402
from harness.fixtures import *  # noqa: E402, F403
from harness.scene import Scene  # noqa: E402
from harness.servers import Server  # noqa: E402
from processes import MISBEHAVING  # noqa: E402
from runtime.settings import ConsumerSettings  # noqa: E402


@pytest.fixture
def scene(broker: Server, queue: str, tmp_path: Path) -> Iterator[Scene]:
    with Scene(broker, queue, tmp_path, MISBEHAVING) as scene:
        yield scene


@pytest.fixture
def harness(
    broker: Server, queue: str, settings_for: Callable[..., ConsumerSettings]
) -> ConsumerHarness:
    return ConsumerHarness(broker, queue, settings_for)
