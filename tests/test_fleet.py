"""``python3 tasks.py fleet`` prints the facts from each service's own files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.rendered import QUESTIONS, Render, Result, Service, run, run_tool
from tools import ROOT
from tools import fleet as fleet_module


def fleet(*arguments: object) -> Result:
    return run_tool("fleet", *arguments, check=False)


def only_row(service: Service) -> dict[str, str]:
    result = fleet("--json", service.path)
    assert result.returncode == 0, result.stdout
    [row] = json.loads(result.stdout)
    assert isinstance(row, dict)
    return row


@pytest.fixture
def service(render_own: Render) -> Service:
    return render_own(broker="redis")


def test_an_unmodified_service_has_no_drift(service: Service) -> None:
    row = only_row(service)
    assert row["service"] == "order-events"
    assert row["version"] == QUESTIONS["_template_version"]
    assert (row["broker"], row["drift"], row["shutdown_suite"]) == ("redis", "-", "there")
    assert row["drain_seconds"] == "25"
    assert "release" not in row["behind"]


def test_an_edit_a_deletion_and_an_addition_are_counted(service: Service) -> None:
    runtime = service.path / "src/order_events/runtime"
    (runtime / "logs.py").write_text("")
    (runtime / "operate/demo.py").unlink()
    (runtime / "ours.py").write_text("")
    assert only_row(service)["drift"] == "1 edited, 1 deleted, 1 added"


def test_what_a_service_says_of_its_own_drift_is_not_asked(service: Service) -> None:
    service.write("src/order_events/runtime/operate/vendored.py", "raise SystemExit('no drift')\n")
    assert only_row(service)["drift"] == "1 edited"


def test_the_last_rehearsal_is_shown_with_its_result(service: Service) -> None:
    assert only_row(service)["rehearsed"] == "never here"
    kept = {"at": "2026-11-30T08:15:02Z", "brokers": ["sqlite", "redis"], "findings": []}
    service.write(".rehearsal.json", json.dumps(kept))
    assert only_row(service)["rehearsed"] == "2026-11-30 08:15 on sqlite and redis: kept"
    service.write(".rehearsal.json", json.dumps({**kept, "findings": [{}, {}]}))
    assert only_row(service)["rehearsed"] == "2026-11-30 08:15 on sqlite and redis: 2 broken"
    service.write(".rehearsal.json", "[]")
    assert only_row(service)["rehearsed"] == "never here"


def test_the_rehearsal_of_a_services_tests_is_on_its_broker_and_is_shown(service: Service) -> None:
    rehearsal = (sys.executable, "-m", "pytest", "-q", "tests/test_rehearsal.py")
    result = run(*rehearsal, cwd=service.path, check=False, env={"PYTHONPATH": "src"})
    assert result.returncode == 0, result.stdout
    if not (os.environ.get("CONSUMER_TEST_BROKER_URL") or shutil.which("redis-server")):
        pytest.skip("there is no Redis for the tests")
    assert only_row(service)["rehearsed"].endswith(" on sqlite and redis: kept")
    none = {"PYTHONPATH": "src", "PATH": "", "CONSUMER_TEST_BROKER_URL": "", "REQUIRE_BROKERS": "1"}
    result = run(*rehearsal, cwd=service.path, check=False, env=none)
    assert result.returncode == 1, "a missing broker is an error in CI"


def test_an_older_version_is_behind(service: Service) -> None:
    recorded = json.loads(service.read(".template-answers.json"))
    recorded["version"] = "0.0.1"
    service.write(".template-answers.json", json.dumps(recorded))
    assert only_row(service)["behind"].startswith("1 release")


def test_an_unreleased_section_is_no_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = "## 0.3.0 (not released)\n\n## 0.2.0 (2026-12-01)\n\n## 0.1.0 (2026-11-01)\n"
    (tmp_path / "CHANGELOG.md").write_text(changes)
    monkeypatch.setattr(fleet_module, "ROOT", tmp_path)
    assert fleet_module.how_far_behind("0.2.0", "") == "-"
    assert fleet_module.how_far_behind("0.1.0", "") == "1 release"


def test_the_security_releases_that_a_service_lacks_are_named(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the releases that it has, and not an unreleased one."""
    notes = "\n\n### Upgrade notes\n\nNone.\n\n"
    security = f"\n\n### Security\n\n- A message could end the process.{notes}"
    (tmp_path / "CHANGELOG.md").write_text(
        f"## 0.12.0 (not released){security}## 0.11.0 (2027-01-01){security}## 0.10.0 (2026-12-09){notes}"
        f"## 0.2.1 (2026-12-02){security}## 0.2.0 (2026-12-01){security}## 0.1.0 (2026-11-01){notes}"
    )
    monkeypatch.setattr(fleet_module, "ROOT", tmp_path)
    recorded = json.loads(service.read(".template-answers.json"))
    for version, lacked in (("0.2.0", "0.11.0, 0.2.1"), ("0.10.0", "0.11.0"), ("0.11.0", "-")):
        service.write(".template-answers.json", json.dumps({**recorded, "version": version}))
        row = fleet_module.row(service.path)
        assert row.security == lacked
        assert "security" in fleet_module.table([row]).splitlines()[0]


