"""`rehearse` names the fault of each wrong handler of rehearsed.py. tests/test_rehearsals.py has the right handlers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import rehearsed
from harness.process import IMPORTED_FROM
from harness.servers import Server
from listing import names_on
from runtime.brokers import make_source
from runtime.brokers.source import MISSING
from runtime.errors import UsageError
from runtime.message import DeadLetter, OutgoingMessage
from runtime.operate import rehearse
from runtime.operate.letters import shown
from runtime.settings import ConsumerSettings

PROGRAM = Path(rehearsed.__file__)
NAMED = "temporary queues there"

pytestmark = pytest.mark.slow


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(PROGRAM), *arguments]


def environment(directory: Path, **variables: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CONSUMER_")}
    ours = {"PYTHONPATH": os.pathsep.join(IMPORTED_FROM), "WORLD": str(directory / "world")}
    return {
        **inherited,
        **ours,
        "TMPDIR": str(directory),
        "CONSUMER_DRAIN_SECONDS": "1",
        **variables,
    }


def run(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Rehearse this handler; it leaves neither a process nor a file."""
    result = subprocess.run(
        command(*arguments), cwd=directory, env=environment(directory, **variables),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not [*directory.glob("rehearsal-*")]
    assert not processes_in(directory)
    return result


def processes_in(directory: Path) -> list[str]:
    """The ids of the processes that work in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or another user owns it
            if process.joinpath("cwd").readlink() == directory:
                found.append(process.name)
    return found


def report(directory: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    result = run(directory, arguments[0], "rehearse", "--json", *arguments[1:], **variables)
    assert result.returncode in (0, 1), result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (1 if found["findings"] else 0), result.stderr
    return found


@pytest.mark.parametrize("kind", dict.fromkeys(rehearsed.WRONG.values()))
def test_wrong_handlers_are_found_by_the_right_name(kind: str, tmp_path: Path) -> None:
    names = [handler.__name__ for handler, its in rehearsed.WRONG.items() if its == kind]
    findings = report(tmp_path, ",".join(names))["findings"]
    for name in names:
        found = {one["kind"] for one in findings if one["handler"] == name}
        assert {kind} <= found <= {kind, *rehearsed.ALSO.get(name, ())}, name
    assert all("/docs/" in one["advice"] for one in findings)


def test_the_page_says_how_many_handlers_are_correct_and_faulty() -> None:
    page = (PROGRAM.parents[2] / "docs/testing.md").read_text("utf-8")
    assert f"has {len(rehearsed.WRONG)} faulty handlers" in page
    assert f"{len(rehearsed.RIGHT)} correct handlers" in page


def test_the_line_of_the_kill_and_what_to_do_are_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "calls_outside_of_the_transaction", "rehearse", "--seed", "2")
    [line] = [one for one in result.stdout.splitlines() if "effects doubled:" in one]
    assert f"{PROGRAM}:" in line
    assert "'POST A-1001' 2 times, not 1" in line
    assert "record message.id in the transaction" in line
    assert line.endswith("/docs/idempotency.md")


def test_a_seed_repeats_the_rehearsal(tmp_path: Path) -> None:
    first, again = (report(tmp_path, "stops_half_way", "--seed", "5") for _ in range(2))
    assert first["findings"] == again["findings"]


def test_a_blocked_event_loop_is_named_with_its_line_and_its_time(tmp_path: Path) -> None:
    [finding] = report(tmp_path, "blocks_the_loop")["findings"]
    sleeping = PROGRAM.read_text().splitlines().index("    time.sleep(0.4)") + 1
    assert finding["text"] == f"for 0.4 s at {PROGRAM}:{sleeping}"


def test_the_team_says_which_exception_a_dependency_raises(tmp_path: Path) -> None:
    findings = report(tmp_path, "swallows_a_failure", FAILURE="TimeoutError")["findings"]
    assert "TimeoutError at" in findings[0]["text"]


def test_the_messages_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    lines = [{"type": "only_logs", "body": {"reference": f"B-{n}"}} for n in (1, 2)]
    file.write_text("\n".join(map(json.dumps, lines)))
    handlers = report(tmp_path, "only_logs,sets_a_state", "--messages", str(file))["handlers"]
    assert handlers["only_logs"]["trials"] > 10
    assert handlers["sets_a_state"]["hints"] == ["it was not rehearsed: it has no example"]


def test_dead_letters_are_rehearsed_as_the_commands_write_them(tmp_path: Path) -> None:
    headers = {"tenant": "north"}
    letters = [DeadLetter(b'{"reference": "B-17"}', "m-1", "only_logs", headers, key="k")]
    letters += [DeadLetter(b"\xff\n{", "m-2", "only_logs"), DeadLetter(b"[]", "m-3")]
    file = tmp_path / "letters.jsonl"
    listed = [json.dumps(shown(one, body=True)) for one in letters]
    one = json.dumps(shown(letters[0], body=True, headers=True), indent=2)  # by `show`
    file.write_text("\n".join([*listed, one, ""]))
    *found, last = rehearse._read(file)
    assert [(m.body, m.type) for m in found] == [(m.body, m.type) for m in letters]
    assert (last.body, last.headers, last.key) == (letters[0].body, headers, "k")
    file.write_text(f"{listed[0]}\n{one}\n")
    assert report(tmp_path, "only_logs", "--messages", str(file))["findings"] == []


def test_without_the_option_it_uses_no_broker_of_the_service(tmp_path: Path) -> None:
    """Also if an .env names another broker than the development broker, with options that belong to its queue."""
    (tmp_path / ".env").write_text(
        "CONSUMER_BROKER_URL=amqp://127.0.0.1:1/\nCONSUMER_SOURCE=orders,payments\n"
        "CONSUMER_TYPE_FROM=routing-key\nCONSUMER_DECLARE=no\nCONSUMER_ORDER_BY=body:reference\n"
    )
    result = run(tmp_path, "only_logs", "rehearse", "--seconds", "1")
    assert result.returncode == 0, result.stderr
    assert "s on sqlite: nothing lost" in result.stdout
    assert result.stderr.startswith(rehearse.FOR_REAL)


def test_what_belongs_to_the_queue_of_the_service_is_not_in_the_url_of_a_rehearsal() -> None:
    url = "mqtts://u:p@host/?client_id=orders-1&cafile=/ca.pem&subject=orders"
    assert rehearse.OPTION.sub("", url) == "mqtts://u:p@host/?cafile=/ca.pem&"


def test_what_a_handler_has_declared_of_its_failures_is_no_finding(tmp_path: Path) -> None:
    for own in ("max_attempts=1", "reject_on=(ConnectionError,)", "concurrency=1, seconds=9"):
        found = report(tmp_path, "inserts_with_the_id", OWN=f"dict({own})")
        assert found["findings"] == [], own


def test_an_example_that_is_never_handled_is_a_finding(tmp_path: Path) -> None:
    [finding] = report(tmp_path, "pauses_always")["findings"]
    assert finding["kind"] == "example fails"
    assert "its own example is not handled: Pause" in finding["text"]


# -- bad input: one sentence each, no hang, nothing left behind


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"EXAMPLE": ""}, "rehearse has no messages: EXAMPLES in handlers/__init__.py is empty"),
        ({"EFFECTS": "raises"}, "effects() failed: OSError: no table"),
        ({"EFFECTS": "random"}, "effects() is not repeatable: two calls in a row"),
        ({"EFFECTS": "hangs"}, "effects() failed: it did not return within 1 s"),
        (
            {"LIFESPAN": "raises"},
            "the service cannot start, so nothing was rehearsed: ConnectionError: no database",
        ),
        ({"LIFESPAN": "needs"}, "so nothing was rehearsed: KeyError: 'DATABASE_URL'"),
        ({"LIFESPAN": "hangs"}, "nothing was rehearsed: lifespan did not open within 1 s"),
        ({"FAILURE": "UnicodeDecodeError"}, "FAILURE in handlers/__init__.py cannot be made"),
        ({"ARGUMENTS": "--broker"}, "CONSUMER_BROKER_URL: is not set"),
        ({"CONSUMER_DRAIN_SECONDS": "soon"}, "CONSUMER_DRAIN_SECONDS: "),
        (
            {"ARGUMENTS": "--broker", "CONSUMER_BROKER_URL": "cobol://x"},
            "CONSUMER_BROKER_URL: unknown scheme 'cobol'",
        ),
    ],
)
def test_an_impossible_rehearsal_says_why_in_one_sentence(
    variables: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    more = variables.get("ARGUMENTS", "").split()
    result = run(tmp_path, "only_logs", "rehearse", *more, RUN_SECONDS="1", **variables)
    assert result.returncode == 2, result.stdout
    [line] = [one for one in result.stderr.splitlines() if one.startswith("rehearsed: ")]
    assert sentence in line
    assert "Traceback" not in result.stderr


def test_an_example_that_its_own_handler_rejects_is_a_finding(tmp_path: Path) -> None:
    [finding] = report(tmp_path, "only_logs", EXAMPLE="{}")["findings"]
    assert finding["kind"] == "example fails"
    assert "invalid payload: reference: Field required" in finding["text"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no JSON",
        '{"type": "x"}',
        "[1]",
        "\x00",
        "[" * 9999,
        '{"body": "\\ud800"}',
        '{"body_base64": "?"}',
    ],
)
def test_a_bad_file_of_messages_is_one_sentence(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    if content is not None:
        file.write_text(content)
    result = run(tmp_path, "only_logs", "rehearse", "--messages", str(file))
    assert result.returncode == 2
    assert str(file) in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_rehearsal_leaves_no_process_behind(
    signum: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command("never_ends", "rehearse"), cwd=tmp_path,
        env=environment(tmp_path, CONSUMER_DRAIN_SECONDS="60"), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signum)
    killed = signum == signal.SIGKILL
    assert process.wait(20) == (-signum if killed else 128 + signum)
    child, until = Path(f"/proc/{(tmp_path / 'began').read_text()}/status"), time.monotonic() + 10
    while killed and child.exists() and "State:\tZ" not in child.read_text():
        assert time.monotonic() < until
    assert killed or not child.exists()
    assert killed or not [*tmp_path.glob("rehearsal-*")]


# -- on the real broker


async def test_what_a_rehearsal_makes_on_a_broker_is_gone_afterwards(
    broker: Server, queue: str, settings_for: Any
) -> None:
    settings: ConsumerSettings = settings_for()
    async with make_source(settings) as source:
        before = await source.describe()
        if MISSING not in before.values() or broker.url.startswith("sqlite:"):
            pytest.skip("on this broker there is nothing to make")
        await source.declare()
        await source.publish([OutgoingMessage(b"{}", "work")])
        assert MISSING not in (await source.describe()).values()
        await source.delete()
    async with make_source(settings) as source:
        after = await source.describe()
    counts = {value for name, value in after.items() if queue in name}
    assert after == before or counts == {0}  # PostgreSQL's tables are shared


def made_for(stderr: str, broker: Server) -> set[str]:
    """The names on the broker that the rehearsal announced, and that exist."""
    [name] = [line.split()[-2] for line in stderr.splitlines() if NAMED in line]
    name = name.removesuffix("-0,")
    found = names_on(broker, [f"{name}-{place}" for place in range(3)])
    return {one for one in found if name in one}


def test_on_the_real_broker_the_same_is_found_and_nothing_is_left(
    broker: Server, tmp_path: Path
) -> None:
    names = "inserts_a_row,never_ends,retries_later"
    result = run(
        tmp_path, names, "rehearse", "--json", "--broker", CONSUMER_BROKER_URL=broker.impatient_url
    )
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    scheme = broker.url.partition(":")[0]
    assert found["brokers"] == [*dict.fromkeys(["sqlite", scheme])]
    kinds = [(one["handler"], one["kind"]) for one in found["findings"]]
    wrong = [("inserts_a_row", "effects doubled"), ("never_ends", "shutdown ignored")]
    assert kinds == wrong * len(found["brokers"]), found["findings"]
    assert found["handlers"]["retries_later"]["trials"]
    assert scheme == "sqlite" or made_for(result.stderr, broker) == set()
    assert not [*tmp_path.glob("mqtt-*.lock")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_rehearsal_leaves_on_the_broker_only_what_it_has_named(
    signum: signal.Signals, broker: Server, tmp_path: Path
) -> None:
    if broker.url.startswith("sqlite:"):
        pytest.skip("the file is the rehearsal's own")
    arguments = {"CONSUMER_BROKER_URL": broker.url, "CONSUMER_SOURCE": "the-teams-own"}
    before = names_on(broker, ["the-teams-own"])
    with (tmp_path / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            command("never_ends", "rehearse", "--broker"), cwd=tmp_path,
            env=environment(tmp_path, **arguments), stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        began = tmp_path / "began"
        while NAMED not in (said := Path(stderr.name).read_text()):
            began.unlink(missing_ok=True)
            assert process.poll() is None, said
            time.sleep(0.05)
        while not began.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signum)
        process.wait(60)
    left = made_for(said, broker)
    assert bool(left) == (signum == signal.SIGKILL), left
    assert names_on(broker, ["the-teams-own"]) - left <= before


def test_the_examples_of_a_message_vary_in_their_references_only() -> None:
    body = b'{"reference": "A-1001", "order_id": 77, "pieces": 12, "at": "2026-11-22T09:30:00Z", "day": "2026-11-22"}'
    varied, names = rehearse._vary(body, 3)
    assert varied == body.replace(b"A-1001", b"A-1004").replace(b"77", b"80")
    assert names["A-1004"] == "A-1001"


def test_a_file_that_is_not_utf_8_is_one_sentence() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\xff")
        file.flush()
        with pytest.raises(UsageError, match="has no JSON lines"):
            rehearse._read(Path(file.name))
