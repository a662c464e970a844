"""The parts of client libraries that the runtime depends on although their documentation does not promise them.

A release of a library without such a part fails here with its name, and not in an outage. The bounds of `_brokers` in
cookiecutter.json are to a minor version if parts are replaced.
"""

import ast
import inspect
import re
import sys
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from support.rendered import CHOICES, QUESTIONS, Render

RUNTIME = (
    Path(__file__)
    .parents[1]
    .joinpath("{{cookiecutter.project_slug}}/src/{{cookiecutter.package_name}}/runtime")
)

PARTS: dict[str, dict[str, str]] = {
    "rabbitmq": {
        "aio_pika:Connection": "kwargs transport",
        "aio_pika.connection:UnderlayConnection": "connection",
        "aiormq.channel:Channel": "confirmations create_future delivery_tag loop max_content_size message_id_delivery_tag"
        " number on_consumer_cancel_callbacks",
        "aiormq.connection:Connection": "connection_tune server_properties",
        "aiormq.connection:TransportFactory": "create",
        "pamqp.body": "ContentBody",
        "pamqp.commands:Basic.Deliver": "unmarshal",
        "pamqp.commands:Basic.Properties": "amqp_type encode_property flags marshal unmarshal",
        "pamqp.commands:Connection.Open": "valid_responses",
        "pamqp.constants": "DOMAIN_REGEX",
        "pamqp.decode": "METHODS by_type embedded_value field_table timestamp",
        "pamqp.frame": "marshal",
        "pamqp.header": "ContentHeader",
        "pamqp.encode": "double encode_table_value field_table",
    },
    "nats": {
        "nats.aio.client:Client": "_build_message _connect_to_server _current_server _flush_pending _flusher_task _pending"
        " _pending_data_size _ping_interval_task _pongs _process_err _process_headers _process_info"
        " _process_op_err _read_loop _reading_task _select_next_server _server_info _server_pool"
        " _subs _transport",
        "nats.aio.subscription:Subscription": "_wait_for_msgs_task",
        "nats.aio.transport:TcpTransport": "_io_writer",
    },
    "redis": {
        "redis.asyncio.cluster:NodesManager": "aclose initialize nodes_cache slots_cache",
        "redis.asyncio.cluster:ClusterNode": "host port",
        "redis.asyncio.connection:AbstractConnection": "_reader _writer",
        "redis.asyncio.connection:ConnectionPool": "connection_class connection_kwargs make_connection",
        "redis.asyncio.sentinel:Sentinel": "check_master_state sentinels",
    },
    "kafka": {
        "aiokafka:AIOKafkaConsumer": "_client _coordinator _fetcher _subscription",
        "aiokafka:AIOKafkaProducer": "_message_accumulator _partition _sender client",
        "aiokafka.admin:AIOKafkaAdminClient": "_client",
        "aiokafka.client:AIOKafkaClient": "_conns _get_conn _sasl_oauth_token_provider _sasl_plain_password _sasl_plain_username"
        " _security_protocol _sync_task",
        "aiokafka.conn": "OAuthAuthenticator",
        "aiokafka.conn:OAuthAuthenticator": "step",
        "aiokafka.conn:AIOKafkaConnection": "_writer send",
        "aiokafka.consumer.fetcher": "MemoryRecords PartitionRecords",
        "aiokafka.consumer.fetcher:Fetcher": "_fetch_task _pending_tasks",
        "aiokafka.consumer.fetcher:PartitionRecords": "_aborted_producers _aborted_transactions _consumer_record _records"
        " _records_iterator _unpack_records next_fetch_offset",
        "aiokafka.consumer.group_coordinator:GroupCoordinator": "_commit_refresh_task _coordination_task"
        " _do_commit_offsets _heartbeat_task member_id",
        "aiokafka.consumer.subscription_state": "TopicPartitionState",
        "aiokafka.consumer.subscription_state:SubscriptionState": "reassignment_in_progress subscription",
        "aiokafka.consumer.subscription_state:TopicPartitionState": "update_committed",
        "aiokafka.producer.message_accumulator:BatchBuilder": "_build",
        "aiokafka.producer.message_accumulator:MessageAccumulator": "fail_all",
        "aiokafka.producer.sender:Sender": "sender_task",
        "aiokafka.protocol.metadata:MetadataRequest": "_allow_auto_topic_creation",
        "aiokafka.record.default_records:_DefaultRecordBatchPy": "_buffer _pos _read_msg",
        "aiokafka.record.default_records": "_DefaultRecordPy",
        "aiokafka.record.memory_records:_MemoryRecordsPy": "_next_slice next_batch",
        "aiokafka.record.util": "decode_varint",
    },
    "sqs": {"botocore.exceptions": "ConnectionError"},
    "postgres": {},
    "mqtt": {
        "paho.mqtt.client:Client": "_handle_publish _in_packet",
        "paho.mqtt.properties": "readUTF",
        "paho.mqtt.properties:Properties": "clear getIdentFromName names packetType",
        "paho.mqtt.properties:VariableByteIntegers": "decode",
    },
    "sqlite": {},
}
"""For each broker's client, the parts that the broker uses of a module, or of a class in it."""


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (owner, name)
        for parts in PARTS.values()
        for owner, names in parts.items()
        for name in names.split()
    ],
)
def test_a_client_library_has_the_part(owner: str, name: str) -> None:
    module, _, path = owner.partition(":")
    found: Any = import_module(module)
    for step in filter(None, path.split(".")):
        found = getattr(found, step)
    assert hasattr(found, name) or is_set(found, name), f"{owner} has no {name}"


