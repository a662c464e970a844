"""Settings and logs: a bad value is one line that names the variable, and no password is ever shown."""

import io
import json
import logging
from pathlib import Path

import pytest
import structlog
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from runtime.errors import SettingsError
from runtime.logs import configure_logs
from runtime.redaction import keep_secret, redacted
from runtime.settings import ConsumerSettings, load_settings

URL = "amqp://user:p%40ss-word@localhost/"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without .env
    for name in ConsumerSettings.model_fields:
        monkeypatch.delenv(f"CONSUMER_{name}".upper(), raising=False)


BAD_VALUES = [
    ("BROKER_URL", None, "is not set"),
    ("BROKER_URL", "", "is not set"),
    ("BROKER_URL_FILE", "/run/secrets/url", "CONSUMER_BROKER_URL is set too: set one of the two"),
    ("SOURCE", "q" * 201, "at most 200 characters"),
    ("SOURCE", "s" * 5_001, "at most 5000 characters"),
    ("SOURCE", "orders,,payments", "has an empty name: write orders,payments"),
    ("SOURCE", "orders,", "has an empty name: write orders,payments"),
    ("SOURCE", "orders, orders", "has a duplicate name"),
    (
        "SOURCE",
        "orders,kafka://host/payments",
        "is a URL: name queues of the broker of CONSUMER_BROKER",
    ),
    ("CONCURRENCY", "many", "valid integer"),
    ("CONCURRENCY", "0", "greater than or equal to 1"),
    ("CONCURRENCY", "1000000", "less than or equal to 10000"),
    ("PREFETCH", "-1", "greater than or equal to 1"),
    ("PREFETCH", "70000", "less than or equal to 65535"),
    ("GROUP", "g" * 201, "at most 200 characters"),
    ("DECLARE", "maybe", "valid boolean"),
    ("BINDINGS", "x" * 5_001, "at most 5000 characters"),
    ("TYPE_FROM", "routing_key", "must be routing-key, subject, topic, header:NAME or body:FIELD"),
    ("TYPE_FROM", "header:", "must be routing-key, subject, topic, header:NAME or body:FIELD"),
    ("ORDER_BY", "customer", "must be key, header:NAME or body:FIELD, as in"),
    ("ORDER_BY", "header:", "must be key, header:NAME or body:FIELD, as in"),
    ("ORDER_BY", "body:" + "x" * 200, "at most 200 characters"),
    ("DRAIN_SECONDS", "soon", "valid number"),
    ("DRAIN_SECONDS", "-1", "greater than or equal to 0"),
    ("DRAIN_SECONDS", "nan", "less than or equal to 86400"),
    ("HANDLER_SECONDS", "-1", "greater than or equal to 0"),
    ("HANDLER_SECONDS", "nan", "less than or equal to 86400"),
    ("CONNECT_SECONDS", "inf", "less than or equal to 86400"),
    ("MAX_ATTEMPTS", "0", "greater than or equal to 1"),
    ("MAX_DELIVERIES", "501", "less than or equal to 500"),
    ("MAX_BODY_BYTES", "-1", "greater than or equal to 0"),
    ("RETRY_SECONDS", "0", "greater than 0"),
    ("RETRY_MAX_SECONDS", "x", "valid number"),
    ("BREAKER_FAILURES", "-1", "greater than or equal to 0"),
    ("RETRY_MAX_SECONDS", "0.5", "must be at least CONSUMER_RETRY_SECONDS"),
    ("BATCH_SIZE", "0", "greater than or equal to 1"),
    ("BATCH_SECONDS", "0", "greater than 0"),
    ("PROBE_HOST", "h" * 256, "at most 255 characters"),
    ("DURATION_BUCKETS", "0.1;1", "valid number"),
    ("DURATION_BUCKETS", "1,0", "greater than 0"),
    ("DURATION_BUCKETS", "inf", "less than or equal to 86400"),
    ("PROBE_PORT", "http", "valid integer"),
    ("PROBE_PORT", "65536", "less than or equal to 65535"),
    ("LOG_FORMAT", "xml", "'json' or 'console'"),
    ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
]


@pytest.mark.parametrize(("variable", "value", "reason"), BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, reason: str
) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", URL)
    if value is None:
        monkeypatch.delenv(f"CONSUMER_{variable}")
    else:
        monkeypatch.setenv(f"CONSUMER_{variable}", value)
    with pytest.raises(SettingsError) as error:
        load_settings(ConsumerSettings)
    assert str(error.value).startswith(f"CONSUMER_{variable}")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_bindings_are_of_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", URL)
    monkeypatch.setenv("CONSUMER_SOURCE", "orders, payments")
    assert load_settings(ConsumerSettings).sources == ["orders", "payments"]
    monkeypatch.setenv("CONSUMER_BINDINGS", "a/b")
    with pytest.raises(SettingsError, match="CONSUMER_SOURCE must name the one queue to bind"):
        load_settings(ConsumerSettings)


