"""Real brokers for the tests: each with its own ports, directory and processes, on loopback only.

`scripts/brokers` and the fixtures of `tests/conftest.py` use the same code. Standard library only,
so that it works before anything is installed.
"""
