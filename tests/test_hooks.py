"""Rendering is offline, needs no git, leaves no temporary files, and never overwrites a user's files."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cookiecutter.hooks import run_hook_from_repo_dir

from support.rendered import (
    BIN,
    CACHES,
    QUESTIONS,
    TEMPLATE,
    TREE,
    Render,
    Service,
    cookiecutter,
    environment_of,
    run,
)

# Every Python with it on its path imports it at start, so cookiecutter and its hooks do.
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
    assert "open src/order_events/handlers/order_created.py" in result.stdout
    assert (tmp_path / "order-events/src/order_events/handlers/order_created.py").exists()
    assert not (tmp_path / "order-events/.git").exists()


@pytest.mark.parametrize("deploy", QUESTIONS["deploy"])
def test_the_lock_is_the_first_of_the_next_steps_where_a_deployment_needs_it(
    tmp_path: Path, deploy: str
) -> None:
    result = cookiecutter(tmp_path, "--no-input", f"deploy={deploy}")
    readme = (tmp_path / "order-events/README.md").read_text(encoding="utf-8")
    deployment = readme.partition("## Deployment")[2].partition("\n## ")[0]
    needed = deploy != "none"
    assert ("    cd order-events\n    uv lock " in result.stdout) == needed
    assert ("uv lock" in deployment) == needed
    assert ("uv sync --locked" in deployment) == (deploy == "systemd")


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
    """A copy of the template, to change it."""
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


OF_OURS = (
    "src/order_events/runtime/brokers/mine.py",
    "src/order_events/runtime/brokers/nats.py",  # named like a broker of the template
    "tests/runtime/test_mine.py",
    "tests/runtime/harness/servers/mine.py",
    "tools/mine.py",
    "stubs/mine/__init__.pyi",
    "stubs/json/mine.pyi",  # in the folder of the template's other stubs
    "deploy/mine.yaml",
    # The template's text for other answers.
    "Dockerfile",
    "compose.yaml",
    "deploy/kubernetes/base/consumer.yaml",
    ".github/workflows/ci.yml",
    "renovate.json",
)
EDITED = (
    "src/order_events/runtime/operate/cli.py",
    "src/order_events/settings.py",
    "src/order_events/handlers/__init__.py",
    "tests/test_rehearsal.py",
    "tools/update.py",
    "tools/handler.stub",
    "README.md",
)


def test_rendering_again_deletes_nothing_and_overwrites_only_what_is_the_templates(
    tmp_path: Path,
) -> None:
    """Cookiecutter removes a folder that it copies, and overwrites its files even with --skip-if-file-exists."""
    answers = ("--no-input", "broker=sqlite", "deploy=none", "ci=none")
    assert cookiecutter(tmp_path, *answers).returncode == 0
    service = Service(tmp_path / "order-events", "order_events")
    for name in OF_OURS:
        (service.path / name).parent.mkdir(parents=True, exist_ok=True)
        service.write(name, "ours = 1\n")
    for name in EDITED:
        service.write(name, service.read(name) + "# ours\n")
    before = service.files
    again = cookiecutter(tmp_path, *answers, "-f", "-s")
    assert again.returncode == 0, again.stdout
    after = service.files
    vendored = {
        f"src/order_events/runtime/{name}" for name in ("MANIFEST.sha256", "operate/cli.py")
    }
    assert {name for name in before if before[name] != after.get(name)} == vendored
    assert after.keys() == before.keys()
    over = cookiecutter(tmp_path, *answers, "-f")
    assert over.returncode == 0, over.stdout
    after = service.files
    assert after.keys() == before.keys()
    overwritten = {"README.md", "tools/update.py"}
    assert {name for name in before if before[name] != after[name]} == vendored | overwritten


@pytest.mark.parametrize("answers", [(), ("broker=sqlite", "deploy=none", "telemetry=none")])
def test_the_lowest_and_the_newest_cookiecutter_render_the_same_bytes(
    tmp_path: Path, answers: tuple[str, ...]
) -> None:
    rendered = []
    for requirement in ("cookiecutter==2.1.1", "cookiecutter"):

        def make(environment: Path, requirement: str = requirement) -> None:
            run("uv", "venv", "--quiet", "--python", sys.executable, str(environment), cwd=tmp_path)
            install = ("uv", "pip", "install", "--quiet", "--python", str(environment))
            run(*install, requirement, cwd=tmp_path)

        program = (
            environment_of(["to render", requirement, sys.version], make) / BIN / "cookiecutter"
        )
        folder = tmp_path / requirement
        folder.mkdir()
        command = (str(program), str(TEMPLATE), "--no-input", "--default-config", *answers)
        run(*command, cwd=folder, env={"HOME": str(folder)})
        rendered.append(Service(folder / "order-events", "order_events").files)
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize(
    ("older", "sentence"),
    [
        ("sys.version_info = (3, 9, 18)", "needs Python 3.10 or later"),
        ("import cookiecutter; cookiecutter.__version__ = '2.0.2'", "needs cookiecutter 2.1 or later"),
    ],
)  # fmt: skip
def test_what_is_too_old_to_render_is_one_sentence(
    tmp_path: Path, older: str, sentence: str
) -> None:
    program = f"import sys; {older}; from cookiecutter.main import cookiecutter as c; c(sys.argv[1], no_input=True)"
    command = (sys.executable, "-c", program, str(TEMPLATE))
    result = run(*command, cwd=tmp_path, check=False, env={"HOME": str(tmp_path / "home")})
    assert result.returncode == 1
    assert sentence in result.stdout
    assert result.stdout.count("\n") == 1
    assert not (tmp_path / "order-events").exists()


def test_a_render_without_hooks_says_so_when_it_is_run(tmp_path: Path) -> None:
    assert cookiecutter(tmp_path, "--no-input", "--accept-hooks", "no").returncode == 0
    service = Service(tmp_path / "order-events", "order_events")
    result = service.run("python", "-m", "order_events", "demo", environment=service.environment())
    assert result.returncode == 1
    assert "the template's hooks did not run" in result.stdout
    assert result.stdout.count("\n") == 1


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
