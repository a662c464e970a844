"""The Dockerfile of a service, built by buildah and run by podman: the image that tests/support/image.py imitates.

Stand-ins replace its base images, from Debian's Python and this machine's uv: no registry is needed.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness.process import ask
from harness.servers import ServerMissing, skip_without_server
from harness.servers.local import free_port
from support.boot import PACKAGES, REAPER, Machine, booted
from support.image import instructions
from support.rendered import INSTALLERS, Render, parse_yaml, run
from tools.servers import roots

IMAGE = "ghcr.io/team/order-events:v3.2.1-7"
OF_THE_JOB = {
    "GITHUB_REF_NAME": "v3.2.1",
    "GITHUB_REPOSITORY": "Team/orders",
    "GITHUB_REPOSITORY_OWNER": "Team",
    "GITHUB_RUN_NUMBER": "7",
    "GITHUB_SERVER_URL": "https://git.example.com",
    "GITHUB_SHA": "0123456789abcdef0123456789abcdef01234567",
}
# Without its own cgroup, and with no more rights than a process of the tests.
CONTAINERS = """\
[containers]
cgroups = "disabled"
netns = "host"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
default_sysctls = []
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
"""
FILES = {
    "/etc/containers/policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
    "/etc/containers/storage.conf": '[storage]\ndriver = "vfs"\nrunroot = "/run/c"\ngraphroot = "/srv/c"\n',
    "/etc/containers/containers.conf": CONTAINERS,
}
ULIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")


@pytest.fixture(scope="module")
def machine(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """With podman, buildah, the base image, and a service's folder at /srv/service."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip(roots.why_not())  # our workflow runs these as root too
    try:
        root = roots.made("trixie", ["buildah", "crun", "mount", "podman"])
        base = roots.made("trixie", PACKAGES)
    except roots.RootMissing as reason:
        skip_without_server(ServerMissing(f"there is no podman: {reason}"))
    folder = tmp_path_factory.mktemp("machine")
    service = render(broker="sqlite", deploy="compose").copy_to(folder)
    declared = service.read("pyproject.toml").replace('version = "0.1.0"', 'version = "3.2.1"')
    license = re.compile("^# license = .*$", re.M)
    service.write("pyproject.toml", license.sub('license = "LicenseRef-Team"', declared))
    run("uv", "lock", "--quiet", cwd=service.path)
    steps = instructions(service.read("Dockerfile"))
    uv_image, python_image = dict.fromkeys(
        text.partition(" AS ")[0] for name, text in steps if name == "FROM"
    )
    mounts = {base: "/srv/base", service.path: "/srv/service", Path("/etc/ssl"): "/etc/ssl"}
    mounts[Path(shutil.which("uv") or "").parent] = "/srv/uv"
    files = {**FILES, "/etc/resolv.conf": Path("/etc/resolv.conf").read_text()}
    with booted(root, folder, files, mounts, REAPER) as machine:
        container = machine.run("buildah", "from", "scratch")
        machine.run("buildah", "add", "--quiet", container, "/srv/base", "/")
        # Like in the real image, its Python is not managed by Debian.
        mounted = machine.run("buildah", "mount", container)
        machine.run("sh", "-c", f"rm {mounted}/usr/lib/python3*/EXTERNALLY-MANAGED")
        python_image = f"docker.io/library/{python_image}"
        machine.run("buildah", "commit", "--quiet", "--rm", container, python_image)
        container = machine.run("buildah", "from", "scratch")
        machine.run("buildah", "add", "--quiet", container, "/srv/uv/uv", "/uv")
        machine.run("buildah", "commit", "--quiet", "--rm", container, uv_image)
        yield machine


@pytest.fixture(scope="module")
def image(machine: Machine, render: Render) -> str:
    """The image of the rendered Dockerfile, built by the command of the job that publishes it."""
    workflow = render(broker="sqlite", deploy="compose").read(".github/workflows/ci.yml")
    steps = parse_yaml(workflow)["jobs"]["publish"]["steps"]
    [script] = [step["run"] for step in steps if "docker build" in step.get("run", "")]
    build, login, _ = script.partition("docker login")
    assert login
    inherited = {name: text for name, text in os.environ.items() if name.startswith(INSTALLERS)}
    options = ["--isolation=chroot", "--network=host", "--pull=never", "--format=docker", *ULIMITS]
    options += [
        "--volume=/etc/ssl:/etc/ssl:ro",
        *(f"--env={name}={inherited[name]}" for name in inherited),
    ]
    # `build --pull` is omitted: the stand-ins are local.
    as_docker = f'docker() {{ shift 2; buildah build {shlex.join(options)} "$@"; }}'
    variables = {**inherited, **OF_THE_JOB, "PATH": "/srv/uv:/usr/sbin:/usr/bin"}
    environment = [f"{name}={text}" for name, text in variables.items()]
    there = f"cd /srv/service\n{as_docker}\n{build}"
    machine.run("env", *environment, "bash", "-ec", there)
    return IMAGE


def test_the_image_says_what_it_is_made_of(machine: Machine, image: str) -> None:
    labels = json.loads(machine.run("podman", "inspect", "--format={{json .Labels}}", image))
    ours = {
        name.removeprefix("org.opencontainers.image."): text
        for name, text in labels.items()
        if name.startswith("org.opencontainers.image.")
    }
    assert datetime.fromisoformat(ours.pop("created")).tzinfo == UTC
    assert ours == {
        "licenses": "LicenseRef-Team",
        "revision": OF_THE_JOB["GITHUB_SHA"],
        "source": "https://git.example.com/Team/orders",
        "version": "3.2.1",
    }


def test_the_image_runs_read_only_is_healthy_and_stops_on_sigterm(
    machine: Machine, image: str
) -> None:
    port = free_port()
    options = ["--detach", "--name=service", "--cgroups=disabled", "--network=host", "--read-only"]
    options += ["--tmpfs=/data:mode=1777", "--env=CONSUMER_BROKER_URL=sqlite:////data/messages.db"]
    machine.run("podman", "run", *options, f"--env=CONSUMER_PROBE_PORT={port}", image)
    machine.run(
        "sh", "-c", "until podman logs service 2>&1 | grep -q '\"consuming\"'; do sleep 0.1; done"
    )
    assert machine.run("podman", "exec", "service", "id", "-u") == "10001"
    assert machine.run("podman", "exec", "service", "cat", "/proc/1/comm") == "order-events"
    failed = machine.run("podman", "exec", "service", "touch", "/app/file", check=False)
    assert "Read-only file system" in failed
    assert ask(port, "/livez")[0] == 200
    machine.run("podman", "healthcheck", "run", "service")
    machine.run("podman", "stop", "--time=40", "service")
    state = json.loads(machine.run("podman", "inspect", "--format={{json .State}}", "service"))
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    events = re.findall(r'"event": "(\w+)"', machine.run("podman", "logs", "service"))
    assert events[-3:] == ["draining", "drained", "stopped"]
