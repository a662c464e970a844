"""An imitation of Docker: runs the instructions of a service's Dockerfile in their own root, and starts the image.

The base image is this machine's /usr and /etc, read-only, with the Python of these tests where it always is, as
not each one can be moved. What it takes is Linux, root, and the programs `unshare`, `mount` and `chroot`. Where
there are also buildah and podman, tests/test_image.py builds and runs the image by them.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from support.rendered import INSTALLERS, Result, Service

OF_THE_MACHINE = ("usr", "bin", "sbin", "lib", "lib64", "etc")
PYTHON = sys.base_prefix
BASE_VARIABLES = {"PATH": f"{PYTHON}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": "/root"}
IN_NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]


def why_not_here() -> str:
    """Why images cannot be built on this machine; empty if they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can give a process a root of its own"
    if PYTHON == "/usr" or not Path(PYTHON, "bin/pip").exists():
        return "this Python has no folder and no pip of its own, as that of the base image has"
    probe = subprocess.run([*IN_NAMESPACES, "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
    return "" if probe.returncode == 0 else "there are no namespaces to be had here"


@dataclass
class Stage:
    """A root, and the settings of commands in it."""

    root: Path
    variables: dict[str, str] = field(default_factory=lambda: dict(BASE_VARIABLES))
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def path(self, inside: str) -> Path:
        return self.root / os.path.normpath(Path("/", self.folder, inside)).lstrip("/")

    def mounts(self) -> str:
        """Shell commands that prepare the root."""
        local = self.root.with_suffix(".local")
        lines = [f"mount --bind {self.root} {self.root}"]
        for name in OF_THE_MACHINE:
            if Path("/", name).exists():
                mounted = self.root / name
                mounted.mkdir(exist_ok=True)
                # The copied files, over the machine's; without a folder for changes the root is read-only.
                lines.append(f"mount -t overlay -o lowerdir={mounted}:/{name} overlay {mounted}")
        for path in (local / "upper", local / "work", self.path(PYTHON)):
            path.mkdir(parents=True, exist_ok=True)
        overlay = f"lowerdir={PYTHON},upperdir={local}/upper,workdir={local}/work"
        lines.append(f"mount -t overlay -o {overlay} overlay {self.path(PYTHON)}")
        for name in ("proc", "dev", "tmp", "root"):
            (self.root / name).mkdir(exist_ok=True)
        lines += [f"mount -t proc proc {self.root}/proc", f"mount --bind /dev {self.root}/dev"]
        return "\n".join(lines)

    def run(self, command: str) -> Result:
        """Run like RUN: in a shell, as root, with the variables that installers need."""
        inherited = {name: text for name, text in os.environ.items() if name.startswith(INSTALLERS)}
        variables = [f"{name}={text}" for name, text in {**inherited, **self.variables}.items()]
        there = ["env", "-i", "-C", self.folder, *variables, "sh", "-c", command]
        script = f"{self.mounts()}\nexec chroot {self.root} {shlex.join(there)}"
        return subprocess.run(
            [*IN_NAMESPACES, "sh", "-ec", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def start(self, *, writable: list[str], **variables: str) -> subprocess.Popen[str]:
        """The container: process 1 of its own namespace, the image's user, and no writable folders except these."""
        script = [self.mounts(), f"mount -t tmpfs -o mode=1777 tmp {self.root}/tmp"]
        script += [f"mount --bind {self.root}{folder} {self.root}{folder}" for folder in writable]
        script += [f"mount -o remount,bind,ro {self.root}{part}" for part in ("", PYTHON)]
        environment = [f"{name}={text}" for name, text in {**self.variables, **variables}.items()]
        process = ["env", "-i", *environment, *self.entrypoint, *self.command]
        script.append(f"exec chroot --userspec={self.user} {self.root} {shlex.join(process)}")
        return subprocess.Popen(
            [*IN_NAMESPACES, "sh", "-ec", "\n".join(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class BuildFailed(Exception):
    """A RUN ended with an error; the message is its output."""


def build(service: Service, folder: Path) -> Stage:
    """Build the service's image in this folder; returns its last stage."""
    stages: dict[str, Stage] = {}
    context = [line[1:] for line in service.read(".dockerignore").splitlines() if line[0] == "!"]
    for instruction, text in instructions(service.read("Dockerfile")):
        match instruction:
            case "FROM":
                name = text.split(" AS ")[-1]
                stage = stages[name] = Stage(folder / f"stage-{len(stages)}")
                stage.root.mkdir(parents=True)
                if "/uv:" in text:  # its image has this program, and no other file is used
                    shutil.copy(shutil.which("uv") or "", stage.root)
            case "ENV":
                for word in shlex.split(text):
                    variable, _, value = word.partition("=")
                    stage.variables[variable] = value.replace("$PATH", stage.variables["PATH"])
            case "WORKDIR":
                stage.folder = text
                stage.path(".").mkdir(parents=True)
            case "COPY":
                copy(text.split(), stage, stages, service.path, context)
            case "RUN":
                result = stage.run(text)
                if result.returncode != 0:
                    raise BuildFailed(result.stdout)
            case "USER":
                stage.user = text
            case "ENTRYPOINT":
                stage.entrypoint = json.loads(text)
            case "CMD":
                stage.command = json.loads(text)
            case "HEALTHCHECK":
                stage.healthcheck = json.loads(text[text.index("CMD ") + 4 :])
            case _:
                msg = f"nobody knows here what {instruction} does"
                raise NotImplementedError(msg)
    return stage


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """``[("FROM", "python:3.14.10-slim-trixie AS build"), ...]``"""
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def copy(
    words: list[str], stage: Stage, stages: dict[str, Stage], project: Path, context: list[str]
) -> None:
    options = dict(word[2:].split("=") for word in words if word.startswith("--"))
    *sources, target = [word for word in words if not word.startswith("--")]
    if "from" in options:
        found = [stages[options["from"]].path(source) for source in sources]
    else:
        found = [path for source in sources for path in project.glob(source)]
        assert all(path.name in context for path in found), "COPY of what .dockerignore leaves out"
    destination = stage.path(target)
    for path in found:
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__") if path.parent == project else None
            shutil.copytree(path, destination, symlinks=True, ignore=ignored)
        else:
            folder = destination if target.endswith("/") else destination.parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, destination)
    if "chown" in options:
        user, group = map(int, options["chown"].split(":"))
        for path in [destination, *destination.rglob("*")]:
            os.chown(path, user, group, follow_symlinks=False)
