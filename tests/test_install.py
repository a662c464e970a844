"""A service runs and is tested by its README's commands, and can be installed like any package."""

import os
import re
import sys
from itertools import product
from pathlib import Path

import pytest

from support.rendered import BIN, CHOICES, QUESTIONS, Prove, Render, Service, run

BROKERS = pytest.mark.parametrize("broker", QUESTIONS["broker"])


def commands_in_readme(service: Service, about: str) -> str:
    """The only block of shell commands with this word."""
    blocks = re.findall(r"```sh\n(.*?)```", service.read("README.md"), re.S)
    [block] = [block for block in blocks if about in block]
    assert isinstance(block, str)
    return block


BY_PIP = ("rabbitmq", "kafka", "sqs")
"""pip is slower than uv; these three have the most dependencies, and pip's commands are the same for all."""


SHORTER = {"PYTEST_ADDOPTS": "-m 'not slow' -k 'handlers or test_contract'", "PIP_COMPILE": "0"}
"""Only tests of the handlers and the contract: test_suites.py runs the others. pip does not compile modules."""


@pytest.mark.parametrize(
    ("way", "broker"),
    [*product(["uv run"], QUESTIONS["broker"]), *product(["-m venv"], BY_PIP)],
)
def test_the_commands_of_the_readme_work(
    render_own: Render, prove: Prove, broker: str, way: str
) -> None:
    service = render_own(broker=broker)
    commands = commands_in_readme(service, way)
    result = run("sh", "-ex", "-c", commands, cwd=service.path, env=SHORTER)
    assert re.search(r"published 20, handled 20, dead letters 0", result.stdout), result.stdout
    assert re.search(r"\d+ passed", result.stdout), result.stdout
    prove("ways of the README that work", f"{way}, broker={broker}")


@BROKERS
def test_an_installed_service_needs_nothing_but_its_package(
    render_own: Render, prove: Prove, tmp_path: Path, broker: str
) -> None:
    service = render_own(broker=broker)
    declared = service.read("pyproject.toml").replace('version = "0.1.0"', 'version = "3.2.1"')
    service.write("pyproject.toml", declared)
    environment = tmp_path / "environment"
    wheels = tmp_path / "wheels"
    run("uv", "build", "--quiet", "--wheel", "--out-dir", str(wheels), cwd=service.path)
    [wheel] = wheels.glob("*.whl")
    run("uv", "venv", "--quiet", "--python", sys.executable, str(environment), cwd=tmp_path)
    install = ["uv", "pip", "install", "--quiet", "--python", str(environment)]
    run(*install, str(wheel), cwd=tmp_path)
    variables = {
        "PATH": f"{environment / BIN}{os.pathsep}{os.environ['PATH']}",
        "CONSUMER_BROKER_URL": f"sqlite:///{tmp_path}/messages.db",
    }
    message = service.example("order_created")
    published = run("order-events", "publish", message, cwd=tmp_path, env=variables)
    assert "published 1 message to order-events" in published.stdout
    checked = run("order-events", "check", cwd=tmp_path, env=variables)
    assert "broker     ok, sqlite" in checked.stdout
    template = f"cookiecutter-consumer {QUESTIONS['_template_version']}"
    versions = run("order-events", "--version", cwd=tmp_path, env=variables).stdout
    assert versions == f"order-events 3.2.1 ({template}, {broker})\n"
    prove("installed from a wheel", f"broker={broker}")


DIFFERENCES = """
import os
from order_events.handlers import HANDLERS
from order_events.runtime.handlers import Router
from order_events.runtime.service import prefetch_of
from order_events.runtime.settings import ConsumerSettings

def settings_of(names):
    os.environ.update({name: shown[name] for name in names})
    return ConsumerSettings(_env_file=None)

shown = dict(line[2:].split("=", 1) for line in os.environ["SHOWN"].splitlines())
plain, stated = settings_of([]), settings_of([*shown])
router = Router(HANDLERS)
assert prefetch_of(plain, router) == prefetch_of(stated, router)
print(sorted(name for name, value in stated if value != getattr(plain, name)))
"""


@pytest.mark.parametrize("stub", CHOICES["handler_stub"])
def test_the_commented_lines_of_the_example_are_the_defaults(render: Render, stub: str) -> None:
    service = render(handler_stub=stub)
    shown = re.findall(r"^# CONSUMER_\w+=.*$", service.read(".env.example"), re.M)
    differ = service.run(
        *["python", "-c", DIFFERENCES],
        environment=service.environment(),
        CONSUMER_BROKER_URL="sqlite:///messages.db",
        SHOWN="\n".join(shown),
    )
    assert differ.returncode == 0, differ.stdout
    assert differ.stdout == "['group', 'prefetch', 'source']\n", "set from other settings at start"


@pytest.mark.parametrize("telemetry", CHOICES["telemetry"])
@pytest.mark.parametrize("deploy", CHOICES["deploy"])
def test_the_example_says_where_the_variables_of_opentelemetry_come_from(
    render: Render, deploy: str, telemetry: str
) -> None:
    service = render(deploy=deploy, telemetry=telemetry)
    example = service.read(".env.example")
    sent = telemetry in ("opentelemetry", "both")
    assert ("OTEL_EXPORTER_OTLP_ENDPOINT" in example) == sent
    assert ("EnvironmentFile" in example) == (deploy == "systemd")
    assert ("only under systemd" in example) == (sent and deploy == "systemd")


@BROKERS
def test_the_example_of_an_env_file_says_what_is_true(render_own: Render, broker: str) -> None:
    service = render_own(broker=broker)
    example = service.read(".env.example")
    settings = service.read("src/order_events/runtime/settings.py")
    fields = re.findall(
        r"^    (\w+): [\w |]+ = Field|^    (broker_url|declare|log_\w+|duration_\w+): ",
        settings,
        re.M,
    )
    variables = {f"CONSUMER_{''.join(names)}".upper() for names in fields}
    assert variables == set(re.findall(r"^(?:# )?(CONSUMER_\w+)=", example, re.M))
    service.write(".env", re.sub(r"^# (CONSUMER_\w+=)", r"\1", example, flags=re.M))
    for command in ("declare", "check"):
        checked = service.run(
            "python", "-m", "order_events", command,
            environment=service.environment(), CONSUMER_BROKER_URL="sqlite:///messages.db",
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout
