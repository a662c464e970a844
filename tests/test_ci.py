"""CI files: those of every broker, and the template's own, are valid, pinned and of least privilege, and do what they say."""

import ast
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from support.rendered import QUESTIONS, TEMPLATE, Prove, Render, Result, Service, parse_yaml, run

WORKFLOW, DEPENDABOT = ".github/workflows/ci.yml", ".github/dependabot.yml"
RELEASE, UPDATE = ".github/workflows/release.yml", ".github/workflows/template-update.yml"
GITLAB, RENOVATE = ".gitlab-ci.yml", "renovate.json"
SCHEMAS = {
    WORKFLOW: ["vendor.github-workflows"],
    RELEASE: ["vendor.github-workflows"],
    UPDATE: ["vendor.github-workflows"],
    DEPENDABOT: ["vendor.dependabot"],
    GITLAB: ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
    RENOVATE: ["vendor.renovate"],
}
ACTION = re.compile(r"uses: (\S+)@(\S+)(?: # (\S+))?$", re.M)
# The one accepted finding: the test broker is named by its major version, so that it is the one that the tests
# start themselves, and gets its fixes; nothing that is shipped comes of it.
ZIZMOR_SETTINGS = "rules: {unpinned-images: {disable: true}}\n"

CI = [ci for ci in QUESTIONS["ci"] if ci != "none"]
BROKERS = pytest.mark.parametrize("broker", QUESTIONS["broker"])


def has_schema(folder: Path, file: str) -> Result:
    check = ["check-jsonschema", "--verbose", "--builtin-schema", *SCHEMAS[file], file]
    return run(*check, cwd=folder, check=False)


def zizmor(folder: Path, settings: Path) -> Result:
    settings.write_text(ZIZMOR_SETTINGS)
    check = ["zizmor", "--offline", "--no-progress", "--pedantic", "--strict-collection"]
    return run(*check, "--config", str(settings), ".github", cwd=folder, check=False)


def parsed(folder: Path, file: str) -> Any:
    return parse_yaml((folder / file).read_text("utf-8"))


@pytest.mark.parametrize(("broker", "ci"), [*product(QUESTIONS["broker"], CI)])
def test_the_files_of_a_service_are_valid(
    render: Render, prove: Prove, tmp_path: Path, broker: str, ci: str
) -> None:
    service = render(broker=broker, ci=ci)
    files = QUESTIONS["_cis"][ci]
    assert service.files.keys() - render(broker=broker, ci="none").files.keys() == set(files)
    for file in files:
        result = has_schema(service.path, file)
        assert result.returncode == 0, result.stdout
    if ci == "github":
        result = zizmor(service.path, tmp_path / "zizmor.yml")
        assert result.returncode == 0, result.stdout
    prove("CI files that are valid", f"ci={ci}")


def test_no_ci_files_are_left_without_a_ci_provider(render: Render) -> None:
    assert not render(ci="none").has(".github")


def test_the_files_of_the_template_are_valid(tmp_path: Path) -> None:
    for file in (WORKFLOW, RELEASE, DEPENDABOT):
        result = has_schema(TEMPLATE, file)
        assert result.returncode == 0, result.stdout
    result = zizmor(TEMPLATE, tmp_path / "zizmor.yml")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("ci", "file", "right", "wrong"),
    [
        pytest.param("github", WORKFLOW, "runs-on:", "run-on:", id="workflow"),
        pytest.param("github", DEPENDABOT, "interval: weekly", "interval: often", id="Dependabot"),
        pytest.param("gitlab", GITLAB, "script:", "scripts:", id="GitLab"),
        pytest.param("gitlab", RENOVATE, '"enabled": false', '"enabled": "no"', id="Renovate"),
    ],
)
def test_the_check_of_a_schema_sees(
    render_own: Render, ci: str, file: str, right: str, wrong: str
) -> None:
    service = render_own(ci=ci)
    spoil(service, file, right, wrong)
    assert has_schema(service.path, file).returncode == 1


