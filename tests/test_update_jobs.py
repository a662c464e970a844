"""The weekly jobs that propose the template's changes: their own steps, on a real remote.

GitHub's `gh` is a script that remembers pull requests; GitLab makes its merge requests of push options, which a hook of
the remote writes down.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.rendered import QUESTIONS, Render, Result, Service, parse_yaml, run
from support.repositories import (
    IDENTITY,
    LOGS,
    OLD_LINE,
    PRESENT_LINE,
    commit_all,
    git,
    scaffold,
    without_git,
)

pytestmark = without_git

VERSION = QUESTIONS["_template_version"]
WORKFLOW = ".github/workflows/template-update.yml"
GH = """#!/bin/sh
# Remembers what it was asked, and has one open pull request at most.
[ "$1" = auth ] && exit 0
[ "$2" = create ] && [ -e "$REQUESTS/open" ] && { echo "a pull request already exists"; exit 1; }
touch "$REQUESTS/open"
{ printf '%s\\n' "$@"; cat "$TEXT"; } > "$REQUESTS/last"
"""
HOOK = """#!/bin/sh
# Writes the push options down, as GitLab would read them.
i=0
while [ "$i" -lt "${GIT_PUSH_OPTION_COUNT:-0}" ]; do
    eval "printf '%s\\n' \\"\\$GIT_PUSH_OPTION_$i\\""
    i=$((i + 1))
