"""A bus's lifetime: start and stop, runners, several buses, SIGTERM, the command line."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamtools import Bus, ConfigurationError, ConsumerFactory, ConsumerRunner, MessageContext, Producer
from streamtools.testing.waiting import eventually, reaches
from tests.bus.conftest import MakeBus
from tests.bus.contracts import OrderPlaced, PlaceOrder, Quote

ROOT = Path(__file__).parents[2]


class TestStartAndStop:
    async def test_are_repeatable(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()
        bus.register(PlaceOrder, seen.append)
        for n in range(3):
            assert await bus.start() is await bus.start()
            await bus.send(PlaceOrder(id=n))
            await reaches(seen, n + 1)
            await bus.stop()
            await bus.stop()

    async def test_who_starts_it_too_returns_when_it_has_started(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()
        bus.register(OrderPlaced, seen.append)

        async def start_and_publish(n: int) -> None:
            await bus.start()
            await bus.publish(OrderPlaced(id=n))

        await asyncio.gather(*map(start_and_publish, range(3)))
        await reaches(seen, 3)
        await asyncio.gather(bus.stop(), bus.stop())
        await start_and_publish(3)
        await reaches(seen, 4)

    @pytest.mark.parametrize("how", ["started", "by a runner"])
    async def test_a_handler_that_comes_too_late_is_refused(self, make: MakeBus, how: str) -> None:
        bus = make()
        bus.register(PlaceOrder, lambda command: None)
        async with bus if how == "started" else ConsumerRunner(bus):
            with pytest.raises(ConfigurationError, match="runs already.*register before it starts"):
                bus.register(OrderPlaced, lambda event: None)

    async def test_a_handler_added_in_between_has_its_events(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()
        bus.register(PlaceOrder, lambda command: None)
        await bus.start()
        await bus.stop()
        bus.register(OrderPlaced, seen.append)
        await bus.start()
        await bus.publish(OrderPlaced(id=1))
        await reaches(seen, 1)

    async def test_stop_lets_the_handler_at_work_finish(self, make: MakeBus, nothing_waits: Any) -> None:
        begun, go, done = asyncio.Event(), asyncio.Event(), list[int]()
        bus = make()

        @bus.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            begun.set()
            await go.wait()
            done.append(command.id)

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        await begun.wait()
        stopping = asyncio.create_task(bus.stop())
        await asyncio.sleep(0)
        go.set()
        await stopping
        assert done == [1]
        await nothing_waits("orders")

    async def test_a_block_starts_and_stops_it(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()
        bus.register(PlaceOrder, seen.append)
        async with bus as entered:
            assert entered is bus
            await bus.send(PlaceOrder(id=1))
            await reaches(seen, 1)

    async def test_a_bus_without_handlers_makes_its_queue_and_takes_nothing(self, make: MakeBus, depth: Any) -> None:
        async with make("quiet", subscriptions=[OrderPlaced]) as bus:
            await bus.publish(OrderPlaced(id=1))
            await bus.send(PlaceOrder(id=1), "quiet")

            async def both_wait() -> bool:
                return await depth("quiet") == 2

            await eventually(both_wait)

    async def test_a_bus_that_only_sends_starts_and_stops(self, make: MakeBus) -> None:
        await make("orders").declare()
        async with make(None) as bus:
            await bus.send(PlaceOrder(id=1))


class TestRunner:
    async def test_runs_several_buses_and_consumers_of_one_process(self, make: MakeBus, url: str) -> None:
        seen: list[Any] = []
        orders, billing, sender = make("orders"), make("billing"), make(None)
        consumers = ConsumerFactory(url=url)

        @orders.handler
        async def place(command: PlaceOrder, context: MessageContext) -> None:
            await context.publish(OrderPlaced(id=command.id))

        @billing.handler
        async def bill(event: OrderPlaced) -> None:
            await sender.send({"id": event.id}, "plain")

        @consumers.route("plain")
        async def plain(data: dict[str, int]) -> None:
            seen.append(data)

        async with ConsumerRunner(orders, billing, sender, consumers):
            await orders.send(PlaceOrder(id=5))
            await reaches(seen, 1)
        assert seen == [{"id": 5}]

    async def test_a_runner_of_a_bus_without_handlers_says_what_to_write(self) -> None:
        with pytest.raises(ConfigurationError, match=r"no handler to run.*@bus\.handler"):
            await ConsumerRunner(Bus(None, url="asyncio://")).serve()


def only_between_processes(url: str) -> None:
    """Skip what needs two of them."""
    if url.startswith("asyncio"):
        pytest.skip("in-process queues have one process")


class TestProcesses:
    async def test_a_service_answers_and_ends_by_sigterm_with_0(self, make: MakeBus, url: str, process: Any) -> None:
        only_between_processes(url)
        service = await process()
        assert await make(None).request(Quote(id=4), "orders", timeout=60) == 8
        service.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(service.wait, 60) == 0

    async def test_requests_survive_a_responder_that_is_killed(self, make: MakeBus, url: str, process: Any) -> None:
        only_between_processes(url)
        number = 1000  # enough to be under way when the process dies
        await make("orders").declare()
        service = await process()
        asker = make(None)
        answered = 0

        async def ask(n: int) -> int:
            nonlocal answered
            answer: int = await asker.request(Quote(id=n), "orders", timeout=100)
            answered += 1
            return answer

        asking = [asyncio.create_task(ask(n)) for n in range(number)]
        await eventually(lambda: answered >= number // 10)
        service.kill()
        killed_at = answered
        successor = await process()
        answers = await asyncio.gather(*asking)
        assert answers == [n * 2 for n in range(number)]
        assert killed_at < number, "it had answered all before it was killed"
        successor.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(successor.wait, 60) == 0

    async def test_a_handler_that_succeeded_is_not_run_again_though_its_sibling_s_process_is_killed(
        self, make: MakeBus, url: str, process: Any
    ) -> None:
        only_between_processes(url)

        async def said(service: Any, number: int) -> list[str]:
            lines = [await asyncio.to_thread(service.stdout.readline) for _ in range(number)]
            return [line.decode().strip() for line in lines]

        service = await process(None, "hang")
        await make(None).publish(OrderPlaced(id=1))
        # The third is a retry of the one that failed, and in hand when the process dies.
        assert await said(service, 3) == ["works 1 1", "fails 1 1", "fails 1 2"]
        service.kill()
        successor = await process()
        await make(None).publish(OrderPlaced(id=2))
        lines = await said(successor, 4)
        assert sorted(lines) == ["fails 1 2", "fails 2 1", "fails 2 2", "works 2 1"]

    async def test_deferred_messages_survive_a_service_that_is_killed(
        self, make: MakeBus, url: str, process: Any
    ) -> None:
        only_between_processes(url)
        await make("orders").declare()
        first = await process()
        bus = make(None)
        for n in range(20):
            await bus.defer(PlaceOrder(id=n), delay=1.5, to="orders")
        first.kill()
        second = await process()
        placed: set[int] = set()
        async with asyncio.timeout(60):
            while placed != set(range(20)):  # the first may have moved some to where they wait, and not said so
                placed.add(int((await asyncio.to_thread(second.stdout.readline)).split()[1]))


SERVICE = """
import os
from streamtools import Bus, Command, ConsumerRunner, Event

