"""What the nodes of one broker share: directory, certificates, and who cleans up."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.brokers.certificates import Certificates, make_certificates
from tests.brokers.processes import end_all, free_ports, guard, spawn
from tests.brokers.release import Release, chosen


class Home:
    """A temporary directory with everything in it, certificates first.

    Parameters:
        name: of the product, in the directory's name.
        guarded: True ends the processes and removes the directory with this process, however it ends;
            False leaves them running (`scripts/brokers up`).
    """

    def __init__(self, name: str, *, guarded: bool = True) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"streamtools-{name}-"))
        self._guard = guard(self.directory) if guarded else None
        self.certificates: Certificates = make_certificates(self.directory / "certificates")

    def close(self) -> None:
        """End every process that was started here and remove the directory; safe to repeat."""
        end_all(self.directory)
        if self._guard is not None:
            self._guard.communicate()
        shutil.rmtree(self.directory, ignore_errors=True)


class ErlangHome(Home):
    """What the nodes of one RabbitMQ share besides: a cookie, and an Erlang port mapper of its own.

    Parameters:
        release: which RabbitMQ; what the environment asks for when None.
    """

    def __init__(self, *, guarded: bool = True, release: Release | None = None) -> None:
        self.release: Release = chosen() if release is None else release
        self.release.ensure_installed()
        super().__init__("rabbitmq", guarded=guarded)
        self._epmd: subprocess.Popen[bytes] | None = None
        self.epmd_port = 0
        self._bake_cookie()

    def _bake_cookie(self) -> None:
        cookie = self.directory / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(16))
        cookie.chmod(0o400)  # Erlang refuses a cookie that others can read

    def start_epmd(self) -> None:
        """Start the port mapper if it is not running: it outlives nodes, so it must be ours to end."""
        if self._epmd is not None and self._epmd.poll() is None:
            return
        # A restarted one keeps its port: running nodes register themselves again.
        self.epmd_port = self.epmd_port or free_ports(1)[0]
        self._epmd = spawn(
            self.release.command(self.directory, "epmd", "-port", str(self.epmd_port), "-address", "127.0.0.1"),
            env=self.environment(),
            log=self.directory / "epmd.log",
            pid_file=self.directory / "epmd.pid",
        )

    def environment(self) -> dict[str, str]:
        """Variables for every Erlang program here. Nothing of the caller's RABBITMQ_* or ERL_* gets in."""
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(self.directory),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": "/dev/null",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        }

    def close(self) -> None:
        """End every process that was started here and remove the directory; safe to repeat."""
        super().close()
        if self._epmd is not None:
            self._epmd.wait()