@pytest.mark.parametrize(
    ("file", "right", "wrong", "finding"),
    [
        (WORKFLOW, r"checkout@\w+ # v[\d.]+", "checkout@v7", "unpinned-uses"),
        (WORKFLOW, "persist-credentials: false", "fetch-depth: 1", "artipacked"),
        (WORKFLOW, "permissions: {}", "permissions: write-all", "excessive-permissions"),
        (WORKFLOW, r"(?s)concurrency:.*?\n\n", "", "concurrency-limits"),
        (WORKFLOW, "uv run mypy", "echo ${{ github.head_ref }}", "template-injection"),
        (DEPENDABOT, r"    cooldown:\n.*\n", "", "dependabot-cooldown"),
    ],
)
def test_the_check_of_security_sees(
    render_own: Render, tmp_path: Path, file: str, right: str, wrong: str, finding: str
) -> None:
    service = render_own(ci="github")
    spoil(service, file, right, wrong)
    assert f"[{finding}]" in zizmor(service.path, tmp_path / "zizmor.yml").stdout


def spoil(service: Service, file: str, right: str, wrong: str) -> None:
    before = service.read(file)
    service.write(file, re.sub(right, wrong, before))
    assert service.read(file) != before


def test_actions_are_pinned_by_commit_and_the_same_everywhere(render: Render) -> None:
    service = render(ci="github")
    ours = [
        action
        for file in (WORKFLOW, RELEASE)
        for action in ACTION.findall((TEMPLATE / file).read_text("utf-8"))
    ]
    theirs = [
        action for file in (WORKFLOW, UPDATE) for action in ACTION.findall(service.read(file))
    ]
    for action, commit, version in ours + theirs:
        assert re.fullmatch("[0-9a-f]{40}", commit), action
        assert re.fullmatch(r"v\d+\.\d+\.\d+", version), action
    assert len({action for action, *_ in ours + theirs}) == len({*ours, *theirs})


@pytest.mark.parametrize("folder", ["the template", "a service"])
def test_jobs_have_a_time_limit_and_may_only_read(render: Render, folder: str) -> None:
    workflow = parsed(TEMPLATE if folder == "the template" else render(ci="github").path, WORKFLOW)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"}
        assert job["timeout-minutes"] <= 120


def test_the_template_is_tested_on_every_python_and_system_each_week() -> None:
    workflow = parsed(TEMPLATE, WORKFLOW)
    assert workflow["on"]["schedule"]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [
        f"3.{minor}" for minor in range(11, 15)
    ]
    assert workflow["jobs"]["audit"]["strategy"]["matrix"] == {
        "broker": QUESTIONS["broker"],
        "telemetry": [kind for kind in QUESTIONS["telemetry"] if kind != "none"],  # it adds nothing
    }
    systems = workflow["jobs"]["newcomer"]["strategy"]["matrix"]["system"]
    assert {system.split("-")[0] for system in systems} == {"ubuntu", "macos", "windows"}


def test_what_only_root_can_test_is_tested_as_root() -> None:
    steps = parsed(TEMPLATE, WORKFLOW)["jobs"]["test"]["steps"]
    [step] = [step for step in steps if "sudo" in step.get("run", "") and "tasks.py" in step["run"]]
    files = [f"tests/test_{name}.py" for name in ("deploy", "image", "servers", "under_systemd")]
    assert step["run"].split()[-4:] == files
    assert step["env"] == {"REQUIRE_IMAGE": "1", "REQUIRE_BROKERS": "1"}
    assert f"--preserve-env={','.join(step['env'])}" in step["run"]
    assert steps.index(step) == len(steps) - 1, "what root has written, others may not be able to"


