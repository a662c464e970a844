# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""The harness of the runtime's tests: real brokers, the service as a child process, and shared steps."""
