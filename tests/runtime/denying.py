"""Users of real servers, whose login or right to consume is refused for a while: see test_denied.py."""

import hashlib
import json
import signal
import socket
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
from aiokafka.admin import NewTopic
from botocore.config import Config
from botocore.session import get_session

from harness.scene import wait_until
from harness.servers import Server, mqtt, nats, server_module
from harness.servers import kafka as kafka_server
from harness.servers.local import ServerProcess, free_ports
from harness.servers.mqtt import PrivateMosquitto
from harness.servers.postgres import PrivatePostgres
from harness.servers.proxy import KafkaProxy, proxy_type
from harness.servers.rabbitmq import PrivateRabbit
from harness.servers.redis import RedisServer
from harness.servers.sqs import SqsServer, moto
from rabbitmqctl import control_of
from secured import with_user
from steps import with_options
from tools import kafka

PASSWORD, ANOTHER = "the-f1rst-password", "the-s3cond-password"
DENIED = "denied"
"""The name of an existing destination, for which the right to write is refused."""
OWN = "orders", "billing"
"""The source and the group of the user for whom ``deny`` leaves the rights that the broker's page documents."""


class Access(NamedTuple):
    """The access of one user, with ``url`` for the service. ``server`` has the URL of an administrator."""

    server: Server
    url: str
    deny: Callable[[], None]
    """Refuse the access, and end the user's connections."""
    allow: Callable[[], None]
    refusal: str
    """A regular expression that the reason of the outage matches."""
    rotated_url: str
    """The URL with the login that is valid after ``deny``, if ``deny`` refuses the login of ``url``."""
    stores_meanwhile: bool = True
    """Whether the broker stores messages for the service while it is refused."""
    destination: str = ""
    """The destination of messages, for which ``deny`` refuses the right."""
    keeps_acks: bool = True
    """Whether a refused ack is sent again later; otherwise the message is redelivered, and that is logged."""


def of_rabbitmq(directory: Path, what: str) -> Iterator[Access]:
    if what == "ack":
        pytest.skip("RabbitMQ has no right for acks: who may consume may acknowledge")
    with server_module("rabbitmq").private(directory) as server:
        assert isinstance(server, PrivateRabbit)
        control = control_of(server)
        user = "user"

        def rights(pattern: str) -> None:
            control("set_permissions", user, pattern, pattern, pattern)

        control("add_user", user, PASSWORD)
        rights(".*")
        declare = f'rabbit_exchange:declare(rabbit_misc:r(<<"/">>,exchange,<<"{DENIED}">>),fanout,true,false,false,[],<<>>).'
        control("eval", declare)

        def deny() -> None:
            if what == "login":
                control("change_password", user, ANOTHER)
            elif what == "destination":
                control("set_permissions", user, ".*", f"^(?!{DENIED}$)", ".*")
            else:
                rights("^$")
            control("close_all_user_connections", user, "its rights have changed")

        def allow() -> None:
            control("change_password", user, PASSWORD)
            rights(".*")

        url = with_user(server.url, user, PASSWORD)
        rotated = with_user(server.url, user, ANOTHER)
        to = f"exchange:{DENIED}/key"
        yield Access(server, url, deny, allow, "ACCESS_REFUSED", rotated, destination=to)


NATS = """
authorization {{ users: [
    {{ user: root, password: root }}
    {{ user: user, password: "{password}", permissions: {{ publish: {{ deny: ["{denied}"] }} }} }}
] }}
"""


def of_nats(directory: Path, what: str) -> Iterator[Access]:
    if (program := nats.find_program()) is None:
        pytest.skip("no nats-server can be started with another configuration")
    fine = NATS.format(password=PASSWORD, denied="nothing")
    with nats.installed(program, directory, fine) as server:
        denied = {
            "login": NATS.format(password=ANOTHER, denied="nothing"),
            "right": NATS.format(password=PASSWORD, denied="$JS.API.CONSUMER.MSG.NEXT.>"),
            "ack": NATS.format(password=PASSWORD, denied="$JS.ACK.>"),
            "destination": NATS.format(password=PASSWORD, denied=DENIED),
        }
        probed = DENIED if what == "destination" else "$JS.ACK.t"

        def may_publish() -> bool | None:
            """None if the server ended the connection, as some do while they read their configuration."""
            options = json.dumps({"verbose": True, "user": "user", "pass": PASSWORD})
            host, _, port = server.url.rpartition("@")[2].removeprefix("nats://").rpartition(":")
            with (
                suppress(ConnectionError),
                socket.create_connection((host, int(port)), timeout=20) as connection,
            ):
                connection.sendall(f"CONNECT {options}\r\nPUB {probed} 0\r\n\r\n".encode())
                with connection.makefile("rb") as answers:
                    _info, _connected, published = (answers.readline() for _ in range(3))
                return published == b"+OK\r\n"
            return None

        def configure(configuration: str) -> None:
            (directory / "nats.conf").write_text(configuration)
            server.instance.send(signal.SIGHUP)
            if what in ("ack", "destination"):  # the server reads it a little later
                wait_until(lambda: may_publish() == (configuration == fine))

        url = with_user(server.url, "user", PASSWORD)
        server.url = with_user(server.url, "root", "root")
        if what == "destination":
            server.ask(lambda client: client.jetstream().add_stream(name=DENIED, subjects=[DENIED]))
        refusal = "refused the user, the password" if what == "login" else "permissions violation"
        yield Access(
            server,
            url,
            lambda: configure(denied[what]),
            lambda: configure(fine),
            f"(?i){refusal}",
            with_user(url, "user", ANOTHER),
            destination=f"subject:{DENIED}",
        )


