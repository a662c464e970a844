"""The Dockerfile of a service, built by buildah and run by podman: the image that tests/support/image.py imitates.

The base image is a stand-in of the same name, from Debian's Python: no registry is asked.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.process import ask
from harness.servers import ServerMissing, skip_without_server
from harness.servers.local import free_port
from support.boot import PACKAGES, REAPER, Machine, booted
from support.rendered import INSTALLERS, Render, run
from tools.servers import roots

BASE = "docker.io/library/python:3.13-slim"
IMAGE = "localhost/order-events"
# Without a cgroup of its own, and with no more rights than a process of the tests has.
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
    run("uv", "lock", "--quiet", cwd=service.path)
    mounts = {base: "/srv/base", service.path: "/srv/service", Path("/etc/ssl"): "/etc/ssl"}
    files = {**FILES, "/etc/resolv.conf": Path("/etc/resolv.conf").read_text()}
    with booted(root, folder, files, mounts, REAPER) as machine:
        container = machine.run("buildah", "from", "scratch")
        machine.run("buildah", "add", "--quiet", container, "/srv/base", "/")
        # As in the real one, its Python is not managed by Debian.
        mounted = machine.run("buildah", "mount", container)
        machine.run("sh", "-c", f"rm {mounted}/usr/lib/python3*/EXTERNALLY-MANAGED")
        machine.run("buildah", "commit", "--quiet", "--rm", container, BASE)
        yield machine


@pytest.fixture(scope="module")
def image(machine: Machine) -> str:
    """Of the Dockerfile as it was rendered."""
    inherited = [name for name in os.environ if name.startswith(INSTALLERS)]
    variables = [f"--env={name}={os.environ[name]}" for name in inherited]
    options = ["--isolation=chroot", "--network=host", "--pull=never", "--format=docker", *ULIMITS]
    options += ["--volume=/etc/ssl:/etc/ssl:ro", f"--tag={IMAGE}"]
    machine.run("buildah", "build", *options, *variables, "/srv/service")
    return IMAGE


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
