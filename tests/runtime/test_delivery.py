"""How a dead letter is made to fit what the broker can store."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from runtime.brokers.delivery import REASON, SHORTENED, fit_dead_letter


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