def of_redis(directory: Path, what: str) -> Iterator[Access]:
    with server_module("redis").private(directory) as server:
        assert isinstance(server, RedisServer)

        def change(*rules: str) -> None:
            with server.client() as client:
                client.execute_command("ACL", "SETUSER", "user", "on", *rules)
                if what != "ack":
                    client.execute_command("CLIENT", "KILL", "USER", "user")

        change(f">{PASSWORD}", "~*", "+@all")
        denied, refusal = {
            "login": (("resetpass", f">{ANOTHER}"), "refused the user name or the password"),
            "right": (("-xreadgroup",), "xreadgroup"),
            "ack": (("-xack", "-xdel"), "XACK"),
            "destination": (("resetkeys", "~ccc-test-*"), "(?i)no permissions to access"),
        }[what]
        url = with_user(server.url, "user", PASSWORD)
        yield Access(
            server,
            url,
            lambda: change(*denied),
            lambda: change(f">{PASSWORD}", "+@all"),
            refusal,
            with_user(url, "user", ANOTHER),
            destination=f"stream:{DENIED}",
        )


def of_postgres(directory: Path, what: str) -> Iterator[Access]:
    with server_module("postgres").private(directory) as server:
        assert isinstance(server, PrivatePostgres)
        server.query(f"CREATE USER me PASSWORD '{PASSWORD}'")
        server.query("CREATE SCHEMA consumer AUTHORIZATION me")

        def deny() -> None:
            if what == "login":
                server.query(f"ALTER USER me PASSWORD '{ANOTHER}'")
            elif what == "ack":
                server.query("REVOKE DELETE ON consumer.messages FROM me")
                return
            elif what == "destination":
                server.query("ALTER TABLE consumer.messages FORCE ROW LEVEL SECURITY")
                server.query("ALTER TABLE consumer.messages ENABLE ROW LEVEL SECURITY")
                check = f"USING (true) WITH CHECK (source <> '{DENIED}')"
                server.query(f"CREATE POLICY most ON consumer.messages {check}")
                return
            else:
                server.query("ALTER TABLE consumer.messages OWNER TO postgres")
            server.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename='me'"
            )

        def allow() -> None:
            server.query(f"ALTER USER me PASSWORD '{PASSWORD}'")
            server.query("ALTER TABLE consumer.messages OWNER TO me")
            server.query("GRANT DELETE ON consumer.messages TO me")

        refusal = (
            "refused the user name or the password"
            if what == "login"
            else "lacks the right to|permission denied|violates row-level security policy"
        )
        url, rotated = (with_user(server.url, "me", one) for one in (PASSWORD, ANOTHER))
        to = f"source:{DENIED}"
        yield Access(server, url, deny, allow, refusal, rotated, destination=to)


def reread(server: PrivateMosquitto) -> None:
    """Let it read its users and their rights: after SIGHUP, 2.0.11 ends connections "due to out of memory"."""
    server.instance.send(signal.SIGTERM)
    server.instance._process.wait(20)
    server.instance.restart()
    # Since its restart the server stores no message for that anonymous session, until it returns.
    server._command(mqtt.KEEPER, clean=False)


def user_with(broker: PrivateMosquitto, rights: list[str]) -> tuple[str, str]:
    """The name and the password of a new user who has just these rights."""
    user = (f"user-{uuid.uuid4().hex[:8]}", "secret")
    directory = broker._database.parent
    with (directory / "passwords").open("a") as passwords, (directory / "rights").open("a") as acl:
        passwords.write(f"{user[0]}:{mqtt._password_hash(user[1])}\n")
        acl.write(f"\nuser {user[0]}\n" + "".join(f"topic {right}\n" for right in rights))
    reread(broker)
    return user


