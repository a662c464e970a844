"""What each service declares can be resolved today: the newest and the oldest that it allows, on each Python."""

import re

import pytest

from conftest import Prove, Render
from rendered import QUESTIONS, run

BROKERS = pytest.mark.parametrize("broker", QUESTIONS["broker"])
TELEMETRIES = pytest.mark.parametrize("telemetry", ["prometheus", "opentelemetry"])
COMPILE = ["uv", "pip", "compile", "--quiet", "--universal", "--no-header", "--no-annotate"]
ALL = ["--group", "dev", "pyproject.toml"]


@BROKERS
@TELEMETRIES
@pytest.mark.parametrize(
    ("python", "resolution"),
    [("3.11", "highest"), ("3.12", "highest"), ("3.13", "highest"), ("3.11", "lowest-direct")],
)
def test_the_dependencies_resolve(
    render: Render, prove: Prove, broker: str, telemetry: str, python: str, resolution: str
) -> None:
    service = render(broker=broker, telemetry=telemetry)
    choice = ["--python-version", python, "--resolution", resolution]
    resolved = run(*COMPILE, *choice, *ALL, cwd=service.path).stdout
    declared = service.metadata["project"]["dependencies"]
    for requirement in declared:
        name, lowest = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]  # no match is a failure
        [version] = re.findall(rf"^{name}==([\w.]+)", resolved, re.M)
        if resolution == "lowest-direct":
            assert release(version) == release(lowest), f"{requirement}: no such release"
    prove("sets of dependencies that resolve", f"Python {python}, {resolution}")


def release(version: str) -> list[int]:
    """2.0 is the same release as 2.0.0."""
    numbers = [int(number) for number in version.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return numbers


@pytest.mark.parametrize("wrong", ["aio-pika>=10.2,<10.1", "aio-pika>=999,<1000"])
def test_that_check_sees(render_own: Render, wrong: str) -> None:
    service = render_own(broker="rabbitmq")
    text = service.read("pyproject.toml")
    service.write("pyproject.toml", text.replace("aio-pika>=10.2,<11", wrong))
    result = run(*COMPILE, "--python-version", "3.11", *ALL, cwd=service.path, check=False)
    assert "No solution found" in result.stdout