done > "$REQUESTS/options"
[ -s "$REQUESTS/options" ] && mv "$REQUESTS/options" "$REQUESTS/last"
exit 0
"""


@dataclass
class Forge:
    """A remote with a service on its branch main, and the job that runs on it each week."""

    ci: str
    folder: Path
    runs: int = 0

    @property
    def origin(self) -> Path:
        return self.folder / "origin.git"

    @property
    def request(self) -> str:
        """The last proposal: title, text and whether it is a draft."""
        last = self.folder / "requests/last"
        return last.read_text(encoding="utf-8") if last.exists() else ""

    def clone(self, name: str) -> Service:
        git(self.folder, "clone", "--quiet", str(self.origin), name)
        return Service(self.folder / name, "order_events")

    def change(self, file: str, old: str, new: str) -> None:
        """A commit on main."""
        ours = self.clone("ours")
        assert old in ours.read(file)
        ours.write(file, ours.read(file).replace(old, new, 1))
        commit_all(ours.path, "Ours")
        git(ours.path, "push", "--quiet", "origin", "main")

    def run_job(self) -> Result:
        """In a checkout of one commit, as the forges make it."""
        self.runs += 1
        one = ("--depth", "1", "--branch", "main", self.origin.as_uri(), f"job-{self.runs}")
        git(self.folder, "clone", "--quiet", *one)
        checkout = Service(self.folder / f"job-{self.runs}", "order_events")
        sha = git(checkout.path, "rev-parse", "HEAD").strip()
        git(checkout.path, "checkout", "--quiet", "--detach", sha)
        env = {
            **IDENTITY,
            "HOME": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{IDENTITY['PATH']}",
            "REQUESTS": str(self.folder / "requests"),
            "TEXT": str(self.folder / "text.md"),
            "GITHUB_SHA": sha,
            "CI_COMMIT_SHA": sha,
            "CI_DEFAULT_BRANCH": "main",
            "CI_SERVER_HOST": "gitlab.example.com",
            "PUSH_TO": str(self.origin),
        }
        return run(
            "bash",
            "-eo",
            "pipefail",
            "-c",
            self.script(checkout),
            cwd=checkout.path,
            check=False,
            env=env,
        )

    def script(self, service: Service) -> str:
        if self.ci == "github":
            job = parse_yaml(service.read(WORKFLOW))["jobs"]["propose"]
            return str(job["steps"][-1]["run"])
        script: list[str] = parse_yaml(service.read(".gitlab-ci.yml"))["template-update"]["script"]
        return "\n".join(script)

    def branches(self) -> set[str]:
        return set(git(self.origin, "for-each-ref", "--format=%(refname:short)").split())

    def proposed(self, file: str) -> str:
        return git(self.origin, "show", f"template-update:{file}")


@pytest.fixture(params=["github", "gitlab"])
def forge(request: pytest.FixtureRequest, template: Path, tmp_path: Path) -> Forge:
    service = scaffold(template, tmp_path, "--checkout", "v0.0.1", f"ci={request.param}")
    git(service.path, "branch", "--quiet", "--move", "main")
    git(tmp_path, "clone", "--quiet", "--bare", str(service.path), "origin.git")
    forge = Forge(request.param, tmp_path)
    git(forge.origin, "config", "receive.advertisePushOptions", "true")
    for folder, name, text in (("bin", "gh", GH), ("origin.git/hooks", "pre-receive", HOOK)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
        (tmp_path / folder / name).chmod(0o755)
    (tmp_path / "requests").mkdir()
    return forge


def test_what_changed_is_proposed_each_week_until_it_is_merged(forge: Forge) -> None:
    forge.change("README.md", "# Order events", "# Order events of ours")
    for _ in range(2):  # in the second week the first proposal is still open
        result = forge.run_job()
        assert result.returncode == 0, result.stdout
        assert f"Template {VERSION}" in forge.request
        assert "raft" not in forge.request
        assert PRESENT_LINE in forge.proposed(LOGS)
        assert "# Order events of ours" in forge.proposed("README.md")
        assert json.loads(forge.proposed(".template-answers.json"))["version"] == VERSION
        assert forge.branches() == {"main", "template-update"}
    git(forge.origin, "update-ref", "refs/heads/main", "template-update")
    (forge.folder / "requests/last").unlink()
    result = forge.run_job()
    assert result.returncode == 0, result.stdout
    assert "The template has not changed." in result.stdout
    assert forge.request == ""


def test_what_was_squashed_is_not_proposed_again(forge: Forge) -> None:
    forge.run_job()
    squashed = git(
        forge.origin, "commit-tree", "template-update^{tree}", "-p", "main", "-m", "Squashed"
    )
    git(forge.origin, "update-ref", "refs/heads/main", squashed.strip())
    result = forge.run_job()
    assert result.returncode == 0, result.stdout
    assert "The template has not changed." in result.stdout


def test_conflicts_are_proposed_as_a_draft_that_names_them_and_the_job_fails(forge: Forge) -> None:
    forge.change(LOGS, OLD_LINE, '"""Ours."""')
    for _ in range(2):
        result = forge.run_job()
        assert result.returncode == 1, result.stdout
        assert LOGS in result.stdout.splitlines()[-1]
        assert LOGS in forge.request
        assert "with conflicts" in forge.request
        assert "<<<<<<< HEAD" in forge.proposed(LOGS)
    assert ("--draft" if forge.ci == "github" else "title=Draft: ") in request_of_another_run(forge)
    open_conflicts = forge.clone("reviewed")
    git(open_conflicts.path, "switch", "--quiet", "template-update")
    found = run(
        "bash", "-e", "-c", guard(open_conflicts, forge.ci), cwd=open_conflicts.path, check=False
    )
    assert found.returncode == 1
    assert found.stdout.startswith(f"{LOGS}:")


def request_of_another_run(forge: Forge) -> str:
    """What the job asks for where no request is open."""
    (forge.folder / "requests/open").unlink(missing_ok=True)
    forge.run_job()
    return forge.request


def guard(service: Service, ci: str) -> str:
    """The step of the ordinary checks that sees what a conflict left."""
    if ci == "github":
        steps: list[Any] = parse_yaml(service.read(".github/workflows/ci.yml"))["jobs"]["lint"][
            "steps"
        ]
        return next(str(step["run"]) for step in steps if "<<<" in step.get("run", ""))
    return next(
        str(step)
        for step in parse_yaml(service.read(".gitlab-ci.yml"))["lint"]["script"]
        if "<<<" in step
    )


def test_an_unavailable_template_fails_the_job_and_no_change_is_proposed(forge: Forge) -> None:
    forge.change(".template-answers.json", "cookiecutter-consumer", "cookiecutter-nowhere")
    result = forge.run_job()
    assert result.returncode == 1
    assert "update.py: cookiecutter could not render" in result.stdout
    assert (forge.branches(), forge.request) == ({"main"}, "")


def test_the_jobs_run_weekly_or_where_they_are_asked_for_and_may_no_more_than_they_must(
    render: Render,
) -> None:
    workflow = parse_yaml(render(ci="github").read(WORKFLOW))
    assert workflow["on"].keys() == {"schedule", "workflow_dispatch"}
    assert workflow["permissions"] == {}
    [job] = workflow["jobs"].values()
    assert job["permissions"] == {"contents": "write", "pull-requests": "write"}
    [rule] = parse_yaml(render(ci="gitlab").read(".gitlab-ci.yml"))["template-update"]["rules"]
    assert rule == {"if": '$CI_PIPELINE_SOURCE == "schedule" && $TEMPLATE_UPDATE == "true"'}