class Ship(Command, name="shop.Ship", version=2, to="shop"):
    id: int

class Shipped(Event, name="shop.Shipped"):
    id: int

bus = Bus("shop")

@bus.handler
async def ship(command: Ship) -> None:
    os.write(1, f"shipped {command.id}\\n".encode())
"""


class TestCommandLine:
    @pytest.fixture
    def shop(self, tmp_path: Path) -> Path:
        """A directory with a module `shop`."""
        (tmp_path / "shop.py").write_text(SERVICE)
        return tmp_path

    def streamtools(self, shop: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "streamtools", *arguments],
            cwd=shop, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip

    async def test_run_runs_a_bus_until_sigterm(self, shop: Path) -> None:
        url = f"sqlite:///{shop}/shop.db"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STREAMTOOLS_URL": url}
        running = subprocess.Popen(
            [sys.executable, "-m", "streamtools", "run", "shop:bus"],
            cwd=shop, env=environment, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert running.stdout is not None
        async with Producer("shop", url=url) as producer:
            await producer.send({"id": 3}, type="shop.Ship")
        assert await asyncio.to_thread(running.stdout.readline) == b"shipped 3\n"
        running.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.wait, 60) == 0
        running.stdout.close()

    async def test_schema_prints_json_schema(self, shop: Path) -> None:
        done = await asyncio.to_thread(self.streamtools, shop, "schema", "shop:Ship", "shop:Shipped")
        ship, shipped = map(json.loads, done.stdout.splitlines())
        assert ship["properties"] == {"id": {"title": "Id", "type": "integer"}}
        assert (ship["type"], ship["required"]) == ("object", ["id"])
        terms = {"kind": "command", "name": "shop.Ship", "version": 2, "to": "shop"}
        assert ship["x-streamtools"] == terms
        assert shipped["x-streamtools"]["topic"] == "shop.Shipped"

    @pytest.mark.parametrize(
        ("target", "text"),
        [
            ("shop", "It can describe: shop:Ship, shop:Shipped."),
            ("shop:Shop", "It can describe: shop:Ship, shop:Shipped."),
            ("shop:bus", "neither a Command nor an Event"),
            ("nowhere:Ship", "There is no module 'nowhere'"),
        ],
    )
    async def test_schema_of_what_is_none_says_what_is(self, shop: Path, target: str, text: str) -> None:
        done = await asyncio.to_thread(self.streamtools, shop, "schema", target)
        assert (done.returncode, text in done.stderr) == (2, True), done.stderr