def test_a_log_level_may_be_written_in_capitals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", URL)
    monkeypatch.setenv("CONSUMER_LOG_LEVEL", "WARNING")
    assert load_settings(ConsumerSettings).log_level == "warning"


def test_every_setting_has_a_bad_value_above() -> None:
    assert {variable.lower() for variable, _, _ in BAD_VALUES} == {*ConsumerSettings.model_fields}


def test_a_service_names_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settings(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="ORDERS_")
        limit: int = Field(gt=0)

    monkeypatch.setenv("ORDERS_LIMIT", "-3")
    with pytest.raises(SettingsError, match=r"^ORDERS_LIMIT: Input should be greater than 0$"):
        load_settings(Settings)


def test_an_alias_is_named_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settings(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="ORDERS_")
        database: str = Field(validation_alias="DATABASE_URL")

    with pytest.raises(SettingsError, match=r"^DATABASE_URL: is not set$"):
        load_settings(Settings)


def test_a_list_that_is_not_json_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settings(BaseSettings):
        tags: list[str]

    monkeypatch.setenv("TAGS", "red,hidden")
    with pytest.raises(SettingsError, match=r"^error parsing value for field \"tags\" [^\n]*$"):
        load_settings(Settings)


def test_a_dotenv_file_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"CONSUMER_GROUP=caf\xe9\n")
    with pytest.raises(SettingsError, match=r"^.env cannot be read: [^\n]*$"):
        load_settings(ConsumerSettings)


def test_a_dotenv_file_is_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = f"CONSUMER_BROKER_URL={URL}\nCONSUMER_CONCURRENCY=3\nCONSUMER_PREFETCH=4\nOTHER=1\n"
    (tmp_path / ".env").write_text(lines)
    monkeypatch.setenv("CONSUMER_PREFETCH", "5")
    settings = load_settings(ConsumerSettings)
    assert (settings.concurrency, settings.prefetch) == (3, 5)
    assert settings.broker_url.get_secret_value() == URL


def test_the_url_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{URL}\n")
    monkeypatch.setenv("CONSUMER_BROKER_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("CONSUMER_BROKER_URL", "")  # the same as not set
    settings = load_settings(ConsumerSettings)
    assert settings.broker_url.get_secret_value() == URL
    assert "p%40ss-word" not in repr(settings)


def test_a_url_in_dotenv_beside_a_file_is_refused_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"CONSUMER_BROKER_URL={URL}\n")
    monkeypatch.setenv("CONSUMER_BROKER_URL_FILE", str(tmp_path / "url"))
    with pytest.raises(SettingsError, match=r"^CONSUMER_BROKER_URL_FILE: .* set one of the two$"):
        load_settings(ConsumerSettings)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        ("a folder", "cannot be read: Is a directory"),
        (b"amqp://caf\xe9@host", "cannot be read: it is not UTF-8"),
        (b"", "is empty"),
        (b" \n", "is empty"),
    ],
)
def test_a_file_without_a_url_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes | None, reason: str
) -> None:
    file = tmp_path / "url"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        file.mkdir()
    monkeypatch.setenv("CONSUMER_BROKER_URL_FILE", str(file))
    with pytest.raises(SettingsError) as error:
        load_settings(ConsumerSettings)
    assert str(error.value) == f"CONSUMER_BROKER_URL_FILE: {file} {reason}"


def test_settings_do_not_show_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSUMER_BROKER_URL", URL)
    assert "p%40ss-word" not in repr(load_settings(ConsumerSettings))


def test_passwords_are_masked_as_written_and_as_meant() -> None:
    keep_secret(URL)
    text = f"cannot reach {URL}: p@ss-word was refused, also amqp://a:b@other"
    masked = redacted(text)
    assert masked == "cannot reach amqp://***@localhost/: *** was refused, also amqp://***@other"


@pytest.mark.parametrize("password", ["p@ss", "pa/ss", "pa#ss", "pa:ss", "p[ss", "pa ss"])
def test_a_password_that_should_have_been_escaped_is_masked_too(password: str) -> None:
    url = f"amqp://user:{password}@localhost/orders?heartbeat=5"
    keep_secret(url)
    assert "ss" not in redacted(f"cannot reach {url}")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("nats://token@localhost refused", "nats://***@localhost refused"),
        ("http://localhost is for me@example.org", "http://localhost is for me@example.org"),
    ],
)
def test_only_text_in_a_url_is_masked_by_its_place(text: str, masked: str) -> None:
    assert redacted(text) == masked


