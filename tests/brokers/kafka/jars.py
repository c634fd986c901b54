"""Kafka's jars: in a cache outside the tree, from a Maven registry when they are missing."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.brokers.packages import install
from tests.brokers.processes import BrokerError

POM = Path(__file__).with_name("pom.xml")
PACKAGES = ("default-jre-headless", "maven", "openssl")
PROGRAMS = ("java", "mvn", "openssl")
#: Kafka 4's server asks for this or newer (kafka.apache.org, "Java version").
JAVA = 17
#: Seconds for 41 MB of jars, 5 on a good line.
MAVEN_TIMEOUT = 600


class NoRegistryError(BrokerError):
    """The jars are not here and no Maven registry gave them."""


def directory() -> Path:
    """Where the jars of this pom lie, or will."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "streamtools" / f"kafka-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}"


def classpath() -> str:
    """For `java -cp`."""
    return f"{directory()}/*"


def is_installed() -> bool:
    """Whether a node can be started without installing or fetching anything."""
    return directory().is_dir() and all(shutil.which(name) for name in ("java", "openssl"))


def ensure_installed() -> None:
    """Install and fetch what is missing.

    Raises:
        NoRegistryError: no Maven registry answers.
        BrokerError: a program is missing and may not be installed; names the line to type.
    """
    if is_installed():
        return
    if not all(shutil.which(name) for name in PROGRAMS):
        install("Kafka", PACKAGES, "STREAMTOOLS_TEST_KAFKA_URL (e.g. kafka://127.0.0.1:9092/)")
    if (found := _java_version()) < JAVA:
        raise BrokerError(f"Kafka needs Java {JAVA} or newer, and `java` is {found}; put a newer one first on PATH")
    _fetch()


def _java_version() -> int:
    answer = subprocess.run(["java", "-version"], capture_output=True, text=True)
    found = re.search(r'version "(\d+)', answer.stderr + answer.stdout)
    return int(found[1]) if found else 0


def _fetch() -> None:
    """Copy into a directory beside, then rename: a cut-off download is no cache, and two may do it at once."""
    target = directory()
    target.parent.mkdir(parents=True, exist_ok=True)
    print("fetching Kafka's jars with Maven", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetching-") as work:
        jars = Path(work) / "jars"
        command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        try:
            done = subprocess.run(
                [*command, "-DincludeScope=runtime", "-Dstyle.color=never"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=MAVEN_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise NoRegistryError(f"{' '.join(command)} gave nothing in {MAVEN_TIMEOUT} s") from None
        if done.returncode:
            raise NoRegistryError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-1500:]}")
        if not target.is_dir():
            jars.rename(target)
