"""The unit of a service under a real systemd: notifications, shutdown, watchdog, and the effect of each exit code."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from harness.scene import wait_until
from harness.servers import ServerMissing, skip_without_server
from harness.servers.local import free_port
from support.boot import PACKAGES, Machine, booted
from support.rendered import Render, run
from tools.servers import roots

UNIT = "order-events.service"
PROGRAM = "/opt/order-events/bin/order-events"
STATE = "/var/lib/private/order-events"  # the folder of a unit with DynamicUser
SHOWN_STATE = "/var/lib/order-events"
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
        """Set its variables, and lines of the unit, in the drop-in of one test."""
        # The machine shares the network of the tests, so the unit's port may be in use.
        environment = {"CONSUMER_PROBE_PORT": "0"} | {
            name: str(value) for name, value in variables.items()
        }
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
        """Wait for a line of the ledger, or for properties in `systemctl show`."""
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
    files["/etc/order-events.url"] = f"sqlite:///{SHOWN_STATE}/messages.db\n"
    with booted(root, folder, files, {installed: "/opt/order-events"}) as machine:
        yield machine


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """The unit without messages, log or restarts."""
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


def test_a_refused_login_is_tried_again_after_longer_and_longer_delays(unit: Unit) -> None:
    unit.machine.run("touch", "/etc/messages.db")  # the user of the service cannot write it
    unit.configure(CONSUMER_BROKER_URL="sqlite:////etc/messages.db")
    unit.systemctl("start", check=False)
    unit.wait_for(ExecMainStatus="77", NRestarts="3")
    names = ("RestartUSec", "RestartUSecNext", "RestartSteps", "RestartMaxDelayUSec")
    first, following, steps, longest = unit.show(*names)
    assert (first, steps, longest) == ("100ms", "6", "1min")
    assert seconds_of(following) > 2, "0.1 s, 0.3 s, 0.8 s, 2.4 s"


def seconds_of(span: str) -> float:
    """The seconds of systemd's ``2s 449ms``."""
    units = {"ms": 0.001, "s": 1.0, "min": 60.0, "us": 0.000001}
    return sum(float(n) * units[name] for n, name in re.findall(r"([\d.]+)([a-z]+)", span))


def test_the_process_metrics_survive_the_hardening(unit: Unit) -> None:
    port = free_port()
    unit.configure(CONSUMER_PROBE_PORT=port)
    unit.systemctl("start")
    url = f"http://127.0.0.1:{port}/metrics"
    page = unit.machine.run("python3", "-c", READ, url)
    names = ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds")
    assert [name for name in names if f"\n{name} " not in page] == []


READ = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"


def test_the_journal_has_the_priority_of_each_line(unit: Unit) -> None:
    """So `journalctl --priority=err` shows only the errors."""
    unit.machine.run("systemctl", "start", "systemd-journald")
    unit.configure("StandardOutput=journal\nStandardError=journal", CONSUMER_DRAIN_SECONDS=1)
    unit.systemctl("start")
    unit.publish("sleep", 600)
    unit.wait_for(line="start sleep")
    unit.systemctl("stop")
    journal = ["journalctl", f"--unit={UNIT}", "--output=json", "--identifier=order-events"]
    unit.machine.run("journalctl", "--sync", check=False)
    lines = [json.loads(line) for line in unit.machine.run(*journal).splitlines()]
    levels = {"info": "6", "warning": "4", "error": "3"}
    said = [(json.loads(line["MESSAGE"]), line["PRIORITY"]) for line in lines]
    assert {"consuming", "message_abandoned", "stopped"} <= {line["event"] for line, _ in said}
    assert [line for line, priority in said if levels[line["level"]] != priority] == []


def test_the_unit_is_bounded(unit: Unit) -> None:
    unit.systemctl("start")
    names = ("MemoryMax", "TasksMax", "OOMPolicy", "PrivateMounts")
    assert unit.show(*names) == [str(256 * 2**20), "1024", "continue", "yes"]


def test_the_url_is_a_credential_that_no_other_user_can_read(unit: Unit, render: Render) -> None:
    """The lines are those of a broker with a password."""
    other = render(broker="redis", deploy="systemd").read(f"deploy/systemd/{UNIT}")
    lines = re.findall(r"^(?:LoadCredential=|Environment=CONSUMER_BROKER_URL_FILE=).*", other, re.M)
    assert len(lines) == 2
    service = "\n".join(["UnsetEnvironment=CONSUMER_BROKER_URL", *lines])
    unit.configure(service.replace("/etc/order-events.broker-url", "/etc/order-events.url"))
    unit.systemctl("start")
    assert '"event": "consuming"' in unit.read(LOG)
    unit.machine.run("test", "-e", f"{STATE}/messages.db")
    credential = f"/run/credentials/{UNIT}/broker-url"
    [pid] = unit.show("MainPID")
    environment = unit.machine.run("cat", f"/proc/{pid}/environ")
    assert f"CONSUMER_BROKER_URL_FILE={credential}" in environment
    assert "sqlite:" not in environment
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert "Permission denied" in unit.machine.run(*nobody, "cat", credential, check=False)


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
