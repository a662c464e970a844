"""The deployment files of a service are valid for each broker, and work."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import kubernetes_validate
import pytest

from support.image import BuildFailed, Stage, build, instructions, why_not_here
from support.rendered import QUESTIONS, TREE, Prove, Render, Service, cookiecutter, parse_yaml, run

BROKERS: list[str] = QUESTIONS["broker"]
TELEMETRIES: list[str] = QUESTIONS["telemetry"]
DRAIN_SECONDS, GRACE_SECONDS = QUESTIONS["_drain_seconds"], QUESTIONS["_grace_seconds"]

each_broker = pytest.mark.parametrize("broker", BROKERS)
each_overlay = pytest.mark.parametrize("overlay", ["staging", "production"])


def program(name: str) -> str:
    """The path of a program; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_an_unknown_way_to_deploy_is_refused_by_cookiecutter_itself(tmp_path: Path) -> None:
    result = cookiecutter(tmp_path, "--no-input", "deploy=nomad")
    assert result.returncode == 1
    assert "nomad provided for choice variable deploy" in result.stdout


# -- one number


def test_the_grace_period_is_what_the_runtime_may_take_and_a_margin() -> None:
    runtime = TREE / "src/{{cookiecutter.package_name}}/runtime"
    drain = number(r"drain_seconds: float = Field\(default=(\d+)", runtime / "settings.py")
    close = number(r"^CLOSE_SECONDS = (\d+)", runtime / "watchdog.py")
    margin = number(r"^MARGIN_SECONDS = (\d+)", TREE / "tests/deploy/test_grace.py")
    assert drain == DRAIN_SECONDS
    assert drain + close + margin == GRACE_SECONDS


def number(pattern: str, file: Path) -> int:
    [found] = re.findall(pattern, file.read_text("utf-8"), re.M)
    return int(found)


BASE = "deploy/kubernetes/base"
PRODUCTION = "deploy/kubernetes/overlays/production/kustomization.yaml"
OF_PRODUCTION = """  - patch: |
      apiVersion: apps/v1
      kind: Deployment
      metadata:
        name: order-events
      spec:
        template:
          spec:
            terminationGracePeriodSeconds: {}
"""
JSON_PATCH = """  - target: {{kind: Deployment}}
    patch: |
      - op: replace
        path: /spec/template/spec/terminationGracePeriodSeconds
        value: {}
"""
KUSTOMIZATION = f"{BASE}/kustomization.yaml"
UNIT = "deploy/systemd/order-events.service"
VARIABLE = "CONSUMER_DRAIN_SECONDS"
BEFORE_DRAIN = (
    '          env:\n            - name: CONSUMER_DRAIN_SECONDS\n              value: "26"'
)
AS_IT_CAME = ("", "")


def early(kills_after: float, may_take: float) -> str:
    return f"the supervisor kills after {kills_after:g} seconds, and a stop may take {may_take:g}:"


@pytest.mark.parametrize(
    ("deploy", "file", "old", "new", "complaint"),
    [
        ("kubernetes", KUSTOMIZATION, *AS_IT_CAME, ""),
        ("kubernetes", f"{BASE}/consumer.yaml", "Seconds: 40", "Seconds: 39", early(39, 40)),
        ("kubernetes", f"{BASE}/consumer.yaml", "Seconds: 40", "Seconds: 41", ""),
        ("kubernetes", f"{BASE}/consumer.yaml", "          env:", BEFORE_DRAIN, early(40, 41)),
        ("kubernetes", KUSTOMIZATION, f"{VARIABLE}=25", f"{VARIABLE}=60", early(40, 75)),
        ("kubernetes", KUSTOMIZATION, f"      - {VARIABLE}=25\n", "", ""),  # the same by default
        ("kubernetes", f"{BASE}/consumer.yaml", "termination", "# termination", "no grace period"),
        ("kubernetes", PRODUCTION, "patches:\n", f"patches:\n{OF_PRODUCTION}", early(30, 40)),
        ("kubernetes", PRODUCTION, "patches:\n", f"patches:\n{JSON_PATCH}", early(30, 40)),
        ("compose", "compose.yaml", *AS_IT_CAME, ""),
        ("compose", "compose.yaml", "period: 40s", "period: 39s", early(39, 40)),
        ("compose", "compose.yaml", "period: 40s", "period: 1m", ""),
        ("compose", "compose.yaml", f'{VARIABLE}: "25"', f'{VARIABLE}: "25.5"', early(40, 40.5)),
        ("systemd", UNIT, *AS_IT_CAME, ""),
        ("systemd", UNIT, "TimeoutStopSec=40", "TimeoutStopSec=39s", early(39, 40)),
        ("systemd", UNIT, "TimeoutStopSec=40", "TimeoutStopSec=1min 30s", ""),
        ("systemd", UNIT, f"{VARIABLE}=25", f"{VARIABLE}=30", early(40, 45)),
    ],
)
def test_the_services_own_test_sees_an_edit_that_makes_the_grace_period_too_short(
    render_own: Render, deploy: str, file: str, old: str, new: str, complaint: str
) -> None:
    service = render_own(deploy=deploy)
    edited = service.read(file).replace(old, new.format(30)) if old else service.read(file)
    assert (edited == service.read(file)) == (old == new)
    service.write(file, edited)
    result = service.run(
        *["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/deploy"],
        environment=service.environment(),
    )
    assert result.returncode == (1 if complaint else 0), result.stdout
    assert complaint in result.stdout


