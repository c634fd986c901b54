"""Zips folders for any application: takes job messages from the queue `zip`, and answers to their sender's queue.

STORAGE is the folder that stands for a storage bucket (./storage); nothing outside it is read or written.
"""

import os
import tempfile
import zipfile
from pathlib import Path

from pydantic import BaseModel

from streamtools import ConsumerFactory, ConsumerRunner, Reject
from streamtools.jobs import JobMessage, send_message_sync

STORAGE = Path(os.environ.get("STORAGE", "storage")).resolve()

consumers = ConsumerFactory()


class Pack(BaseModel):
    """What `data` holds: which folder, into which file."""

    folder: str
    archive: str


class PackJob(JobMessage):
    """A job message with such data. Any other goes to the error queue, with the reason."""

    data: Pack


@consumers.route("zip")
def pack(job: PackJob) -> None:
    """Zip a folder. A `def` handler runs in a thread, so it answers with `send_message_sync`. Safe to repeat."""
    folder, archive = inside(job.data.folder), inside(job.data.archive)
    if not folder.is_dir():
        raise Reject(f"there is no folder {job.data.folder!r}")
    number = write(archive, folder)
    send_message_sync(
        title=f"Packed: {job.title}",
        message_type="Packed",
        send_from="zip",
        send_to=job.send_from,
        data={"archive": job.data.archive, "files": number},
        original_message=job,
    )
    print(f"{job.title}: {number} files in {job.data.archive}", flush=True)


def inside(name: str) -> Path:
    """A path inside the storage, after following links."""
    path = (STORAGE / name).resolve()
    if not path.is_relative_to(STORAGE) or path == STORAGE:
        raise Reject(f"{name!r} is not in the storage")
    return path


def write(archive: Path, folder: Path) -> int:
    """Write a temporary file, then rename it, so that nobody sees half an archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.resolve().is_relative_to(folder))
    with tempfile.NamedTemporaryFile(dir=archive.parent, prefix=".packing-", delete=False) as new:
        try:
            with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as packed:
                for file in files:
                    if file != archive and file != Path(new.name):
                        packed.write(file, file.relative_to(folder))
            os.replace(new.name, archive)
        except BaseException:
            os.unlink(new.name)
            raise
    return len(packed.namelist())


runner = ConsumerRunner(consumers)

if __name__ == "__main__":
    runner.run()
