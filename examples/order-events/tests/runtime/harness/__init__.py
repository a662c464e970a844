# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The harness of the runtime's tests: real brokers, the service as a child process, and shared steps."""