# -- the image


@pytest.mark.parametrize("deploy", ["kubernetes", "compose"])
@each_broker
def test_the_dockerfile_passes_a_linter(render: Render, broker: str, deploy: str) -> None:
    service = render(broker=broker, deploy=deploy)
    result = run(program("hadolint"), "Dockerfile", cwd=service.path, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new"), [('["order-events"]', "order-events"), ("10001:10001", "root")]
)
def test_the_linter_of_dockerfiles_sees(render_own: Render, old: str, new: str) -> None:
    service = render_own(deploy="compose")
    service.write("Dockerfile", service.read("Dockerfile").replace(old, new))
    assert run(program("hadolint"), "Dockerfile", cwd=service.path, check=False).returncode == 1


@each_broker
def test_the_last_stage_runs_nothing_and_starts_the_service_without_a_shell(
    render: Render, broker: str
) -> None:
    steps = instructions(render(broker=broker, deploy="compose").read("Dockerfile"))
    starts = [index for index, (name, _) in enumerate(steps) if name == "FROM"]
    last = dict(steps[starts[-1] :])
    assert len(starts) == 2
    assert "RUN" not in last
    assert json.loads(last["ENTRYPOINT"]) == ["order-events"]
    assert json.loads(last["CMD"]) == ["run"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])


