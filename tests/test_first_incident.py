"""docs/first-incident.md, followed to the letter: an outage of a dependency, then a dead letter, in a real service."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from harness.servers import ServerMissing, skip_without_server
from harness.servers.local import free_ports
from support.documents import steps
from support.rendered import TEMPLATE, Render, Service, run
from support.terminal import Terminal

PAGE = TEMPLATE / "docs/first-incident.md"
CARRIER, RUN = "python3 -m http.server", "uv run order-events run"
ORDERS = 30


class Walk:
    """Takes the page's steps in order, with its own ports; steps that run until Ctrl-C get a terminal each."""

    def __init__(self, service: Service, terminals: ExitStack) -> None:
        self.service, self._terminals = service, terminals
        self._steps = steps(PAGE)
        self._ports = dict(zip(("8080", "8900"), map(str, free_ports(2)), strict=True))
        self._direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def next(self, expected: str, *, check: bool = True, **words: str) -> str:
        """Take the step that has this text; returns its output."""
        file, text = self._next(expected, words)
        if file:
            self.service.write(file, text)
            return ""
        return run("sh", "-c", text, cwd=self.service.path, check=check, env=self._direct).stdout

    def start(self, expected: str) -> Terminal:
        _, text = self._next(expected, {})
        return self._terminals.enter_context(Terminal(text, self.service.path, **self._direct))

    def _next(self, expected: str, words: dict[str, str]) -> tuple[str, str]:
        file, text = next(self._steps)
        assert expected in (file or text), f"the page has changed: {file or text}"
        for word, meant in (self._ports | words).items():
            text = re.sub(rf"\b{word}\b", meant, text)
        return file, text

    def is_over(self) -> bool:
        return next(self._steps, None) is None


@pytest.fixture
def walk(render_own: Render) -> Iterator[Walk]:
    if shutil.which("curl") is None:
        skip_without_server(ServerMissing("curl is not installed"))
    with ExitStack() as terminals:
        yield Walk(render_own(broker="sqlite", deploy="none"), terminals)


def letters(printed: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_first_incident_is_as_it_says(walk: Walk) -> None:
    handler = "handlers/order_created.py"
    for step in ("mkdir", "rates.json", handler, ".env", "PROBE_PORT", "ATTEMPTS", "declare"):
        walk.next(step)
    carrier, service = walk.start(CARRIER), walk.start(RUN)
    service.wait_for('"consuming"')
    walk.next("publish")
    service.wait_for('"shipped"')

    carrier.press_ctrl_c()
    walk.next("publish -")
    service.wait_for('"paused"')
    reasons = "(20 failures in a row|it failed again), last with URLError"
    assert re.fullmatch(f"ready, paused: {reasons}\n", walk.next("readyz"))
    assert "\nconsumer_paused 1.0\n" in walk.next("consumer_paused")
    assert "consumer_paused" in walk.next("ServiceIsPaused")
    assert "0 of 0 dead letters" in walk.next("dead-letters list")
    carrier = walk.start(CARRIER)
    service.wait_for('"resumed"')
    service.wait_for('"shipped"', 1 + ORDERS)
    assert '"message_rejected"' not in service.output

    walk.next("publish")
    service.wait_for('"message_rejected"')
    assert 'handler="order_created",outcome="rejected"} 1.0' in walk.next("metrics")
    [letter] = letters(walk.next("dead-letters list"))
    assert letter["reason"] == "failed 3 times, last with KeyError: 'FR'"
    assert '"C-1001\\"' in walk.next("dead-letters show", ID=letter["id"])
    assert '"event": "paused"' not in service.output.partition('"resumed"')[2]
    [outcome] = letters(walk.next("dead-letters try", check=False))
    assert (outcome["outcome"], outcome["reason"]) == ("retried", "KeyError: 'FR'")

    walk.next(handler)
    [outcome] = letters(walk.next("dead-letters try"))
    assert outcome["outcome"] == "handled"
    service.press_ctrl_c()
    service = walk.start(RUN)
    service.wait_for('"consuming"')
    assert "replayed 1 message to order-events" in walk.next("dead-letters replay")
    assert "0 of 0 dead letters" in walk.next("dead-letters list")
    service.wait_for('"shipped"')
    assert '"reference": "C-1001"' in service.output
    assert walk.is_over()
    for terminal in (service, carrier):
        terminal.press_ctrl_c()
