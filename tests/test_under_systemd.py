"""The unit of a service under a real systemd: notifications, a shutdown, the watchdog, and what each exit code does."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from harness.scene import wait_until
from harness.servers import ServerMissing, skip_without_server
from support.boot import PACKAGES, Machine, booted
from support.rendered import Render, run
from tools.servers import roots

UNIT = "order-events.service"
PROGRAM = "/opt/order-events/bin/order-events"
STATE = "/var/lib/private/order-events"  # of a unit with DynamicUser
LOG = "/var/log/order-events.log"
WAIT_SECONDS = 60

HANDLER = """
import asyncio
import json
import time
from pathlib import Path

from ..runtime.message import Message

EXAMPLE = b'{"do": "sleep", "seconds": 1}'
LEDGER = Path("/var/lib/order-events/ledger")


def write(line: str) -> None:
    with LEDGER.open("a") as ledger:
        ledger.write(f"{line}\\n")


async def handle(body: bytes, message: Message) -> None:
    task = json.loads(body)
    write(f"start {task['do']}")
    if task["do"] == "block":
        block_the_loop(task["seconds"])
    await asyncio.sleep(task["seconds"])
    write(f"end {task['do']}")


def block_the_loop(seconds: float) -> None:
    time.sleep(seconds)
"""
DROP_IN = f"""\
[Service]
RestartSec=100ms
StandardOutput=append:{LOG}
StandardError=append:{LOG}
"""


@dataclass
class Unit:
    """The service's unit, on a machine with systemd."""

    machine: Machine

    def systemctl(self, verb: str, *words: str, check: bool = True) -> str:
        return self.machine.run("systemctl", verb, UNIT, *words, check=check)

    def show(self, *names: str) -> list[str]:
        found = self.machine.show(UNIT, *names)
        return [found[name] for name in names]

    def publish(self, do: str, seconds: float) -> None:
        url = f"CONSUMER_BROKER_URL=sqlite:///{STATE}/messages.db"
        message = json.dumps({"do": do, "seconds": seconds})
        self.machine.run("env", url, PROGRAM, "publish", message)

    def configure(self, service: str = "", **variables: object) -> None:
        """Its settings, and lines of the unit: the drop-in of one test."""
        environment = {"CONSUMER_BROKER_URL": "sqlite:////var/lib/order-events/messages.db"}
        environment |= {name: str(value) for name, value in variables.items()}
        lines = [f"{name}={value}" for name, value in environment.items()]
        self.write("/etc/order-events.env", "\n".join(lines))
        self.write(f"/etc/systemd/system/{UNIT}.d/test.conf", f"{DROP_IN}{service}\n")
        self.machine.run("systemctl", "daemon-reload")

    def write(self, path: str, text: str) -> None:
        self.machine.run(
            "sh", "-c", 'mkdir -p "${1%/*}" && printf %s "$2" > "$1"', "sh", path, text
        )

    def read(self, path: str) -> str:
        return self.machine.run("cat", path, check=False)

    @property
    def ledger(self) -> list[str]:
        return self.read(f"{STATE}/ledger").splitlines()

    def wait_for(self, *, line: str = "", **properties: str) -> None:
        """For a line of the ledger, or for what `systemctl show` prints."""
        expected = list(properties.values())
        wait_until(
            lambda: (not line or line in self.ledger) and self.show(*properties) == expected,
            WAIT_SECONDS,
        )