def test_the_drain_seconds_are_those_that_its_files_set(service: Service) -> None:
    service.write(".env.example", "# CONSUMER_DRAIN_SECONDS=10\nCONSUMER_DRAIN_SECONDS=40\n")
    assert only_row(service)["drain_seconds"] == "25, 40"
    deployed = "deploy/kubernetes/base/kustomization.yaml"
    service.write(deployed, service.read(deployed).replace("SECONDS=25", "SECONDS=40"))
    assert only_row(service)["drain_seconds"] == "40"


def test_without_that_they_are_the_default_of_its_own_settings(render_own: Render) -> None:
    service = render_own(deploy="none")
    settings = "src/order_events/runtime/settings.py"
    service.write(settings, service.read(settings).replace("Field(default=25,", "Field(default=7,"))
    assert only_row(service)["drain_seconds"] == "7"


SUITE = "tests/runtime/test_shutdown.py"
PASSES, SKIPS, FAILS = (
    f"def test_{name}() -> None:\n    {what}\n\n\n"
    for name, what in (
        ("one", "assert True"),
        ("two", "pytest.skip('no server')"),
        ("three", "assert False"),
    )
)


@pytest.fixture
def quick(render_own: Render) -> Service:
    """A service that can run its tests, with an empty shutdown suite."""
    service = render_own(broker="sqlite")
    for path in (service.path / "tests/runtime").glob("test_*.py"):
        path.unlink()
    return service


@pytest.mark.parametrize("arguments", [[], ["-n", "2"], ["-n", "2", SUITE]], ids=" ".join)
@pytest.mark.parametrize(
    ("tests", "said"),
    [
        (PASSES, "1 passed"),
        (SKIPS, "1 skipped"),
        (PASSES + SKIPS + FAILS, "1 failed, 1 passed, 1 skipped"),
    ],
    ids=["all pass", "all skip", "one fails"],
)
def test_it_shows_the_outcome_of_the_shutdown_suite(
    quick: Service, tests: str, said: str, arguments: list[str]
) -> None:
    quick.write(SUITE, f"import pytest\n\n\n{tests}")
    assert only_row(quick)["shutdown_suite"] == "there"
    run_tests(quick, *arguments)
    assert only_row(quick)["shutdown_suite"] == said


def test_the_outcome_stays_until_the_next_run(quick: Service) -> None:
    quick.write(SUITE, PASSES)
    for arguments in ([SUITE], ["tests/handlers"]):
        run_tests(quick, *arguments)
        assert only_row(quick)["shutdown_suite"] == "1 passed"
    quick.write(SUITE, "import nothing_of_this_name\n")
    run_tests(quick, SUITE)
    assert only_row(quick)["shutdown_suite"] == "1 failed"
    (quick.path / SUITE).unlink()
    assert only_row(quick)["shutdown_suite"] == "missing"


def run_tests(service: Service, *arguments: str) -> None:
    service.run("python", "-m", "pytest", *arguments, environment=service.environment())


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"passed": [1]}', '{"passed": "x"}'])
def test_an_invalid_record_of_the_outcome_is_ignored(service: Service, kept: str) -> None:
    folder = service.path / ".pytest_cache/v/consumer"
    folder.mkdir(parents=True)
    (folder / "shutdown_suite").write_text(kept)
    assert only_row(service)["shutdown_suite"] == "there"


@pytest.mark.parametrize("manifest", [None, b"no hash", b"\xff"])
def test_what_cannot_be_compared_is_no_drift(service: Service, manifest: bytes | None) -> None:
    file = service.path / "src/order_events/runtime/MANIFEST.sha256"
    file.unlink()
    if manifest:
        file.write_bytes(manifest)
    assert only_row(service)["drift"] == "not comparable"


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_repository_is_looked_at_by_its_url_and_no_link_in_it_is_followed(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "local").write_text("CONSUMER_DRAIN_SECONDS=99\n", encoding="utf-8")
    (service.path / "compose.yaml").symlink_to(tmp_path / "local")
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm a"):
        run("git", *command.split(), cwd=service.path)
    result = fleet(service.path.as_uri())
    assert result.returncode == 0
    assert result.stdout.splitlines()[1].startswith("order-events")
    assert "99" not in result.stdout