class Probed(BaseHTTPRequestHandler):
    """Answers as a service's probes do."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/livez" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def probed() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Probed) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def healthy(healthcheck: list[str], port: int) -> bool:
    """The result of the health check for the server on this port."""
    [python, *arguments] = healthcheck
    assert python == "python"
    variables = {"CONSUMER_PROBE_PORT": str(port)}
    check = run(sys.executable, *arguments, cwd=Path.cwd(), check=False, env=variables)
    return check.returncode == 0


def test_the_health_check_asks_livez(
    render: Render, probed: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerfile = render(deploy="compose").read("Dockerfile")
    [text] = [text for name, text in instructions(dockerfile) if name == "HEALTHCHECK"]
    check = json.loads(text.partition("CMD ")[2])
    assert healthy(check, probed.server_port)
    monkeypatch.setattr(Probed, "status", 503)
    assert not healthy(check, probed.server_port)
    assert not healthy(check, 1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


BUILD = pytest.mark.skipif(
    bool(why_not_here()) and os.environ.get("REQUIRE_IMAGE") != "1",  # our workflow's, as root
    reason=why_not_here() or "it can be built here",
)


@pytest.fixture(scope="module")
def image(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("image")
    service = render(broker="sqlite", deploy="compose").copy_to(folder)
    run("uv", "lock", "--quiet", cwd=service.path)
    return build(service, folder / "stages")


def wait_for_event(process: subprocess.Popen[str], event: str) -> list[dict[str, Any]]:
    """Read its log up to this event."""
    assert process.stdout is not None
    seen: list[dict[str, Any]] = []
    for line in process.stdout:
        assert line.startswith("{"), line + process.stdout.read()
        seen.append(json.loads(line))
        if seen[-1]["event"] == event:
            return seen
    msg = f"no {event} in {seen}"
    raise AssertionError(msg)


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}


@BUILD
def test_the_image_has_the_service_and_no_tools_to_build_with(image: Stage) -> None:
    assert image.path("/app/bin/order-events").exists()
    assert not image.path("/build").exists()
    assert [path.name for path in image.path("/app/bin").iterdir() if "uv" in path.name] == []
    assert list(image.path("/app").rglob("hypothesis")) == []
    assert list(image.path("/app").rglob("runtime/__pycache__/consumer.*.pyc"))
    assert [path for path in image.path("/app").rglob("*") if path.lstat().st_uid != 0] == []


@BUILD
@pytest.mark.parametrize(
    ("url", "writable"),
    [("sqlite:////data/messages.db", ["/data"]), ("sqlite:////tmp/messages.db", [])],
    ids=["a volume", "only /tmp"],
)
def test_as_process_1_without_rights_and_on_a_read_only_root_it_shuts_down_on_sigterm(
    image: Stage, url: str, writable: list[str]
) -> None:
    """The kernel gives process 1 no default actions: a signal without a handler is lost on it."""
    port = free_port()
    process = image.start(writable=writable, CONSUMER_BROKER_URL=url, CONSUMER_PROBE_PORT=str(port))
    try:
        wait_for_event(process, "consuming")
        assert healthy(image.healthcheck, port)
        [pid] = map(
            int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        )
        status = status_of(pid)
        assert status["NSpid"][-1] == "1"
        assert status["Uid"] == status["Gid"] == ["10001"] * 4
        mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
        may_write = {words[1] for words in mounts if words[3].split(",")[0] == "rw"}
        assert may_write - {"/proc"} - {path for path in may_write if path.startswith("/dev")} == {
            "/tmp",
            *writable,
        }
        asked_at = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        too_late = Timer(GRACE_SECONDS - DRAIN_SECONDS, os.kill, (pid, signal.SIGKILL))
        too_late.start()
        wait_for_event(process, "stopped")
        assert process.wait() == 0
        assert time.monotonic() - asked_at < GRACE_SECONDS - DRAIN_SECONDS
        too_late.cancel()
    finally:
        process.kill()
        process.communicate()


@BUILD
def test_elsewhere_it_cannot_write(image: Stage) -> None:
    """Or the test above would prove nothing about a read-only root."""
    process = image.start(
        writable=["/data"],
        CONSUMER_BROKER_URL="sqlite:////app/messages.db",
        CONSUMER_PROBE_PORT="0",
        CONSUMER_CONNECT_SECONDS="0",
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "messages.db" in output


@BUILD
def test_process_1_ignores_a_signal_that_it_does_not_handle(image: Stage) -> None:
    """The result of the test above for a service that does not handle SIGTERM."""
    program = "import os, signal; os.kill(1, signal.SIGTERM); print('still here')"
    careless = Stage(image.root, user=image.user, entrypoint=["python3", "-c", program])
    output, _ = careless.start(writable=[]).communicate(timeout=60)
    assert output == "still here\n"


@BUILD
def test_a_lock_that_does_not_fit_the_dependencies_ends_the_build(
    render: Render, tmp_path: Path
) -> None:
    service = render(broker="sqlite", deploy="kubernetes").copy_to(tmp_path)
    run("uv", "lock", "--quiet", cwd=service.path)
    declared = service.read("pyproject.toml")
    service.write(
        "pyproject.toml", declared.replace('"structlog>=25.4', '"anyio",\n"structlog>=25.4')
    )
    with pytest.raises(BuildFailed, match="lockfile"):
        build(service, tmp_path / "stages")


@BUILD
def test_a_package_that_has_not_the_hash_of_the_lock_ends_the_build(
    render: Render, tmp_path: Path
) -> None:
    service = render(broker="sqlite", deploy="compose").copy_to(tmp_path)
    run("uv", "lock", "--quiet", cwd=service.path)
    locked = service.read("uv.lock")
    [structlog] = re.findall(r'(?s)\[\[package\]\]\nname = "structlog"\n.*?\n\n', locked)
    spoiled = re.sub("sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", structlog)
    assert spoiled != structlog
    service.write("uv.lock", locked.replace(structlog, spoiled))
    with pytest.raises(BuildFailed, match="Hash mismatch for `structlog"):
        build(service, tmp_path / "stages")


@BUILD
def test_without_a_lock_it_is_built_too(render: Render, tmp_path: Path) -> None:
    service = render(broker="redis", deploy="kubernetes")
    image = build(service, tmp_path / "stages")
    assert image.path("/app/bin/order-events").exists()
    assert not image.path("/data").exists()


# -- Compose


@each_broker
def test_compose_is_valid_and_its_broker_is_healthy_before_the_service_starts(
    render: Render, broker: str
) -> None:
    service = render(broker=broker, deploy="compose")
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    run(*check, cwd=service.path)
    services = parse_yaml(service.read("compose.yaml"))["services"]
    consumer = services["consumer"]
    assert consumer["read_only"] is True
    assert consumer["cap_drop"] == ["ALL"]
    assert consumer["security_opt"] == ["no-new-privileges:true"]
    assert "init" not in consumer
    url = consumer["environment"]["CONSUMER_BROKER_URL"]
    if broker == "sqlite":
        assert services.keys() == {"consumer"}
        assert consumer["volumes"] == [f"data:{Path(url.removeprefix('sqlite:///')).parent}"]
        return
    assert consumer["depends_on"] == {"broker": {"condition": "service_healthy"}}
    assert re.fullmatch(r"[\w/-]+:\d+\.\d+(\.\d+)?(-alpine)?", services["broker"]["image"])
    assert services["broker"]["healthcheck"]["test"][0] == "CMD"
    [port] = services["broker"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert "@broker:" in url or "//broker:" in url
    if broker != "sqs":  # whose example is Amazon's own
        [example] = re.findall(r"^CONSUMER_BROKER_URL=\S+", service.read(".env.example"), re.M)
        assert f":{port.split(':')[1]}" in example


def test_the_schema_of_compose_sees(render_own: Render) -> None:
    service = render_own(deploy="compose")
    service.write("compose.yaml", service.read("compose.yaml").replace("cap_drop", "cap_dropp"))
    check = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    assert run(*check, cwd=service.path, check=False).returncode == 1


# -- Kubernetes

KEDA = {
    "rabbitmq": {
        "type": "rabbitmq",
        "metadata": {
            "hostFromEnv": "CONSUMER_BROKER_URL",
            "protocol": "amqp",
            "queueName": "order-events",
            "mode": "QueueLength",
            "value": "500",
        },
    },
    "nats": {
        "type": "nats-jetstream",
        "metadata": {
            "natsServerMonitoringEndpoint": "nats.nats.svc:8222",
            "account": "$G",
            "stream": "order-events",
            "consumer": "order-events",
            "lagThreshold": "500",
        },
    },
    "redis": {
        "type": "redis-streams",
        "metadata": {
            "address": "redis.redis.svc:6379",
            "stream": "order-events",
            "consumerGroup": "order-events",
            "lagCount": "500",
        },
    },
    "kafka": {
        "type": "kafka",
        "metadata": {
            "bootstrapServers": "kafka.kafka.svc:9092",
            "consumerGroup": "order-events",
            "topic": "order-events",
            "offsetResetPolicy": "earliest",
            "lagThreshold": "500",
        },
    },
    "sqs": {
        "type": "aws-sqs-queue",
        "authenticationRef": {"name": "order-events"},
        "metadata": {
            "queueURL": "order-events",
            "awsRegion": "eu-central-1",
            "queueLength": "500",
        },
    },
    "postgres": {
        "type": "postgresql",
        "metadata": {
            "connectionFromEnv": "CONSUMER_BROKER_URL",
            "query": "SELECT count(*) FROM consumer.messages"
            " WHERE source = 'order-events' AND due_at <= now()",
            "targetQueryValue": "500",
        },
    },
}
"""The trigger of each broker; the names of its parameters are those of KEDA's schema/generated/scalers-schema.json.