def test_a_short_password_does_not_mask_all_the_text() -> None:
    keep_secret("amqp://user:a@localhost/")
    assert redacted("a sentence") == "a sentence"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_log_line_contains_a_password(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure_logs("json" if log_format == "json" else "console", "info")
    keep_secret(URL)
    try:
        structlog.get_logger().info("connected", url=URL, nested=[f"to {URL}"])
        structlog.get_logger().info("retrying", error=OSError(URL), pair=(URL, {URL}))
        try:
            msg = f"no route to {URL}"
            raise OSError(msg)
        except OSError:
            structlog.get_logger().exception("crashed")
        logging.getLogger("some_client").warning("connection to %s lost", URL)
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    output = capsys.readouterr().out
    assert "crashed" in output
    assert "OSError: no route to amqp://***@localhost/" in output
    assert "connection to" in output
    assert "ss-word" not in output


def test_a_log_line_is_one_json_object_whatever_it_carries(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("json", "info")
    try:
        structlog.get_logger().info("handling", id='a"b\n{"event": "forged"}', raw=b"\xff")
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["event"] == "handling"


def test_a_message_cannot_move_the_cursor_of_a_terminal_or_forge_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("console", "info")
    try:
        structlog.get_logger().info("handling", id="\x1b[2J\nforged")
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    [line] = capsys.readouterr().out.splitlines()
    assert "\x1b[2J" not in line
    assert "forged" in line


def test_every_line_has_its_time_and_level_first_and_then_what_is_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("json", "warning")
    try:
        with structlog.contextvars.bound_contextvars(message_id="7"):
            structlog.get_logger().info("too little for this level")
            structlog.get_logger().warning("ours")
            logging.getLogger("some_client").info("too little for this level")
            logging.getLogger("some_client").warning("theirs")
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["ours", "theirs"]
    for line in lines:
        assert list(line)[:3] == ["timestamp", "level", "event"]
        assert (line["level"], line["message_id"]) == ("warning", "7")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_line_is_lost_for_a_character_that_the_terminal_lacks(
    monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    configure_logs("json" if log_format == "json" else "console", "info")
    try:
        structlog.get_logger().info("café", id="caf\udce9")
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    assert b"caf" in written.getvalue()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("postgres://me@host/db?password=hidden", "no route to {url}"),
        ("postgres://me@host/db?sslmode=on&sslpassword=hidden#x", "no route to {url}"),
        ("postgres://me@host/db?password=p%26hidden", "the server got p&hidden"),
        ("nats://hidden@host", "the server got hidden"),
        ("tls://hidden@host", "no route to {url}"),
    ],
)
def test_secrets_elsewhere_in_a_url_are_masked_too(url: str, text: str) -> None:
    keep_secret(url)
    masked = redacted(text.format(url=url))
    assert "hidden" not in masked
    assert "***" in masked


def test_a_user_without_a_password_is_no_secret() -> None:
    keep_secret("postgres://postgres@localhost/")
    assert redacted("postgres is a user") == "postgres is a user"


def test_a_query_is_masked_by_its_place_also_where_its_secret_is_not_known() -> None:
    masked = redacted("no route to postgres://host/db?password=pw&sslmode=on")
    assert masked == "no route to postgres://host/db?password=***&sslmode=on"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_log_line_contains_the_input_that_a_validation_error_quotes(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    class Order(BaseModel):
        number: int

    payload = {"number": "hidden, input_type=hidden"}
    configure_logs("json" if log_format == "json" else "console", "info")
    try:
        try:
            Order.model_validate(payload)
        except ValidationError as error:
            structlog.get_logger().warning("retried", reason=str(error), exc_info=error)
            structlog.get_logger().warning("retried", error=error)
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    output = capsys.readouterr().out
    assert "int_parsing" in output
    assert "hidden" not in output


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_length_of_a_log_line_is_bounded(
    capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    configure_logs("json" if log_format == "json" else "console", "info")
    try:
        error = ValueError("x" * 1_000_000)
        structlog.get_logger().warning("handling", id="y" * 1_000_000, exc_info=error)
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    output = capsys.readouterr().out
    assert "[1000000 characters]" in output
    assert len(output) < 30_000


def test_no_text_of_an_exception_or_a_library_looks_like_a_line_of_the_console(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("console", "info")
    try:
        error = ValueError("\x1b[2J\nforged\r\x85forged\u2028forged")
        structlog.get_logger().warning("retried", exc_info=error, headers={"a\nforged": "\x1b"})
        logging.getLogger("some_client").warning("got %s", "\x1b[2J\nforged")
    finally:
        structlog.reset_defaults()
        logging.basicConfig(force=True)
    output = capsys.readouterr().out
    assert "forged" in output
    assert not set("\x1b\r\x85\u2028") & set(output)
    assert not [line for line in output.split("\n") if line.startswith("forged")]


def test_a_variable_that_does_not_exist_is_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="CONSUMER_")
        database_url: str = ""

    monkeypatch.setenv("CONSUMER_CONCURENCY", "a-secret")
    monkeypatch.setenv("CONSUMER_DATABASE_URL", "a-secret")
    monkeypatch.setenv("CONSUMER_TEST_BROKER_URL", "a-secret")
    (tmp_path / ".env").write_text("CONSUMER_BROKER_URL=amqp://x/\nconsumer_nonsense=a-secret\n")
    for _ in range(2):
        load_settings(Own)
        load_settings(ConsumerSettings)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warned == [
        "warning: CONSUMER_CONCURENCY is not a setting; CONSUMER_CONCURRENCY is",
        "warning: CONSUMER_NONSENSE is not a setting",
    ]
