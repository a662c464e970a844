"""How a dead letter is shortened until the broker can store it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runtime.brokers import delivery
from runtime.brokers.delivery import PREFIX, REASON, SHORTENED, fit_dead_letter, make_message
from runtime.telemetry import queue_seconds


def size(body: bytes, headers: dict[str, Any]) -> int:
    return len(body) + sum(len(name) + len(str(value)) for name, value in headers.items())


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 400))
def test_a_dead_letter_loses_foreign_headers_first_and_then_the_end_of_its_body(
    body: bytes, foreign_length: int, limit: int
) -> None:
    headers = {"theirs": "x" * foreign_length, REASON: "it is bad"}
    fitted, kept = fit_dead_letter(body, headers, lambda *form: size(*form) <= limit)
    assert body.startswith(fitted)
    assert kept[REASON] == "it is bad"
    if size(body, headers) <= limit:
        assert (fitted, kept) == (body, headers)
    else:
        assert kept == {REASON: "it is bad", SHORTENED: len(body)}
        assert size(fitted, kept) <= limit or fitted == b""
        if size(body, kept) <= limit:
            assert fitted == body


TIMES = st.one_of(
    st.datetimes(),
    st.datetimes(timezones=st.timezones()),
    st.sampled_from([datetime.min, datetime.max, datetime.fromtimestamp(0, UTC)]),
    st.floats(),
    st.integers(),
    st.text(),
)


@given(TIMES)
def test_any_time_of_publishing_is_one_or_none(value: Any) -> None:
    """Foreign producers write any value, and a time that Python cannot represent must not end a consumer."""
    message = make_message(b"", id="", type="", headers={}, published_at=value)
    seconds = queue_seconds(message)
    if message.published_at is None:
        assert seconds is None
    else:
        assert message.published_at - datetime(2001, 1, 1, tzinfo=UTC) > timedelta(0)
        assert seconds is not None
        assert 0 <= seconds < 1e10


def test_the_prefix_of_the_runtime_s_headers_and_the_time_of_publishing_are_defined_once() -> None:
    place = Path(delivery.__file__)
    texts = {file.name: file.read_text("utf-8") for file in place.parent.glob("*.py")}
    assert len(texts) > 10
    for defined in (f'"{PREFIX}', "\nPUBLISHED_AT ="):
        assert [name for name, text in texts.items() if defined in text] == [place.name], defined
