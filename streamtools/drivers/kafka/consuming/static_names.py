"""Names of static members: each consumer has its own name, though `static_id` is given once for several.

Kafka knows a static member by its name alone. Two members of one name push each other out of the group for ever.
"""

from __future__ import annotations

import threading
from itertools import count
from typing import Final

from streamtools.settings import worker_number

#: Names in use in this process: address, group and name. They are the process's, as Kafka sees no event loops.
_in_use: Final[set[tuple[str, str, str]]] = set()
_lock: Final = threading.Lock()


def take(address: str, group: str, static_id: str) -> str:
    """A name that no other consumer of this process has in the group; to be released.

    It is `static_id`, with the number of the worker process if there are several, and with a number from 2 on for
    further consumers of one process: `billing.worker-1.consumer-2`.
    """
    worker = worker_number()
    plain = static_id if worker is None else f"{static_id}.worker-{worker}"
    with _lock:
        for number in count(1):
            name = plain if number == 1 else f"{plain}.consumer-{number}"
            if (address, group, name) not in _in_use:
                _in_use.add((address, group, name))
                return name
    raise AssertionError("not reached")


def release(address: str, group: str, name: str) -> None:
    """Give a name back; safe to repeat."""
    with _lock:
        _in_use.discard((address, group, name))
