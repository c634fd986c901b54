"""send_message and receive_message for code without an event loop."""

from __future__ import annotations

import asyncio
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from streamtools import background
from streamtools.compat.jobs.connection import receive_message, send_message
from streamtools.compat.jobs.message import JobMessage
from streamtools.compat.jobs.receiving import Callback, check_callback
from streamtools.engine.functions.calling import is_async, name_of

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings


def send_message_sync(
    *,
    title: str,
    message_type: str,
    send_from: str,
    send_to: str,
    env: str = "",
    comments: str = "",
    data: dict[str, Any] | None = None,
    original_message: str | JobMessage = "None",
    url: str | ProtocolSettings | None = None,
) -> JobMessage:
    """Do what `send_message` does, for code without an event loop. Safe to call from any thread."""
    return background.run(
        send_message(
            title=title,
            message_type=message_type,
            send_from=send_from,
            send_to=send_to,
            env=env,
            comments=comments,
            data=data,
            original_message=original_message,
            url=url,
        )
    )


def receive_message_sync(
    queue_name: str,
    max_wait_time: float = 0,
    call_back_function: Callback | None = None,
    *,
    url: str | ProtocolSettings | None = None,
) -> list[JobMessage]:
    """Do what `receive_message` does, for code without an event loop. Safe to call from any thread.

    A `def` callback runs in the calling thread, an `async def` callback in the background loop.
    """
    if call_back_function is None or is_async(call_back_function):
        return background.run(receive_message(queue_name, max_wait_time, call_back_function, url=url))
    check_callback(call_back_function)
    calls: SimpleQueue[Call | None] = SimpleQueue()

    async def hand_over(message: JobMessage) -> Any:
        call = Call(message)
        calls.put(call)
        return await call.done

    hand_over.__qualname__ = name_of(call_back_function)  # the log and the error queue show the callback's name
    work = background.start(receive_message(queue_name, max_wait_time, hand_over, url=url))
    work.add_done_callback(lambda _: calls.put(None))
    try:
        while (call := calls.get()) is not None:
            call.make(call_back_function)
    except BaseException:  # such as Ctrl-C: the current message goes back to its queue
        work.stop()
        raise
    return work.result()


class Call:
    """One message that a callback in another thread handles, and the callback's result."""

    def __init__(self, message: JobMessage) -> None:
        self._message = message
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Any] = self._loop.create_future()

    def make(self, callback: Callback) -> None:
        """Call the callback in this thread, and pass its result to the event loop."""
        try:
            result, error = callback(self._message), None
        except Exception as raised:
            result, error = None, raised
        self._loop.call_soon_threadsafe(self._tell, result, error)

    def _tell(self, result: Any, error: Exception | None) -> None:
        if self.done.done():
            return
        if isinstance(error, StopIteration):  # a future does not accept it
            error = RuntimeError(f"the callback raised {error!r}")
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(result)