@BROKERS
def test_the_tests_of_a_service_have_their_broker(render: Render, broker: str) -> None:
    row = QUESTIONS["_brokers"][broker]
    github = parsed(render(broker=broker, ci="github").path, WORKFLOW)["jobs"]["test"]
    gitlab = parsed(render(broker=broker, ci="gitlab").path, GITLAB)["test"]
    assert github["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert gitlab["parallel"]["matrix"] == [{"PYTHON": ["3.11", "3.12", "3.13"]}]
    assert github["env"]["REQUIRE_BROKERS"] == gitlab["variables"]["REQUIRE_BROKERS"] == "1"
    installs = [step for step in [*gitlab.get("before_script", [])] if " install " in step]
    assert [step.split()[-1] for step in installs] == row["packages"].split()
    if not row["service"]:
        for job in (github, gitlab):
            assert "services" not in job
            assert "CONSUMER_TEST_BROKER_URL" not in {
                **job.get("env", {}),
                **job.get("variables", {}),
            }
        return
    [of_gitlab] = gitlab["services"]
    of_github = github["services"]["broker"]
    image = re.search(r'^IMAGE = "(.+)"', servers_file(render, broker), re.M)
    assert image
    assert of_github["image"] == of_gitlab["name"] == image[1]
    port = row["service"]["port"]
    assert of_github["ports"] == [f"{port}:{port}"]
    assert of_gitlab["variables"] == {
        "HEALTHCHECK_TCP_PORT": str(port),
        **of_github.get("env", {}),
    }
    assert github["env"]["CONSUMER_TEST_BROKER_URL"] == row["url"]
    at = "127.0.0.1" if broker == "kafka" else of_gitlab["alias"]
    assert gitlab["variables"]["CONSUMER_TEST_BROKER_URL"] == row["url"].replace("127.0.0.1", at)


def test_kafka_has_the_settings_that_the_tests_give_it(render: Render) -> None:
    tree = ast.parse(servers_file(render, "kafka"))
    [function] = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "_environment"
    ]
    variables = next(node.value for node in function.body if isinstance(node, ast.Assign))
    namespace = {"port": 9092}
    expected = eval(compile(ast.Expression(variables), "servers/kafka.py", "eval"), namespace)
    service = QUESTIONS["_brokers"]["kafka"]["service"]
    assert service["variables"] == {f"KAFKA_{name}": value for name, value in expected.items()}


def servers_file(render: Render, broker: str) -> str:
    return render(broker=broker).read(f"tests/runtime/harness/servers/{broker}.py")


@pytest.mark.parametrize("ci", CI)
def test_the_steps_that_need_no_server_pass(render_own: Render, ci: str) -> None:
    """Before uv.lock is committed, and after; all but the tests, the image, and the audit, which asks a service on the network."""
    service = render_own(ci=ci, broker="sqlite")
    if ci == "github":
        jobs = parsed(service.path, WORKFLOW)["jobs"]
        steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    else:
        jobs = parsed(service.path, GITLAB)
        steps = [step for job in ("lint", "types", "audit") for step in jobs[job]["script"]]
    needs_more = re.compile("pip-audit|pytest|docker")
    chosen = [step for step in steps if not needs_more.search(step)]
    assert len(steps) > len(chosen) > 4
    for _ in range(2):
        run("sh", "-ex", "-c", "\n".join(chosen), cwd=service.path)
    assert "--hash=sha256:" in service.read("requirements.txt")
    spoil(service, "pyproject.toml", '"structlog>=25.4,<27"', '"structlog>=25.4,<26"')
    stale = run("sh", "-ec", "\n".join(chosen), cwd=service.path, check=False)
    assert "The lockfile at `uv.lock` needs to be updated" in stale.stdout


def test_updates_edit_only_the_lock(render: Render) -> None:
    """Any other line is the template's: in pyproject.toml, in workflows, in the Dockerfile and in compose.yaml."""
    for deploy in QUESTIONS["deploy"]:
        [update] = parsed(render(ci="github", deploy=deploy).path, DEPENDABOT)["updates"]
        assert update["package-ecosystem"] == "uv"
        assert update["versioning-strategy"] == "lockfile-only"
    renovate = parsed(render(ci="gitlab").path, RENOVATE)
    assert renovate["enabledManagers"] == ["pep621"]
    [rule] = renovate["packageRules"]
    assert (rule["matchManagers"], rule["enabled"]) == (["pep621"], False)
    assert set(rule["matchUpdateTypes"]) == {
        *("major", "minor", "patch", "pin", "digest", "replacement")
    }
    assert renovate["lockFileMaintenance"]["enabled"]