def is_set(owner: type, name: str) -> bool:
    """Whether instances of the class have this attribute: it is declared, or a method sets it."""
    for one in owner.__mro__[:-1]:
        if name in (*getattr(one, "__slots__", ()), *getattr(one, "__annotations__", ())):
            return True
        if re.search(rf"\bself\.{name}\b[^=()]*= ", inspect.getsource(one)):
            return True
    return False


@pytest.mark.parametrize("broker", PARTS)
def test_every_private_attribute_that_a_broker_uses_is_named_here(broker: str) -> None:
    named = {name for names in PARTS[broker].values() for name in names.split()}
    ours = {name for file in RUNTIME.rglob("*.py") for name in defined(file)}
    files = {f"brokers/{broker}.py", *QUESTIONS["_brokers"][broker]["runtime"]}
    used = {
        node.attr
        for file in files
        for node in ast.walk(ast.parse((RUNTIME / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr[0] == "_" and node.attr[:2] != "__"
    }
    assert (
        used - ours - {"_asdict", "_replace"} <= named
    )  # except the documented attributes of NamedTuple


def defined(file: Path) -> set[str]:
    """The names of functions, classes, variables and attributes that a file of the runtime defines."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("broker", CHOICES["broker"])
@pytest.mark.parametrize("telemetry", CHOICES["telemetry"])
def test_a_service_declares_all_that_its_runtime_imports(
    render: Render, broker: str, telemetry: str
) -> None:
    service = render(broker=broker, telemetry=telemetry)
    declared = {  # an extra has the name of its package here: nats-py[nkeys]
        name.lower()
        for requirement in service.metadata["project"]["dependencies"]
        for name in re.findall(r"[\w.-]+", requirement.partition(">")[0])
    }
    distributions = packages_distributions()
    for name, text in service.files.items():
        if name.startswith(f"src/{service.package}/") and name.endswith(".py"):
            for imported in imports(text.decode()) - sys.stdlib_module_names - {service.package}:
                owners = {owner.lower().replace("_", "-") for owner in distributions[imported]}
                assert owners & declared, f"{name} imports {imported}"


def imports(text: str) -> set[str]:
    """The packages of other projects that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
