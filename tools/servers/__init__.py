"""``python3 tasks.py servers``: the runtime's tests of a broker on other servers than the machine's."""
