"""Which RabbitMQ the tests run, and where its programs are: the distribution's package, or RabbitMQ 4."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, Protocol

from tests.brokers import packages
from tests.brokers.address import VERSION
from tests.brokers.packages import BIN
from tests.brokers.processes import BrokerError

#: The Debian release whose rabbitmq-server is RabbitMQ 4 (4.0.5 on Erlang 27).
SUITE: Final = "trixie"
#: Seconds for about 130 packages; 35 on a good line.
BOOTSTRAP_TIMEOUT: Final = 900


class NotAvailableError(BrokerError):
    """This machine cannot get RabbitMQ 4: no root, no Linux, or no Debian archive answers."""


class Release(Protocol):
    """One RabbitMQ: whether it is here, how it comes here, and how its programs are called."""

    #: For `scripts/brokers`.
    source: str

    def is_installed(self) -> bool:
        """Whether a node can be started without installing anything."""

    def ensure_installed(self) -> None:
        """Install what is missing; raises BrokerError naming the line to type where we may not."""

    def command(self, directory: Path, program: str, *arguments: str) -> list[str]:
        """The whole command line.

        Parameters:
            directory: the program reads and writes below it.
            program: `rabbitmq-server`, `rabbitmqctl` or `epmd`.
        """


class Distribution:
    """The rabbitmq-server of this machine's distribution."""

    source = "packages"

    def is_installed(self) -> bool:
        """Whether a node can be started without installing anything."""
        return packages.is_installed()

    def ensure_installed(self) -> None:
        """Install what is missing; raises BrokerError naming the line to type where we may not."""
        packages.ensure_installed()

    def command(self, directory: Path, program: str, *arguments: str) -> list[str]:
        """The whole command line; see `Release`."""
        return [program if program == "epmd" else str(BIN / program), *arguments]


class Bootstrapped:
    """RabbitMQ 4 with its Erlang, from another Debian release in a directory of its own.

    `debootstrap` puts it into the cache, where it stays between runs. Its programs run in a mount namespace of their
    own, which ends with them: so nothing stays mounted below the cache.
    """

    source = f"debootstrap {SUITE}"

    @property
    def root(self) -> Path:
        """Where the release lies, or will."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "streamtools" / f"rabbitmq-{SUITE}"

    def is_installed(self) -> bool:
        """Whether a node can be started without installing anything."""
        return os.geteuid() == 0 and self.root.is_dir() and bool(shutil.which("openssl"))

    def ensure_installed(self) -> None:
        """Install what is missing.

        Raises:
            NotAvailableError: it cannot be had here; the text says why.
        """
        if self.is_installed():
            return
        if sys.platform != "linux" or os.geteuid() != 0:
            raise NotAvailableError(
                "RabbitMQ 4 comes by debootstrap, on Linux and for root. Type: sudo scripts/brokers up rabbitmq4. "
                f"Or set {VERSION}=4 and STREAMTOOLS_TEST_RABBITMQ_URL to a broker for tests."
            )
        if not all(shutil.which(name) for name in ("debootstrap", "openssl", "unshare", "chroot")):
            self._install_programs()
        if not self.root.is_dir():
            self._bootstrap()

    def _install_programs(self) -> None:
        try:
            packages.install("RabbitMQ 4", ("debootstrap", "openssl"), "STREAMTOOLS_TEST_RABBITMQ_URL")
        except BrokerError as error:
            raise NotAvailableError(str(error)) from error

    def _bootstrap(self) -> None:
        """Into a directory beside, then rename: one that was cut off is no cache, and two may do it at once."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching RabbitMQ 4 with debootstrap (Debian {SUITE}, 300 MB)", flush=True)
        with tempfile.TemporaryDirectory(dir=self.root.parent, prefix="fetching-") as work:
            tree = Path(work) / "root"
            command = ["debootstrap", "--variant=minbase", "--include=rabbitmq-server", SUITE, str(tree)]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOTSTRAP_TIMEOUT
            )
            if done.returncode:
                raise NotAvailableError(f"{' '.join(command[:-1])} failed:\n{(done.stdout + done.stderr)[-2000:]}")
            for archive in (tree / "var/cache/apt/archives").glob("*.deb"):
                archive.unlink()
            (tree / "etc/hosts").write_text("127.0.0.1 localhost\n")
            if not self.root.is_dir():
                tree.rename(self.root)

    def command(self, directory: Path, program: str, *arguments: str) -> list[str]:
        """The whole command line; see `Release`. Each step becomes the next: the process is the program itself."""
        path = program if program == "epmd" else str(BIN / program)
        return ["unshare", "--mount", "sh", "-ec", _ENTER, str(self.root), str(directory), path, *arguments]


#: $0 the tree, $1 the directory; then the program. The directory has the same name inside.
_ENTER: Final = """
tree=$0 directory=$1; shift
mount --make-rprivate /
mount --rbind /proc "$tree/proc"
mount --rbind /dev "$tree/dev"
parent=$(dirname "$directory")
mkdir -p "$tree$parent"
mount --bind "$parent" "$tree$parent"
exec chroot "$tree" "$@"
"""

DISTRIBUTION: Final = Distribution()
RABBITMQ_4: Final = Bootstrapped()


def chosen() -> Release:
    """What STREAMTOOLS_TEST_RABBITMQ_VERSION asks for."""
    wanted = os.environ.get(VERSION, "")
    if wanted in ("", "3"):
        return DISTRIBUTION
    if wanted == "4":
        return RABBITMQ_4
    raise BrokerError(f"{VERSION}={wanted!r}: 4 for RabbitMQ 4, or nothing for the distribution's own")
