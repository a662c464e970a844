# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Headers with values of JSON, on brokers whose headers are text only: one more header lists their names."""

import json
from contextlib import suppress
from typing import Any


def decode_json_values(values: dict[str, Any], names: Any) -> None:
    """Decode, in place, the values that are JSON; ``names`` is the JSON list of their names.

    A value that is missing or is not JSON stays unchanged.
    """
    try:
        listed = json.loads(names)
    except (TypeError, ValueError, RecursionError):
        return
    for name in listed if isinstance(listed, list) else ():
        with suppress(KeyError, TypeError, ValueError, RecursionError):
            values[name] = json.loads(values[name])
