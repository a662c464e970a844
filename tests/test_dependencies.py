"""The dependencies of each service can be resolved today: the newest and the oldest that it allows.

At once for every Python that it supports, by `--universal`.
"""

import re

import pytest

from support.rendered import QUESTIONS, Prove, Render, run

BROKERS = pytest.mark.parametrize("broker", QUESTIONS["broker"])
TELEMETRIES = pytest.mark.parametrize("telemetry", ["both"])  # has all dependencies of the others
COMPILE = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
COMPILE += ["--no-header", "--no-annotate"]
ALL = ["--group", "dev", "pyproject.toml"]


@BROKERS
@TELEMETRIES
@pytest.mark.parametrize("resolution", ["highest", "lowest-direct"])
def test_the_dependencies_resolve(
    render: Render, prove: Prove, broker: str, telemetry: str, resolution: str
) -> None:
    service = render(broker=broker, telemetry=telemetry)
    resolved = run(*COMPILE, "--resolution", resolution, *ALL, cwd=service.path).stdout
    declared = service.metadata["project"]["dependencies"]
    for requirement in declared:
        name, lowest = re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]  # no match is a failure
        [version] = re.findall(rf"^{name}==([\w.]+)", resolved, re.M)
        if resolution == "lowest-direct":
            assert release(version) == release(lowest), f"{requirement}: no such release"
    prove("sets of dependencies that resolve", resolution)


def release(version: str) -> list[int]:
    """2.0 and 2.0.0 are the same release."""
    numbers = [int(number) for number in version.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return numbers


@pytest.mark.parametrize(
    "wrong",
    [
        "aio-pika>=10.2,<10.1",
        "aio-pika>=999,<1000",
        "aio-pika>=10.2,<11\", \"aio-pika>=999; python_version >= '3.13'",
    ],
    ids=["empty", "unreleased", "on a later Python"],
)
def test_that_check_sees(render_own: Render, wrong: str) -> None:
    service = render_own(broker="rabbitmq")
    text = service.read("pyproject.toml")
    service.write("pyproject.toml", text.replace("aio-pika>=10.2,<11", wrong))
    result = run(*COMPILE, *ALL, cwd=service.path, check=False)
    assert "No solution found" in result.stdout