TOO_DEEP = "[" * 100_000
"""JSON that is nested too deeply."""


def test_files_that_cannot_be_read_hide_no_service(service: Service) -> None:
    for name in (".pytest_cache/v/consumer", "deploy/folder.yaml"):
        (service.path / name).mkdir(parents=True)
    (service.path / "deploy/link.yaml").symlink_to("nowhere")
    (service.path / ".pytest_cache/v/consumer/shutdown_suite").write_text('{"passed": Infinity}')
    (service.path / ".rehearsal.json").write_text(TOO_DEEP)
    settings = service.path / "src/order_events/runtime/settings.py"
    settings.write_bytes(settings.read_bytes() + b"# \xff\n")
    row = only_row(service)
    assert (row["shutdown_suite"], row["rehearsed"], row["drift"]) == (
        *("there", "never here", "1 edited"),
    )


def test_a_folder_that_is_no_service_is_one_sentence_and_the_rest_is_shown(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / ".template-answers.json").write_text(TOO_DEEP)
    result = fleet(tmp_path, "https://user:secret@127.0.0.1:1/x", service.path)
    assert result.returncode == 1
    assert "it has no .template-answers.json" in result.stdout
    assert (
        "fleet: https://127.0.0.1:1/x: it is no folder, and git cannot clone it." in result.stdout
    )
    assert "secret" not in result.stdout
    assert "\norder-events" in result.stdout


def test_a_hostile_service_cannot_steer_the_terminal(service: Service) -> None:
    recorded = json.loads(service.read(".template-answers.json"))
    recorded["answers"]["broker"] = "\x1b[2J"
    service.write(".template-answers.json", json.dumps(recorded))
    assert "\x1b" not in fleet(service.path).stdout


def receipt(**fields: object) -> str:
    """A line of a log with a receipt."""
    counts = {"in_flight": 3, "finished": 2, "requeued": 5, "abandoned": [], "abandoned_count": 1}
    about = {"event": "stopped", "service": "orders", "version": "1.2", "seconds": 1.5}
    return json.dumps({**about, **counts, "exit_code": 0, "signal": "SIGTERM", **fields})


def test_receipts_are_summed_for_each_version_of_a_service(tmp_path: Path) -> None:
    one, two = tmp_path / "one.log", tmp_path / "two.log"
    one.write_text(
        "\n".join(
            [
                '{"event": "draining", "in_flight": 3}',
                f"[pod/orders-7] {receipt()}",
                f"<3>{receipt(exit_code=75, seconds=25.1)}",
                f"2026-11-30T08:00:00Z {receipt(version='1.3')}",
            ]
        )
    )
    two.write_text(f"{receipt(exit_code=130)}\n{receipt(exit_code=1)}\n{receipt()[:80]}\nstopped\n")
    result = fleet("--json", "--receipts", one, two)
    assert result.returncode == 0, result.stdout
    old, new = json.loads(result.stdout)
    assert old == {
        **{"service": "orders", "version": "1.2", "shutdowns": 4, "longest_seconds": 25.1},
        **{"drained": 1, "deadline": 1, "forced": 1, "failed": 1},
        **{"in_flight": 12, "finished": 8, "requeued": 20, "abandoned": 4},
    }
    assert (new["version"], new["shutdowns"]) == ("1.3", 1)


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "stopped"}',
        receipt(exit_code="x"),
        receipt(seconds=None),
        receipt(in_flight=1e999),
        '{"event": "stopped", "a": ' + "[" * 100_000,
        receipt(event="said stopped"),
    ],
    ids=range(6),
)
def test_what_is_no_receipt_does_not_count(line: str) -> None:
    assert fleet_module.receipt_in(line) is None


def test_receipts_come_from_standard_input_too_and_a_missing_file_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tasks.py"), "fleet", "--receipts"]
    result = subprocess.run(
        command, input=receipt(service="a\x1bb") + "\n", capture_output=True, text=True, check=True
    )
    assert "a?b" in result.stdout
    assert "longest seconds" in result.stdout
    missing = fleet("--receipts", tmp_path / "none.log")
    assert missing.returncode == 1
    assert f"fleet: {tmp_path / 'none.log'}: No such file or directory" in missing.stdout
