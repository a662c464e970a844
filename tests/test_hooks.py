"""Rendering is offline, needs no git, leaves no temporary files, and never overwrites a user's files."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cookiecutter.hooks import run_hook_from_repo_dir

from support.rendered import CACHES, TEMPLATE, TREE, Render, Service, cookiecutter, run

# Imported by every Python that starts with it on its path, so by cookiecutter and by its hooks.
WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        sys.exit(f"WATCHED: the render used the network: {event} {arguments}")
    if event == "subprocess.Popen" and arguments[0] != sys.executable:
        sys.exit(f"WATCHED: the render started another program: {arguments}")

sys.addaudithook(watch)
"""


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, str]:
    """Variables for a render that may use neither the network nor any other program."""
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCHED)
    return {"PYTHONPATH": str(folder), "PATH": str(folder)}


def test_it_renders_offline_and_without_git(tmp_path: Path, watched: dict[str, str]) -> None:
    result = cookiecutter(tmp_path, "--no-input", env=watched)
    assert result.returncode == 0, result.stdout
    assert "order-events is ready" in result.stdout
    assert "edit src/order_events/handlers/order_created.py" in result.stdout
    assert (tmp_path / "order-events/src/order_events/handlers/order_created.py").exists()
    assert not (tmp_path / "order-events/.git").exists()


@pytest.mark.parametrize(
    "program",
    [
        "import subprocess; subprocess.run(['git', '--version'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
    ],
)
def test_the_watch_for_that_sees(tmp_path: Path, watched: dict[str, str], program: str) -> None:
    result = run(sys.executable, "-c", program, cwd=tmp_path, check=False, env=watched)
    assert "WATCHED: the render" in result.stdout


@pytest.mark.parametrize("answer", ["handlers=order_created", "handlers=class"])
def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, answer: str) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    cookiecutter(
        tmp_path, "--no-input", answer, env={"TMPDIR": str(temporary), "TEMP": str(temporary)}
    )
    assert list(temporary.iterdir()) == []


def test_a_folder_with_spaces_and_other_letters_is_fine(tmp_path: Path) -> None:
    folder = tmp_path / "meine Aufträge 大"
    folder.mkdir()
    result = cookiecutter(folder, "--no-input")
    assert result.returncode == 0, result.stdout
    assert (folder / "order-events/tests/handlers/test_order_created.py").exists()


@pytest.fixture
def template_copy(tmp_path: Path) -> Path:
    """A copy of the template, to be changed."""
    copy = tmp_path / "template"
    copy.mkdir()
    for name in ("cookiecutter.json", "local_extensions.py"):
        shutil.copy(TEMPLATE / name, copy)
    for name in ("hooks", TREE.name):
        shutil.copytree(TEMPLATE / name, copy / name)
    return copy


def test_what_tools_left_in_the_template_does_not_reach_a_service(
    tmp_path: Path, template_copy: Path
) -> None:
    for folder in (".", "src/{{cookiecutter.package_name}}/runtime/brokers", "tests/runtime"):
        for cache in CACHES:
            left_behind = template_copy / TREE.name / folder / cache / "deep/left.behind"
            left_behind.parent.mkdir(parents=True, exist_ok=True)
            left_behind.write_bytes(b"{{ nonsense }} \xff")
    result = cookiecutter(tmp_path, "--no-input", template=template_copy)
    assert result.returncode == 0, result.stdout
    service = Service(tmp_path / "order-events", "order_events")
    assert list(service.path.rglob("left.behind")) == []
    assert "left.behind" not in service.read("src/order_events/runtime/MANIFEST.sha256")


def test_a_wrong_row_in_the_table_of_brokers_stops_the_render(
    tmp_path: Path, template_copy: Path
) -> None:
    questions = template_copy / "cookiecutter.json"
    text = questions.read_text("utf-8")
    questions.write_text(text.replace("brokers/rabbitmq.py", "brokers/nothing.py"), "utf-8")
    result = cookiecutter(tmp_path, "--no-input", "broker=sqlite", template=template_copy)
    assert result.returncode == 1
    assert "runtime/brokers/nothing.py" in result.stdout
    assert not (tmp_path / "order-events").exists()


def test_a_second_run_of_the_hook_changes_nothing(render_own: Render, cookies: Any) -> None:
    service = render_own(handlers="order_created, payment_received")
    handler = f"src/{service.package}/handlers/order_created.py"
    service.write(handler, "# mine\n")
    before = service.files
    context = {"cookiecutter": cookies.bake({"handlers": "order_created, x"}).context}
    run_hook_from_repo_dir(str(TEMPLATE), "post_gen_project", service.path, context, False)
    assert service.files == before


def test_rendering_again_keeps_what_the_user_wrote(tmp_path: Path) -> None:
    assert cookiecutter(tmp_path, "--no-input").returncode == 0
    service = Service(tmp_path / "order-events", "order_events")
    handler, registry = (
        f"src/order_events/handlers/{name}.py" for name in ("order_created", "__init__")
    )
    service.write(handler, "# mine\n")
    again = cookiecutter(
        tmp_path, "--no-input", "--overwrite-if-exists", "handlers=order_created,payment_received"
    )
    assert again.returncode == 0, again.stdout
    assert service.read(handler) == "# mine\n"
    assert f"already exists, kept: {registry}" in again.stdout
    assert service.has("src/order_events/handlers/payment_received.py")
    assert not service.has("stubs")


def test_a_render_without_hooks_is_seen_by_the_services_own_tests(tmp_path: Path) -> None:
    result = cookiecutter(tmp_path, "--no-input", "--accept-hooks", "no")
    assert result.returncode == 0, result.stdout
    service = Service(tmp_path / "order-events", "order_events")
    drift = service.run(
        "python", "-m", "pytest", "tests/runtime/test_drift.py", environment=service.environment()
    )
    assert drift.returncode == 1
    assert "the template's hooks did not run" in drift.stdout


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param("edit", "edited: {}/__init__.py", id="an edit"),
        pytest.param("delete", "deleted: {}/__init__.py", id="a deletion"),
        pytest.param("add", "added: {}/brokers_of_mine.py", id="an addition"),
    ],
)
@pytest.mark.parametrize("folder", ["src/order_events/runtime", "tests/runtime"])
def test_drift_is_seen(render_own: Render, change: str, sentence: str, folder: str) -> None:
    service = render_own()
    if change == "edit":
        service.write(f"{folder}/__init__.py", service.read(f"{folder}/__init__.py") + "\n")
    elif change == "delete":
        (service.path / folder / "__init__.py").unlink()
    else:
        service.write(f"{folder}/brokers_of_mine.py", "")
    drift = service.run(
        "python", "-m", "pytest", "--noconftest", "tests/runtime/test_drift.py",
        environment=service.environment(),
    )  # fmt: skip
    assert drift.returncode == 1
    assert "1 failed" in drift.stdout
    assert sentence.format(folder) in drift.stdout
    check = service.run(
        "python", "-m", "order_events", "check", "--vendored", environment=service.environment()
    )
    assert check.returncode == 1
    first_line, advice = check.stdout.splitlines()
    assert first_line == sentence.format(folder)
    assert "move your own code out" in advice
