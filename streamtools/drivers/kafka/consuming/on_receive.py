"""At most once: what is to be handled is committed before, and a handler begins only where that holds."""

from __future__ import annotations

from collections.abc import Collection

from streamtools.drivers.kafka.consuming.member import GroupMember
from streamtools.drivers.kafka.consuming.partition import AssignedPartition
from streamtools.errors import ConnectionLost, QueueError


async def commit_first(membership: GroupMember, tracks: Collection[AssignedPartition]) -> None:
    """Commit what counts as finished of these partitions, before any handler begins.

    Raises:
        ConnectionLost: the commit does not hold. No handler may begin: the messages come again, here or elsewhere.
    """
    wanted = [(track.offsets, track.offsets.changes) for track in tracks]
    try:
        await membership.commit()
    except QueueError as error:
        raise ConnectionLost(f"What was to be handled could not be committed before: {error}") from error
    if not all(offsets.is_committed(changes) for offsets, changes in wanted):
        raise ConnectionLost(
            f"The group {membership.group!r} has given the partitions to others before what was to be handled could "
            "be committed; no handler has begun."
        )
