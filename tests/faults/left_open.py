"""What event loops still had open when they were closed."""

from __future__ import annotations

from asyncio.selector_events import BaseSelectorEventLoop
from typing import Any, Final

#: Each connection with its addresses, since the list was last cleared.
left_open: Final[list[str]] = []


def watch_loops() -> None:
    """Have each loop, when it is closed, add to `left_open` what nobody has closed before."""
    close: Any = BaseSelectorEventLoop.close

    def look_and_close(loop: Any) -> None:
        if not loop.is_closed():
            for transport in list(loop._transports.values()):
                if not transport.is_closing():
                    left_open.append(
                        f"{transport.get_extra_info('sockname')} -> {transport.get_extra_info('peername')}"
                    )
        close(loop)

    BaseSelectorEventLoop.close = look_and_close  # type: ignore[method-assign, assignment]
