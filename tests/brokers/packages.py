"""The distribution's packages: RabbitMQ, and what others need."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.brokers.processes import BrokerError

#: Not /usr/sbin: the wrappers there change user.
BIN = Path("/usr/lib/rabbitmq/bin")
PACKAGES = ("rabbitmq-server", "openssl")
POLICY = Path("/usr/sbin/policy-rc.d")
#: Seconds for the package lists, and for the packages.
APT_TIMEOUT = 600


def is_installed() -> bool:
    """Whether a node can be started from packages."""
    return (BIN / "rabbitmq-server").exists() and all(shutil.which(name) for name in ("epmd", "openssl"))


def ensure_installed() -> None:
    """Install what is missing; raises BrokerError naming the line to type where we may not."""
    if is_installed():
        return
    install("RabbitMQ", PACKAGES, "STREAMTOOLS_TEST_RABBITMQ_URL (e.g. amqp://guest:guest@127.0.0.1:5672/)")
    if not is_installed():
        raise BrokerError(f"apt-get succeeded, but {BIN}/rabbitmq-server, epmd or openssl is still missing")


def install(product: str, names: Sequence[str], variable: str) -> None:
    """Install packages of the distribution.

    Parameters:
        product: what they are for.
        variable: names a broker that is already there, for who may not install.

    Raises:
        BrokerError: it may not be done, with the line to type, or it failed.
    """
    line = f"apt-get install -y --no-install-recommends {' '.join(names)}"
    if not shutil.which("apt-get"):
        raise BrokerError(f"no {product}: no Docker engine, no apt-get. Set {variable} to a broker for tests.")
    if os.geteuid() != 0:
        raise BrokerError(f"{product} is not installed and only root may do it. Type: sudo {line}")
    print("installing:", *names, flush=True)
    with _services_stay_down():
        _run("apt-get", "update", "-q")
        _run(*line.split())


def _run(*command: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=APT_TIMEOUT
    )
    if done.returncode:
        raise BrokerError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


@contextmanager
def _services_stay_down() -> Iterator[None]:
    """The package would start a broker on the standard port; only ours shall run (man invoke-rc.d)."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
