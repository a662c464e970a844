"""``python3 tasks.py fleet`` shows of each service what the service's own files say."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from conftest import Render
from rendered import QUESTIONS, TEMPLATE, Result, Service, run


def fleet(*arguments: object) -> Result:
    return run(sys.executable, "fleet.py", *map(str, arguments), cwd=TEMPLATE, check=False)


def only_row(service: Service) -> dict[str, str]:
    result = fleet("--json", service.path)
    assert result.returncode == 0, result.stdout
    [row] = json.loads(result.stdout)
    assert isinstance(row, dict)
    return row


@pytest.fixture
def service(render_own: Render) -> Service:
    return render_own(broker="redis")


def test_a_service_as_it_came_has_no_drift(service: Service) -> None:
    row = only_row(service)
    assert row["service"] == "order-events"
    assert row["version"] == QUESTIONS["_template_version"]
    assert (row["broker"], row["drift"], row["shutdown_suite"]) == ("redis", "-", "there")
    assert row["drain_seconds"] == "25"
    assert "release" not in row["behind"]


def test_an_edit_a_deletion_and_an_addition_are_counted(service: Service) -> None:
    runtime = service.path / "src/order_events/runtime"
    (runtime / "logs.py").write_text("")
    (runtime / "demo.py").unlink()
    (runtime / "ours.py").write_text("")
    assert only_row(service)["drift"] == "1 edited, 1 deleted, 1 added"


def test_an_older_version_is_behind(service: Service) -> None:
    recorded = json.loads(service.read(".template-answers.json"))
    recorded["version"] = "0.0.1"
    service.write(".template-answers.json", json.dumps(recorded))
    assert only_row(service)["behind"].startswith("1 release")


def test_the_drain_seconds_are_those_that_its_files_set(service: Service) -> None:
    service.write(".env.example", "# CONSUMER_DRAIN_SECONDS=10\nCONSUMER_DRAIN_SECONDS=40\n")
    assert only_row(service)["drain_seconds"] == "40"


def test_without_that_they_are_the_default_of_its_own_settings(service: Service) -> None:
    settings = "src/order_events/runtime/settings.py"
    service.write(settings, service.read(settings).replace("Field(default=25,", "Field(default=7,"))
    assert only_row(service)["drain_seconds"] == "7"


def test_it_tells_whether_the_shutdown_suite_passed_last_time(service: Service) -> None:
    cache = service.path / ".pytest_cache/v/cache"
    cache.mkdir(parents=True)
    name = "tests/runtime/test_shutdown.py::test_x"
    (cache / "nodeids").write_text(json.dumps([name]))
    assert only_row(service)["shutdown_suite"] == "passed"
    (cache / "lastfailed").write_text(json.dumps({name: True}))
    assert only_row(service)["shutdown_suite"] == "failed"
    (service.path / "tests/runtime/test_shutdown.py").unlink()
    assert only_row(service)["shutdown_suite"] == "missing"


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_repository_is_looked_at_by_its_url(service: Service) -> None:
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm a"):
        run("git", *command.split(), cwd=service.path)
    result = fleet(service.path.as_uri())
    assert result.returncode == 0
    assert result.stdout.splitlines()[1].startswith("order-events")


def test_what_is_no_service_is_one_sentence_and_the_rest_is_shown(
    service: Service, tmp_path: Path
) -> None:
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
