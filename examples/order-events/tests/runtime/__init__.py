# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Proves the runtime on this machine: cancellation, every broker's contract, and graceful shutdown with real signals."""
