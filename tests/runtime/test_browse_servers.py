"""The page of `dead-letters browse` on brokers that cannot select letters, in a real browser."""

import pytest

from chromium import Chromium
from harness.servers import Server
from test_browse import browser, page, port, use_by_keyboard  # noqa: F401

BROKERS = ["rabbitmq", "kafka"]
pytestmark = [
    pytest.mark.very_slow,
    pytest.mark.parametrize("broker", BROKERS, indirect=True, scope="session"),
]


def test_letters_are_grouped_shown_tried_and_replayed_on_a_server(
    page: str,  # noqa: F811
    browser: Chromium,  # noqa: F811
    broker: Server,
    queue: str,
) -> None:
    use_by_keyboard(page, browser, broker, queue)
