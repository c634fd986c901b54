"""Job messages between three applications' queues: send, receive a list, receive with a callback."""

import asyncio
import logging

from streamtools.jobs import JobMessage, QueueName, receive_message, send_message

logger = logging.getLogger(__name__)


class Queue(QueueName):
    """The applications, by the queues they listen to."""

    L7 = "l7"
    BIOCONNECT_ID_SERVICE = "bioconnect-id-service"
    BIOCONNECT_DATA_PACKAGE = "bioconnect-data-package"


async def request_package() -> JobMessage:
    """The laboratory asks for a package with the data of a sample."""
    return await send_message(
        title="Package a sample",
        message_type="PackageSample",
        send_from=Queue.L7,
        send_to=Queue.BIOCONNECT_DATA_PACKAGE,
        env="DEV",
        comments="before Friday",
        data={"sample_id": 111111, "sample_name": "a sample name", "project_id": "a project"},
    )


async def make_packages() -> None:
    """The packaging application takes the waiting messages, and sends the results to be registered."""
    for message in await receive_message(Queue.BIOCONNECT_DATA_PACKAGE, max_wait_time=5):
        print(f"{message.send_to}: {message.title} {message.data['sample_id']}")
        await send_message(
            title="Register a package",
            message_type="RegisterPackage",
            send_from=Queue.BIOCONNECT_DATA_PACKAGE,
            send_to=Queue.BIOCONNECT_ID_SERVICE,
            data={"package": f"{message.data['sample_id']}.zip"},
            original_message=message,
        )


def register(message: JobMessage) -> None:
    """Called with each message of the id service's queue."""
    original = JobMessage.model_validate_json(message.original_message)
    print(f"{message.send_to}: {message.title} {message.data['package']}, asked for by {original.send_from}")


async def main() -> None:
    """All three applications in one program."""
    sent = await request_package()
    logger.info("Sent: %s", sent)
    await make_packages()
    await receive_message(Queue.BIOCONNECT_ID_SERVICE, max_wait_time=1, call_back_function=register)
    print("No more messages.")


if __name__ == "__main__":
    asyncio.run(main())
