"""The first commands of a newcomer: ``python3 tasks.py demo``, and then the demo of a service."""

import re

import pytest

from support.rendered import QUESTIONS, Prove, Render, run_tool


def test_the_demo_stops_a_service_with_handlers_at_work_and_loses_nothing() -> None:
    output = run_tool("demo").stdout
    counted = dict(re.findall(r"^ +(published|handled|lost|handled twice) +(\d+)", output, re.M))
    assert counted == {"published": "60", "handled": "60", "lost": "0", "handled twice": "0"}
    assert re.search("SIGTERM with [12] messages in flight: it finished them", output)


@pytest.mark.parametrize("handler_stub", QUESTIONS["handler_stub"])
def test_the_demo_of_a_service_has_messages_for_each_of_two_handlers(
    render: Render, prove: Prove, handler_stub: str
) -> None:
    handlers = {"order_created", "payment_received"}
    service = render(
        broker="sqlite", handler_stub=handler_stub, handlers=", ".join(sorted(handlers))
    )
    printed = service.demo()
    assert set(re.findall(r"\[info +\] (\w+) .*\b(?:references?|text)=", printed)) == handlers
    prove("demos of two handlers that handled everything", f"handler_stub={handler_stub}")
