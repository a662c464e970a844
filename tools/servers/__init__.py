"""``python3 tasks.py servers``: the runtime's tests of a broker on newer servers."""
