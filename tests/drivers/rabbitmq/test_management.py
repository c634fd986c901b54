"""Without the management plugin queues cannot be listed, and the error says so in plain words."""

from __future__ import annotations

import pytest

from streamtools import ADMINS, ConnectError
from tests.brokers.processes import free_ports


async def test_a_management_api_that_does_not_answer_is_one_plain_sentence(url: str) -> None:
    port = free_ports(1)[0]
    where = f"{url}?management_url=http://user:hunter2@127.0.0.1:{port}"
    async with ADMINS["rabbitmq"](url=where) as admin:
        with pytest.raises(ConnectError, match="rabbitmq-plugins enable") as caught:
            await admin.list()
    text = str(caught.value)
    assert f"127.0.0.1:{port} does not answer: Connect call failed" in text
    assert "ConnectionKey" not in text and "hunter2" not in text