KEDA has none for MQTT; and a file on one node has no more throughput with more pods.
"""
PARTITIONS = 12
"""Of a topic that the service makes; one pod more would have nothing to do."""
Manifests = dict[str, dict[str, Any]]


def kustomized(service: Service, overlay: str) -> Manifests:
    """The manifests that would be applied, by kind."""
    folder = f"deploy/kubernetes/overlays/{overlay}"
    result = run(program("kubectl"), "kustomize", folder, cwd=service.path)
    documents = [parse_yaml(text) for text in result.stdout.split("\n---\n")]
    manifests = {document["kind"]: document for document in documents}
    assert len(manifests) == len(documents)
    return manifests


def workload(manifests: Manifests) -> dict[str, Any]:
    [found] = [manifests[kind] for kind in ("Deployment", "StatefulSet") if kind in manifests]
    return found


@pytest.mark.parametrize("telemetry", TELEMETRIES)
@each_overlay
@each_broker
def test_what_kustomize_makes_is_valid(
    render: Render, prove: Prove, broker: str, overlay: str, telemetry: str
) -> None:
    service = render(broker=broker, deploy="kubernetes", telemetry=telemetry)
    manifests = kustomized(service, overlay)
    for kind, manifest in manifests.items():
        assert manifest["metadata"]["namespace"] == overlay
        if not manifest["apiVersion"].startswith("keda.sh/"):
            for version in ("1.30", kubernetes_validate.latest_version()):
                kubernetes_validate.validate(manifest, version, strict=True)
            prove("Kubernetes objects that are valid", kind)


def test_the_schemas_of_kubernetes_see(render: Render) -> None:
    manifest = workload(kustomized(render(deploy="kubernetes"), "staging"))
    manifest["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 40
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


OF_TELEMETRY = {"prometheus": set[int](), "opentelemetry": {4318}, "none": set[int]()}
"""The ports that are allowed, besides those of the broker and of DNS."""


@pytest.mark.parametrize("telemetry", TELEMETRIES)
@each_broker
def test_its_parts_refer_to_each_other(render: Render, broker: str, telemetry: str) -> None:
    service = render(broker=broker, deploy="kubernetes", telemetry=telemetry)
    manifests = kustomized(service, "production")
    spec = workload(manifests)["spec"]
    labels = spec["template"]["metadata"]["labels"]
    selectors = [
        spec["selector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)

    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert pod["serviceAccountName"] == manifests["ServiceAccount"]["metadata"]["name"]
    assert container["image"] == "registry.example.com/order-events:0.1.0"
    config = manifests["ConfigMap"]
    assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    assert config["data"]["CONSUMER_DRAIN_SECONDS"] == str(DRAIN_SECONDS)
    assert pod["terminationGracePeriodSeconds"] == GRACE_SECONDS
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }

    port = int(config["data"]["CONSUMER_PROBE_PORT"])
    assert container["ports"] == [{"name": "probes", "containerPort": port}]
    asked = {"livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in asked.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "probes"}
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": port}]}]
    out = [rule_port["port"] for rule in policy["egress"] for rule_port in rule["ports"]]
    broker_port = QUESTIONS["_brokers"][broker]["port"]
    of_broker = {broker_port, *([80] if broker == "sqs" else [])} if broker_port else set()
    assert set(out) == {53} | of_broker | OF_TELEMETRY[telemetry]


@each_broker
def test_its_url_is_a_secret_and_its_memory_is_bounded(render: Render, broker: str) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    [container] = workload(manifests)["spec"]["template"]["spec"]["containers"]
    [url] = container["env"]
    assert url["name"] == "CONSUMER_BROKER_URL"
    if broker == "sqlite":  # which has no password
        assert url["value"] == "sqlite:////data/messages.db"
    else:
        reference = {"name": "order-events", "key": "broker-url"}
        assert url["valueFrom"] == {"secretKeyRef": reference}
        assert "Secret" not in manifests, "it would be in the repository"
    assert container["resources"] == {
        "requests": {"cpu": "100m", "memory": "128Mi"},
        "limits": {"memory": "256Mi"},
    }


@each_broker
def test_its_pods_have_no_rights(render: Render, broker: str) -> None:
    """What Kubernetes calls the restricted Pod Security Standard, and a root file system that is read-only."""
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    pod = workload(manifests)["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}} in pod["volumes"]


@each_broker
def test_how_its_pods_are_replaced_suits_the_broker(render: Render, broker: str) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    assert manifests["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    found = workload(manifests)
    if broker == "mqtt":  # a session, and what waits in it, belongs to the pod's name
        assert found["kind"] == "StatefulSet"
        assert found["spec"]["replicas"] == 2
    elif broker == "sqlite":
        assert found["spec"]["strategy"] == {"type": "Recreate"}
        assert found["spec"]["replicas"] == 1
        claim = {"claimName": manifests["PersistentVolumeClaim"]["metadata"]["name"]}
        assert {"name": "data", "persistentVolumeClaim": claim} in found["spec"]["template"][
            "spec"
        ]["volumes"]
    else:
        assert found["spec"]["strategy"] == {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        }
        assert "replicas" not in found["spec"], "each apply would undo what KEDA has done"


@each_broker
def test_keda_looks_at_the_broker(render: Render, broker: str) -> None:
    manifests = kustomized(render(broker=broker, deploy="kubernetes"), "production")
    if broker not in KEDA:
        assert not [kind for kind in manifests if "Scale" in kind or "Trigger" in kind]
        return
    scaled = manifests["ScaledObject"]
    target = workload(manifests)
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"].keys() == {
        "scaleTargetRef",
        "minReplicaCount",
        "maxReplicaCount",
        "triggers",
    }
    assert scaled["spec"]["scaleTargetRef"] == {"name": target["metadata"]["name"]}
    most = PARTITIONS if broker == "kafka" else 20
    assert 1 <= scaled["spec"]["minReplicaCount"] < scaled["spec"]["maxReplicaCount"] == most
    [trigger] = scaled["spec"]["triggers"]
    assert trigger == KEDA[broker]
    metadata: dict[str, str] = trigger["metadata"]
    variables = {v["name"] for v in target["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert {value for name, value in metadata.items() if name.endswith("FromEnv")} <= variables
    if "authenticationRef" in trigger:
        authentication = manifests["TriggerAuthentication"]
        assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]


# -- systemd


@pytest.fixture
def unit(render_own: Render, tmp_path: Path, broker: str) -> Path:
    """The unit, with a program that exists."""
    service = render_own(broker=broker, deploy="systemd")
    text = service.read(UNIT)
    started = re.sub("^ExecStart=.*", "ExecStart=/bin/sh", text, flags=re.M)
    assert started != text
    path = tmp_path / "order-events.service"
    path.write_text(started)
    return path


@each_broker
def test_systemd_accepts_the_unit(unit: Path) -> None:
    analyze = program("systemd-analyze")
    result = run(analyze, "verify", "--man=no", str(unit), cwd=unit.parent, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("broker", ["sqlite"])
def test_systemd_sees_a_directive_that_is_none(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("PrivateTmp", "PrivateTemp"))
    analyze = program("systemd-analyze")
    result = run(analyze, "verify", "--man=no", str(unit), cwd=unit.parent, check=False)
    assert "PrivateTemp" in result.stdout


@each_broker
def test_the_unit_is_little_exposed(unit: Path) -> None:
    """Of 100, and without running it; a unit that says nothing has 96."""
    command = ["security", "--offline=true", "--no-pager", "--threshold=15", str(unit)]
    run(program("systemd-analyze"), *command, cwd=unit.parent)


def directives(service: Service) -> dict[str, str]:
    """The last of each name."""
    return dict(re.findall(r"^(\w+)=(.*)$", service.read(UNIT), re.M))


def test_the_unit_accepts_notifications_of_the_service_only(render: Render) -> None:
    unit = directives(render(deploy="systemd"))
    assert unit["Type"] == "notify"
    assert unit["NotifyAccess"] == "main"
    assert unit["WatchdogSec"] == "30"


def test_the_unit_is_restarted_after_every_failure_but_wrong_settings(render: Render) -> None:
    service = render(deploy="systemd")
    unit = directives(service)
    errors = service.read("src/order_events/runtime/errors.py")
    assert unit["Restart"] == "on-failure"
    assert f"USAGE = {unit['RestartPreventExitStatus']}" in errors
    assert unit["KillMode"] == "mixed"
    connect = float(
        *re.findall(
            r"connect_seconds: float = Field\(default=(\d+)",
            service.read("src/order_events/runtime/settings.py"),
        )
    )
    assert float(unit["TimeoutStartSec"]) > connect
