"""JobMessage: one schema for all job messages."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from streamtools.wire import from_rfc3339


class QueueName(StrEnum):
    """Base class for the names of queues: `class Queues(QueueName): L7 = "l7"`."""


def _seconds(value: object) -> object:
    seconds = from_rfc3339(value) if isinstance(value, str) else None
    return value if seconds is None else seconds


def _text(value: object) -> object:
    return "" if value is None else value


def _original(value: object) -> object:
    return str(value) if value is None or isinstance(value, JobMessage) else value


class JobMessage(BaseModel):
    """One job message. `str(message)` is the JSON document that is sent.

    Parameters:
        title: what the message is, for people.
        message_type: what the message is, for programs.
        send_from: the sender's queue.
        send_to: the receiver's queue.
        create_time: when the message was sent, in seconds since the epoch, or as a text in RFC 3339; by default now.
        env: the deployment: dev, sqa, uat, prd.
        comments: free text.
        data: the data of the application.
        original_message: the message that this one is about; "None" for none.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    title: str
    message_type: str
    send_from: str
    send_to: str
    create_time: Annotated[FiniteFloat, BeforeValidator(_seconds)] = Field(default_factory=time.time)
    env: Annotated[str, BeforeValidator(_text)] = ""
    comments: Annotated[str, BeforeValidator(_text)] = ""
    data: Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})] = Field(default_factory=dict)
    original_message: Annotated[str, BeforeValidator(_original)] = "None"

    def __str__(self) -> str:
        return self.model_dump_json()