def of_mqtt(directory: Path, what: str) -> Iterator[Access]:
    if what == "right":
        pytest.skip(
            "Mosquitto grants every subscription, and delivers nothing to a user without rights"
        )
    if what == "ack":
        pytest.skip("MQTT has no right for acks")
    with server_module("mqtt").private(directory) as server:
        assert isinstance(server, PrivateMosquitto)
        folder = server._database.parent
        with (folder / "rights").open("a") as rights:
            rights.write("\nuser user\ntopic readwrite #\n")

        def change(password: str) -> None:
            (folder / "passwords").write_text(f"user:{mqtt._password_hash(password)}\n")
            reread(server)

        with proxy_type(server.url)(server.url) as proxy:
            change(PASSWORD)

            def deny() -> None:
                if what == "destination":
                    with (folder / "rights").open("a") as rights:
                        rights.write(f"topic deny {DENIED}\n")
                    reread(server)
                    return
                change(ANOTHER)
                proxy.cut()

            url = with_user(proxy.url, "user", PASSWORD)
            yield Access(
                server,
                url,
                deny,
                lambda: change(PASSWORD),
                "Not authorized",
                with_user(url, "user", ANOTHER),
                stores_meanwhile=False,
                destination=f"topic:{DENIED}",
            )


IAM_ACTIONS = [
    *("sqs:GetQueueUrl", "sqs:GetQueueAttributes", "sqs:ReceiveMessage", "sqs:DeleteMessage*"),
    *("sqs:ChangeMessageVisibility*", "sqs:SendMessage*", "sns:Publish*"),
]
"""The actions in docs/brokers/sqs.md. AWS has no action for a batch, but moto has."""


def of_sqs(directory: Path, what: str) -> Iterator[Access]:
    """moto can check keys and policies like IAM, but not the resources of a policy: among destinations,
    it can refuse all topics of SNS, but not a single queue."""
    with moto(directory) as open_url:
        address = open_url.rpartition("@")[2].partition("/")[0]

        def policy(denied: str = "", allowed: Sequence[str] = "*") -> str:
            statements = [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]
            if denied:
                statements.append({"Effect": "Deny", "Action": denied, "Resource": "*"})
            return json.dumps({"Version": "2012-10-17", "Statement": statements})

        def change(policy: str) -> None:
            iam.put_user_policy(UserName="user", PolicyName="rights", PolicyDocument=policy)

        def client(key: Any, service: str = "iam") -> Any:
            return get_session().create_client(
                service,
                region_name=open_url.rpartition("/")[2].partition("?")[0],
                endpoint_url=f"http://{address}",
                aws_access_key_id=key["AccessKeyId"],
                aws_secret_access_key=key["SecretAccessKey"],
                config=Config(retries={"total_max_attempts": 1}),
            )

        def url_of(key: Any) -> str:
            return with_user(open_url, key["AccessKeyId"], key["SecretAccessKey"])

        keys = []
        with closing(client({"AccessKeyId": "test", "SecretAccessKey": "test"})) as iam:
            for name in ("root", "user"):
                iam.create_user(UserName=name)
                iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=policy())
                keys.append(iam.create_access_key(UserName=name)["AccessKey"])
        root, user = keys
        headers = {"Content-Type": "text/plain"}
        reset = Request(f"http://{address}/moto-api/reset-auth", data=b"0", headers=headers)
        urlopen(reset).close()
        denied = {
            "login": "sqs:*",  # a key cannot be created twice
            "right": "sqs:ReceiveMessage",
            "ack": "sqs:DeleteMessage*",
            "destination": "sns:Publish*",
            "undocumented": "",
        }[what]
        allowed = IAM_ACTIONS if what == "undocumented" else "*"
        visibility_seconds = 30 if what == "ack" else 3  # an ack that waits must not be too late
        with closing(client(root, "sns")) as sns:
            sns.create_topic(Name=DENIED)
        with closing(client(root)) as iam, closing(SqsServer(url_of(root))) as server:
            yield Access(
                server,
                with_options(url_of(user), visibility_seconds=visibility_seconds),
                lambda: change(policy(denied, allowed)),
                lambda: change(policy()),
                "AccessDenied|not authorized",
                with_options(url_of(root), visibility_seconds=visibility_seconds),
                destination=f"topic:{DENIED}",
            )


