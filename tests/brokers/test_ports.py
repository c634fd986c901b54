"""Ports for brokers that start seconds later."""

from __future__ import annotations

import subprocess
import sys

from tests.brokers.processes import PORTS, free_ports


def test_a_port_is_given_once_whoever_asks() -> None:
    mine = free_ports(50)
    assert len(set(mine)) == 50 and not set(mine) & set(free_ports(50))
    ask = f"from tests.brokers.processes import free_ports; print(*free_ports({len(PORTS)}))"
    theirs = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, timeout=60)
    found = {int(port) for port in theirs.stdout.split()}
    assert len(found) > len(PORTS) / 2 and not found & set(mine)
