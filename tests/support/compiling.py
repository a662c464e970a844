"""Jinja's compiler makes the same code of the same text each time, at half of a render's cost: so it is cached."""

import marshal
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import CodeType
from typing import Any

import jinja2

KEPT = Path(__file__).resolve().parents[2] / ".cache/compiled"
"""For all processes, and for the next run: a file's name is a hash of the compiler's whole input."""
Compile = Callable[..., CodeType | str]


def compiling_once(compile_anew: Compile) -> Compile:
    """A replacement of `jinja2.Environment.compile`."""
    codes: dict[Any, CodeType | str] = {}

    def compile_once(self: jinja2.Environment, *source: Any) -> CodeType | str:
        # Jinja has one lexer for each set of delimiters and of rules for white space.
        key = (self.lexer, frozenset(self.extensions), source)
        if key not in codes and "{" not in str(source[0]):
            codes[key] = compile_anew(
                self, *source
            )  # it may be a path in a folder that is new each time
        elif key not in codes:
            rules = (getattr(self, name) for name in RULES)
            made_of = (*MADE_BY, *rules, sorted(self.extensions), source)
            file = KEPT / sha256(repr(made_of).encode()).hexdigest()
            try:
                codes[key] = marshal.loads(file.read_bytes())
            except (OSError, ValueError, EOFError):
                codes[key] = compile_anew(self, *source)
                keep(file, marshal.dumps(codes[key]))
        return codes[key]

    return compile_once


MADE_BY = (jinja2.__version__, sys.version)
RULES = (
    *("block_start_string", "block_end_string", "variable_start_string", "variable_end_string"),
    *("comment_start_string", "comment_end_string", "line_statement_prefix"),
    *("line_comment_prefix", "trim_blocks", "lstrip_blocks", "newline_sequence"),
    *("keep_trailing_newline", "optimized", "autoescape"),
)
"""The settings of an environment that a text's code depends on, in addition to its extensions."""


def keep(file: Path, content: bytes) -> None:
    """Write the file completely or not at all, since others may read it; not without the right to write."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        own = file.with_suffix(f".{os.getpid()}")
        own.write_bytes(content)
        own.replace(file)
