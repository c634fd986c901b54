"""Jobs: messages of one fixed schema between queues; one function sends, one receives.

```python
await send_message(title="Label", message_type="print", send_from="l7", send_to="bioconnect-id-service")
messages = await receive_message("bioconnect-id-service", max_wait_time=1)
```

Each call opens and closes its own connection; `async with connect(url) as q:` keeps what it sends on.
Scripts without an event loop call `send_message_sync` and `receive_message_sync`.
"""

from streamtools.compat.jobs.connection import JobConnection, connect, receive_message, send_message
from streamtools.compat.jobs.message import JobMessage, QueueName
from streamtools.compat.jobs.receiving import Callback
from streamtools.compat.jobs.sync import receive_message_sync, send_message_sync

__all__ = [
    "Callback",
    "JobConnection",
    "JobMessage",
    "QueueName",
    "connect",
    "receive_message",
    "receive_message_sync",
    "send_message",
    "send_message_sync",
]