KAFKA = """
listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://127.0.0.1:{sasl_port},CONTROLLER://127.0.0.1:{controller_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller_port}
sasl.enabled.mechanisms=SCRAM-SHA-256
listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config=\\
org.apache.kafka.common.security.scram.ScramLoginModule required;
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""
TOPIC, GROUP, ALL, READ, WRITE, DESCRIBE, LITERAL = 2, 3, 2, 3, 4, 8, 3
DENY, ALLOW = 2, 3
KAFKA_RIGHTS = [
    *(
        (TOPIC, right, topic)
        for topic in ("orders", "orders.billing.retry", "orders.billing.dead")
        for right in (READ, WRITE, DESCRIBE)
    ),
    *((GROUP, READ, OWN[1]), (GROUP, READ, f"{OWN[1]}.dead")),
    *((TOPIC, WRITE, DENIED), (TOPIC, DESCRIBE, DENIED)),
]
"""The rights in docs/brokers/kafka.md."""


def of_kafka(directory: Path, what: str) -> Iterator[Access]:
    """A Kafka with SCRAM and access control lists; its administrator needs no login."""
    try:
        kafka.install()
    except kafka.KafkaMissing as missing:
        pytest.skip(str(missing))
    port, sasl_port, controller_port = free_ports(3)
    ports = {"port": port, "sasl_port": sasl_port, "controller_port": controller_port}
    (command,) = kafka.node_commands([port], directory)
    with (directory / f"{port}.properties").open("a") as properties:
        properties.write(KAFKA.format(**ports))

    def ask(key: int, version: int, body: bytes, header: bytes = b"") -> bytes:
        """The answer to a request of Kafka's protocol, without its length and its correlation id."""
        request = struct.pack(">hhihs", key, version, 1, 1, b"t") + header + body
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            with connection.makefile("rb") as answers:
                (length,) = struct.unpack(">i", answers.read(4))
                return answers.read(length)[4:]

    def set_password(password: str) -> None:
        """AlterUserScramCredentials, for one credential: flexible encoding, so each length is written plus one."""
        salt, rounds = b"0123456789abcdef", 4096
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, rounds)
        name = b"\5user"
        credential = name + struct.pack(">bi", 1, rounds)
        credential += b"".join(bytes([len(part) + 1]) + part for part in (salt, salted))
        answer = ask(51, 0, b"\1\2" + credential + b"\0\0", header=b"\0")
        assert b"\5user\0\0" in answer, answer

    def text(value: str) -> bytes:
        return struct.pack(">h", len(value)) + value.encode()

    def acl(key: int, kind: int, operation: int, permission: int, name: str = "*") -> None:
        """CreateAcls (30) or DeleteAcls (31), for one rule on a resource of this kind, or on all."""
        rule = struct.pack(">ib", 1, kind) + text(name) + struct.pack(">b", LITERAL)
        rule += text("User:user") + text("*") + struct.pack(">bb", operation, permission)
        answer = ask(key, 1, rule)
        assert answer[8:10] == b"\0\0", answer

    server = ServerProcess(command, directory, lambda: kafka_server._answers(port))
    try:
        set_password(PASSWORD)
        for kind in (TOPIC, GROUP):
            acl(30, kind, ALL, ALLOW)
        sasl = f"kafka://user:{PASSWORD}@127.0.0.1:{sasl_port}{kafka_server.OPTIONS}"
        administrator = kafka_server.PrivateKafka(port, server)
        administrator._ask(lambda admin: admin.create_topics([NewTopic(DENIED, 1, 1)]))
        with KafkaProxy(f"{sasl}&sasl_mechanism=SCRAM-SHA-256") as proxy:

            def deny() -> None:
                if what == "login":
                    set_password(ANOTHER)
                    proxy.cut()
                elif what == "destination":
                    acl(30, TOPIC, WRITE, DENY, DENIED)
                elif what == "unseen destination":
                    acl(30, TOPIC, ALL, DENY, DENIED)
                elif what == "undocumented":
                    for kind in (TOPIC, GROUP):
                        acl(31, kind, ALL, ALLOW)
                    for kind, right, name in KAFKA_RIGHTS:
                        acl(30, kind, right, ALLOW, name)
                else:
                    acl(30, denied, READ, DENY)

            def allow() -> None:
                set_password(PASSWORD)
                acl(31, denied, READ, DENY)

            denied = GROUP if what == "ack" else TOPIC
            refusal = "password was refused" if what == "login" else "(Topic|Group)Authorization"
            rotated = with_user(proxy.url, "user", ANOTHER)
            # A member that may not commit leaves its group.
            to = f"topic:{DENIED}"
            yield Access(
                administrator,
                proxy.url,
                deny,
                allow,
                refusal,
                rotated,
                destination=to,
                keeps_acks=False,
            )
    finally:
        server.close()


OF = {
    "kafka": of_kafka,
    "rabbitmq": of_rabbitmq,
    "nats": of_nats,
    "redis": of_redis,
    "postgres": of_postgres,
    "mqtt": of_mqtt,
    "sqs": of_sqs,
}


@contextmanager
def access_to(broker: str, directory: Path, what: str) -> Iterator[Access]:
    """`Access.deny` refuses ``what``: "login", the "right" of a consumer, the right to "ack", or to a "destination"
    alone, or all rights that the broker's page does not name ("undocumented")."""
    yield from OF[broker](directory, what)
