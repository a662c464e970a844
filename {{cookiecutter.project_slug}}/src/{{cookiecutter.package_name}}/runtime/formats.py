# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Prepares a body for the handler's model: decompresses it, and decodes it by its content type."""

import base64
import zlib
from collections.abc import Callable, Mapping

from pydantic_core import from_json, to_json

from .message import Message, Reject, Retry

MOST_BYTES = 5_000_000
"""The limit of a decompressed body: a small body may decompress to gigabytes."""
COMPRESSED = {"gzip", "x-gzip", "application/x-gzip", "deflate", "zlib"}
UNCHANGED = {"", "identity", "none", "binary", "7bit", "8bit", "ascii", "us-ascii", "utf8", "utf-8"}
"""Also the character sets that AMQP's producers write here; kombu writes binary for MessagePack and pickle."""
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS

Decoder = Callable[[bytes], object]
"""Bytes are decoded as JSON by the handler's model; any other object is validated by it. Key ``""``: no content type."""


def unpack(message: Message, decoders: Mapping[str, Decoder]) -> object:
    """The body without its content encoding, decoded if there is a decoder of its content type. Raises Reject."""
    body = message.body
    encoding = message.content_encoding.lower()
    if encoding in COMPRESSED:
        body = _decompressed(message.body, message.content_encoding)
    elif decoders and encoding not in UNCHANGED:
        # Without decoders the body is for a handler of bytes, which decodes it.
        raise Reject(f"unknown content encoding {message.content_encoding[:100]!r}")
    content_type = message.content_type.partition(";")[0].strip().lower()
    if (decoder := decoders.get(content_type)) is not None:
        try:
            return decoder(body)
        except Retry:  # a dependency of the decoder, such as a schema, is unavailable
            raise
        except Exception as error:
            what = content_type or "body"
            raise Reject(f"invalid {what}: {type(error).__name__}: {error}") from error
    return body


def _decompressed(body: bytes, encoding: str) -> bytes:
    unpacking = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        unpacked = unpacking.decompress(body, MOST_BYTES)
    except zlib.error as error:
        raise Reject(f"its body is not {encoding}: {error}") from error
    if unpacking.unconsumed_tail:
        raise Reject(f"its body has more than {MOST_BYTES} bytes when it is decompressed")
    if not unpacking.eof:
        raise Reject(f"its body is not {encoding}: it is cut off")
    if unpacking.unused_data:
        raise Reject(f"its body is not {encoding}: something follows its end")
    return unpacked


def data_of_event(body: bytes) -> object:
    """The data of a structured CloudEvent."""
    event = from_json(body)
    if "data_base64" in event:
        return base64.b64decode(event["data_base64"], validate=True)
    return to_json(event.get("data"))


DECODERS: Mapping[str, Decoder] = {"application/cloudevents+json": data_of_event}
"""The decoders of every service; its own are in handlers/__init__.py."""