@pytest.fixture(scope="module")
def machine(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip(roots.why_not())  # our workflow runs these as root too
    try:
        root = roots.made("trixie", PACKAGES)
    except roots.RootMissing as reason:
        skip_without_server(ServerMissing(f"there is no systemd to boot: {reason}"))
    folder = tmp_path_factory.mktemp("machine")
    service = render(broker="sqlite", deploy="systemd", handler_stub="raw").copy_to(folder)
    service.write(f"src/{service.package}/handlers/order_created.py", HANDLER)
    installed = folder / "installed"
    with roots.beside(root, {}) as before:
        inside = [*before, "inside", "uv"]
        run(*inside, "venv", "--quiet", "--python", "/usr/bin/python3", str(installed), cwd=folder)
        install = [*inside, "pip", "install", "--quiet", "--python", str(installed / "bin/python")]
        run(*install, str(service.path), cwd=folder)
    script = installed / "bin/order-events"
    script.write_text(script.read_text().replace(str(installed), "/opt/order-events"))
    files = {f"/etc/systemd/system/{UNIT}": service.read(f"deploy/systemd/{UNIT}")}
    with booted(root, folder, files, {installed: "/opt/order-events"}) as machine:
        yield machine


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """With no messages, no log and no restarts."""
    unit = Unit(machine)
    unit.configure()
    yield unit
    unit.systemctl("kill", "--signal=KILL", check=False)
    unit.systemctl("stop")
    unit.systemctl("reset-failed", check=False)
    machine.run("sh", "-c", f"rm -rf {STATE}/* {LOG}")


def test_it_is_started_when_it_consumes_and_a_stop_drains_it(unit: Unit) -> None:
    unit.systemctl("start")
    names = ("ActiveState", "SubState", "StatusText", "NRestarts")
    assert unit.show(*names) == ["active", "running", "consuming", "0"]
    assert '"event": "consuming"' in unit.read(LOG)
    unit.publish("sleep", 3)
    unit.wait_for(line="start sleep")
    unit.systemctl("stop", "--no-block")
    unit.wait_for(SubState="stop-sigterm", StatusText="draining, 1 in flight")
    unit.wait_for(ActiveState="inactive", Result="success", ExecMainStatus="0")
    assert unit.ledger == ["start sleep", "end sleep"]


def test_the_watchdog_restarts_it_when_a_handler_blocks_the_loop_and_the_log_says_where(
    unit: Unit,
) -> None:
    unit.configure("WatchdogSec=2")
    unit.systemctl("start")
    last_ping = "WatchdogTimestampMonotonic"  # in microseconds
    [first] = unit.show(last_ping)
    wait_until(lambda: int(unit.show(last_ping)[0]) > int(first) + 4_000_000, WAIT_SECONDS)
    assert unit.show("NRestarts") == ["0"]
    unit.publish("block", 600)
    unit.wait_for(NRestarts="1", SubState="running")
    assert unit.ledger == ["start block"]
    log = unit.read(LOG)
    assert "Fatal Python error: Aborted" in log
    assert " in block_the_loop\n" in log


def test_wrong_settings_end_it_with_2_and_it_is_not_restarted(unit: Unit) -> None:
    unit.configure(CONSUMER_CONCURRENCY="many")
    unit.systemctl("start", check=False)
    names = ("ActiveState", "Result", "ExecMainStatus", "NRestarts")
    assert unit.show(*names) == ["failed", "exit-code", "2", "0"]
    assert "CONSUMER_CONCURRENCY" in unit.read(LOG)


def test_a_drain_that_takes_too_long_ends_it_with_75_and_the_unit_has_failed(unit: Unit) -> None:
    unit.configure(CONSUMER_DRAIN_SECONDS=1)
    unit.systemctl("start")
    unit.publish("sleep", 600)
    unit.wait_for(line="start sleep")
    unit.systemctl("stop")
    assert unit.show("ActiveState", "Result", "ExecMainStatus") == ["failed", "exit-code", "75"]


def test_a_signal_that_systemd_did_not_send_restarts_it_after_75_and_not_after_0(
    unit: Unit,
) -> None:
    unit.configure(CONSUMER_DRAIN_SECONDS=1)
    unit.systemctl("start")
    unit.publish("sleep", 600)
    unit.wait_for(line="start sleep")
    unit.systemctl("kill", "--kill-whom=main")
    unit.wait_for(NRestarts="1", SubState="running")
    unit.machine.run("sh", "-c", f"rm {STATE}/messages.db*", check=False)
    unit.systemctl("restart")
    unit.systemctl("kill", "--kill-whom=main")
    unit.wait_for(ActiveState="inactive", Result="success", ExecMainStatus="0")
