# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""What the tests of the runtime need: real brokers, the service as a child process, and steps that tests share."""
