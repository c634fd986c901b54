"""A service of PikaBus, version 1 or 2, led by its standard input: `python peer.py URL QUEUE TOPIC`.

It says in lines of JSON what it receives and what became of what it was told. A payload with "reply" has that
replied; one with "fail" fails.
"""

import asyncio
import datetime
import json
import os
import sys
from importlib.metadata import version

from PikaBus.PikaBusSetup import PikaBusSetup
from PikaBus.PikaErrorHandler import PikaErrorHandler

URL, QUEUE, TOPIC = sys.argv[1:4]
NEW = not version("PikaBus").startswith("1.")
HANDLER = PikaErrorHandler(errorQueue="error", maxRetries=1, delay=1, backoff=1)


def say(**what: object) -> None:
    """A line for the test that reads it."""
    print(json.dumps(what, default=str), flush=True)


def note(data: dict) -> None:
    """What has arrived."""
    incoming = data["incomingMessage"]
    if NEW:
        headers = incoming["headers"]
    else:
        headers = incoming["headerFrame"].headers
    say(received=incoming["payload"], headers=dict(headers))


def delayed(told: dict) -> dict:
    """The arguments of a verb."""
    verb, arguments = told.pop("verb"), told
    if verb == "Defer":
        arguments["delay"] = datetime.timedelta(seconds=arguments["delay"])
    return arguments


async def run_new() -> None:
    """Version 2 is asyncio."""
    setup = PikaBusSetup(
        URL,
        defaultListenerQueue=QUEUE,
        defaultSubscriptions=TOPIC,
        pikaErrorHandler=HANDLER,
        stopConsumersAtExit=False,
    )

    async def handle(data: dict, bus: object, payload: dict) -> None:
        note(data)
        if "reply" in payload:
            await bus.Reply(payload=payload["reply"])
        if "fail" in payload:
            raise ValueError(payload["fail"])

    setup.AddMessageHandler(handle)
    await setup.StartConsumers()
    say(ready=version("PikaBus"))
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        verb = told["verb"]
        try:
            async with setup.CreateBus() as bus:
                await getattr(bus, verb)(**delayed(told))
        except Exception as error:
            say(failed=repr(error))
        else:
            say(done=verb)


def run_old() -> None:
    """Version 1 is threads."""
    import pika

    setup = PikaBusSetup(
        pika.URLParameters(URL), defaultListenerQueue=QUEUE, defaultSubscriptions=TOPIC, pikaErrorHandler=HANDLER
    )

    def handle(data: dict, bus: object, payload: dict) -> None:
        note(data)
        if "reply" in payload:
            bus.Reply(payload=payload["reply"])
        if "fail" in payload:
            raise ValueError(payload["fail"])

    setup.AddMessageHandler(handle)
    setup.Init()
    setup.StartConsumers(loop=asyncio.new_event_loop())
    say(ready=version("PikaBus"))
    while line := sys.stdin.readline():
        told = json.loads(line)
        verb = told["verb"]
        try:
            with setup.CreateBus() as bus:
                getattr(bus, verb)(**delayed(told))
        except Exception as error:
            say(failed=repr(error))
        else:
            say(done=verb)


if NEW:
    asyncio.run(run_new())
else:
    run_old()
os._exit(0)
