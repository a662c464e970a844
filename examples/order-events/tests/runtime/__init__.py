# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Proves the runtime on this machine: cancellation, every broker's contract, and graceful shutdown with real signals."""
