"""The steps of docs/own-broker.md, followed: a broker that the template does not know passes the suites of all brokers."""

import json
import shutil
from pathlib import Path

import pytest

from support.rendered import CACHES, TEMPLATE, Prove, Service, cookiecutter

OWN = Path(__file__).with_name("own_broker")
TREE = "{{cookiecutter.project_slug}}"
PACKAGE = "{{cookiecutter.package_name}}"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """This template with one more broker."""
    template = tmp_path / "template"
    passed_over = shutil.ignore_patterns(*CACHES, ".git", ".venv", ".cache")
    shutil.copytree(TEMPLATE, template, ignore=passed_over)
    brokers = template / TREE / "src" / PACKAGE / "runtime/brokers"
    # 1. The broker.
    shutil.copy(OWN / "spool.py", brokers)
    # 2. The scheme of its URLs.
    table = brokers / "__init__.py"
    row = "MODULE_OF_SCHEME = {\n"
    table.write_text(
        table.read_text("utf-8").replace(row, f'{row}    "spool": "spool",\n'), "utf-8"
    )
    # 3. The server, for the tests.
    shutil.copy(OWN / "server.py", template / TREE / "tests/runtime/harness/servers/spool.py")
    # 4. The question.
    questions = json.loads((template / "cookiecutter.json").read_text("utf-8"))
    questions["broker"].append("spool")
    questions["__prompts__"]["broker"]["spool"] = "Spool       files in folders"
    questions["_brokers"]["spool"] = {
        "title": "a spool",
        "type_property": "the field `type` of the file",
        "dependencies": [],
        "test_dependencies": [],
        "untyped": [],
        "url": "spool:///spool",
        "compose_url": "spool:////data/spool",
        "ports": [],
        "default_ports": {},
        "image": "",
        "service": {},
        "packages": "",
        "runtime": ["brokers/spool.py"],
        "tests": ["harness/servers/spool.py"],
        "kubernetes": [],
    }
    (template / "cookiecutter.json").write_text(json.dumps(questions), "utf-8")
    return template


def test_a_broker_made_by_the_guide_passes_the_suites_of_all(
    template: Path, tmp_path: Path, prove: Prove
) -> None:
    rendered = cookiecutter(tmp_path, "--no-input", "broker=spool", template=template)
    assert rendered.returncode == 0, rendered.stdout
    service = Service(tmp_path / "order-events", "order_events")
    environment = service.environment()
    for check in (["ruff", "format", "--check"], ["ruff", "check", "--no-cache"], ["mypy"]):
        checked = service.run(*check, environment=environment)
        assert checked.returncode == 0, checked.stdout
    result = service.run(
        *(
            "python",
            "-X",
            "dev",
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-n",
            "2",
            "-k",
            "spool",
        ),
        environment=environment,
    )
    assert result.returncode == 0, result.stdout
    prove("services' own suites that passed", "a broker made by docs/own-broker.md")
