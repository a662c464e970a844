"""``python3 tasks.py servers``: newer servers of other Debian releases, and RabbitMQ 4 in every run of all tests."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.servers import ServerMissing, skip_without_server
from support.rendered import MODULES, TEMPLATE, Prove, run_tool
from tools.servers import __main__ as servers
from tools.servers import roots

RABBITMQ_4 = "rabbitmq@trixie"
WAIT_SECONDS = 120
END_SECONDS = 20


@pytest.fixture(scope="module")
def rabbitmq_4() -> Path:
    """A root with RabbitMQ 4."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip(roots.why_not())  # our workflow runs these as root too
    try:
        return roots.made("trixie", ["rabbitmq-server"])
    except roots.RootMissing as reason:
        skip_without_server(ServerMissing(f"there is no RabbitMQ 4: {reason}"))


def test_the_runtime_passes_its_tests_on_rabbitmq_4(rabbitmq_4: Path, prove: Prove) -> None:
    """The contract, the outages and the broker's tests, except the very slow; the machine may have another version."""
    version = roots.version_of("rabbitmq-server", rabbitmq_4)
    assert version.startswith("4.")
    result = run_tool("servers", RABBITMQ_4, check=False)
    assert result.returncode == 0, result.stdout
    [words] = re.findall(rf"  {re.escape(version)}: (.*), \d+ s$", result.stdout, re.M)
    prove("runs of the runtime's tests that passed", f"on RabbitMQ {version}: {words}")


def test_only_a_command_beside_the_root_finds_its_programs(rabbitmq_4: Path) -> None:
    row = next(row for row in servers.ROWS if row.name == RABBITMQ_4)
    with roots.beside(rabbitmq_4, row.programs) as before:
        for command in (
            ["rabbitmqctl", "version"],
            ["inside", "sh", "-c", "rabbitmqctl version; pwd"],
        ):
            asked = subprocess.run([*before, *command], capture_output=True, text=True, cwd="/tmp")
            assert asked.returncode == 0, asked.stderr
            assert asked.stdout.startswith("4.")
        work = Path(before[-1])
        assert list((work / "root").iterdir()) == []
    assert asked.stdout.splitlines()[-1] == "/tmp"
    assert not work.exists()


@pytest.mark.usefixtures("rabbitmq_4")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_no_process_no_mount_and_no_file(
    tmp_path: Path, signum: signal.Signals
) -> None:
    command = [sys.executable, "-m", "tools.servers", RABBITMQ_4]
    variables = {**os.environ, **MODULES, "TMPDIR": str(tmp_path)}
    run = subprocess.Popen(command, cwd=TEMPLATE, env=variables, start_new_session=True)
    try:
        give_up_at = time.monotonic() + WAIT_SECONDS
        while "beam" not in processes_of(tmp_path):
            assert run.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.1)
        os.killpg(run.pid, signum)  # like a terminal
        assert run.wait(END_SECONDS) == 128 + signal.SIGINT
    finally:
        run.kill()
        run.wait()
    assert processes_of(tmp_path) == ""
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert list(tmp_path.iterdir()) == []


def processes_of(folder: Path) -> str:
    """The command lines that name this folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        found += [text] if str(folder) in text else []
    return "\n".join(found)


def test_an_unavailable_server_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["servers", "redis@sid"])
    assert servers.main() == 3
    reason = "only root on Linux can mount the /usr of another Debian release"
    assert capsys.readouterr().out == f"redis@sid ...\n  left out: {reason}\n"


# -- the page


def test_the_page_has_a_row_for_each_server_and_nothing_failed() -> None:
    text = servers.PAGE.read_text("utf-8").partition("\n".join(servers.HEAD) + "\n")[2]
    table = [servers.cells(line) for line in text.partition("\n\n")[0].splitlines()]
    keys = [(server, place) for server, _, place, *_ in table]
    assert keys == [
        (row.server, servers.RELEASES.get(row.place, row.place)) for row in servers.ROWS
    ]
    for server, version, _, day, passed, failed, _ in table:
        assert re.fullmatch(r"\d+(\.\d+)+", version), server
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", day), server
        assert int(passed) > 30, server
        assert int(failed) == 0, server


def test_a_result_replaces_its_row_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    head = "\n".join(servers.HEAD)
    page.write_text(
        f"Before.\n\n{head}\n| Redis | 1.0 | Debian 13 | then | 1 | 0 | 0 |\n\nAfter.\n"
    )
    monkeypatch.setattr(servers, "PAGE", page)
    by_name = {row.name: row for row in servers.ROWS}
    servers.publish({by_name["rabbitmq@sid"]: servers.Result("4.3.6", 97, 0, 2)})
    servers.publish({by_name["redis@trixie"]: servers.Result("8.0.2", 60, 0, 0)})
    text = re.sub(r"\d{4}-\d\d-\d\d", "today", page.read_text())
    rows = "| RabbitMQ | 4.3.6 | Debian sid | today | 97 | 0 | 2 |\n"
    rows += "| Redis | 8.0.2 | Debian 13 | today | 60 | 0 | 0 |\n"
    assert text == f"Before.\n\n{head}\n{rows}\nAfter.\n"
