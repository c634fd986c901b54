"""One object for each event loop and key: opened by the first who needs it, closed by the last."""

import asyncio
import gc
import threading
import weakref
from contextvars import ContextVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.engine.tasks.sharing import Lease, Sharing
from streamtools.testing.waiting import eventually

TENANT: ContextVar[str] = ContextVar("tenant", default="nobody")


class Thing:
    """Something that is opened and closed; it may die in between."""

    def __init__(self) -> None:
        self.dead = False
        self.closed = 0
        self.tenant = TENANT.get()


class Shop:
    """Opens things when a test lets it, and remembers them all."""

    def __init__(self) -> None:
        self.things: list[Thing] = []
        self.openings = 0
        #: The next opening waits for this.
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.closing_gate = asyncio.Event()
        self.closing_gate.set()
        self.sharing: Sharing[Thing] = Sharing(self.close, is_dead=lambda thing: thing.dead)

    async def open(self) -> Thing:
        self.openings += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.things.append(Thing())
        return self.things[-1]

    async def close(self, thing: Thing) -> None:
        await self.closing_gate.wait()
        thing.closed += 1

    async def acquire(self, key: str = "a") -> Lease[Thing]:
        return await self.sharing.acquire(key, self.open)


async def test_the_first_opens_it_and_the_last_closes_it() -> None:
    shop = Shop()
    first, second = await shop.acquire(), await shop.acquire()
    assert first.value is second.value
    await first.release()
    assert first.value.closed == 0
    await second.release()
    assert [thing.closed for thing in shop.things] == [1]


async def test_each_key_has_its_own() -> None:
    shop = Shop()
    a, b = await shop.acquire("a"), await shop.acquire("b")
    assert a.value is not b.value
    await a.release()
    assert (a.value.closed, b.value.closed) == (1, 0)
    await b.release()


async def test_those_who_come_at_once_wait_for_one_opening() -> None:
    shop = Shop()
    shop.gate.clear()
    tasks = [asyncio.create_task(shop.acquire()) for _ in range(50)]
    await eventually(lambda: shop.openings)
    shop.gate.set()
    leases = await asyncio.gather(*tasks)
    assert shop.openings == 1
    await asyncio.gather(*(lease.release() for lease in leases))
    assert shop.things[0].closed == 1


async def test_who_releases_twice_counts_once() -> None:
    shop = Shop()
    first, second = await shop.acquire(), await shop.acquire()
    await first.release()
    await first.release()
    assert second.value.closed == 0
    await second.release()


async def test_it_is_opened_anew_after_it_was_closed() -> None:
    shop = Shop()
    first = await shop.acquire()
    await first.release()
    second = await shop.acquire()
    assert second.value is not first.value
    await second.release()


async def test_an_opening_that_fails_is_nobodys() -> None:
    shop = Shop()
    shop.error = OSError("no")
    failed = await asyncio.gather(*(shop.acquire() for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in failed] == ["no"] * 3
    assert shop.openings == 1
    shop.error = None
    lease = await shop.acquire()
    assert shop.openings == 2
    await lease.release()
    assert lease.value.closed == 1


async def test_an_opener_that_is_cancelled_does_not_cancel_it_for_the_others() -> None:
    shop = Shop()
    shop.gate.clear()
    first, second = asyncio.create_task(shop.acquire()), asyncio.create_task(shop.acquire())
    await eventually(lambda: shop.openings)
    first.cancel()
    shop.gate.set()
    lease = await second
    assert first.cancelled()
    await lease.release()
    assert shop.things[0].closed == 1


async def test_an_opening_ends_when_all_who_wait_for_it_are_cancelled() -> None:
    shop = Shop()
    shop.gate.clear()
    tasks = [asyncio.create_task(shop.acquire()) for _ in range(2)]
    await eventually(lambda: shop.openings)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    lease = asyncio.create_task(shop.acquire())
    await eventually(lambda: shop.openings == 2)
    shop.gate.set()
    await (await lease).release()
    assert [thing.closed for thing in shop.things] == [1]


async def test_what_was_opened_as_its_opener_was_cancelled_is_closed() -> None:
    shop = Shop()
    shop.gate.clear()
    task = asyncio.create_task(shop.acquire())
    await eventually(lambda: shop.openings)
    shop.gate.set()
    await eventually(lambda: shop.things)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        await task.result().release()
    await eventually(lambda: shop.things[0].closed == 1)


async def test_one_that_has_died_is_replaced_and_closed_by_those_who_had_it() -> None:
    shop = Shop()
    first, second = await shop.acquire(), await shop.acquire()
    first.value.dead = True
    third = await shop.acquire()
    assert third.value is not first.value
    await first.release()
    assert first.value.closed == 0
    await second.release()
    assert (first.value.closed, third.value.closed) == (1, 0)
    fourth = await shop.acquire()
    assert fourth.value is third.value
    await third.release()
    await fourth.release()
    assert third.value.closed == 1


async def test_who_comes_while_it_is_closed_gets_another_once_it_is() -> None:
    shop = Shop()
    first = await shop.acquire()
    shop.closing_gate.clear()
    leaving = asyncio.create_task(first.release())
    coming = asyncio.create_task(shop.acquire())
    await asyncio.wait([coming], timeout=0.05)
    assert not coming.done()
    shop.closing_gate.set()
    await leaving
    second = await coming
    assert (first.value.closed, second.value.closed) == (1, 0)
    await second.release()


async def test_a_release_that_is_cancelled_closes_it_all_the_same() -> None:
    shop = Shop()
    lease = await shop.acquire()
    shop.closing_gate.clear()
    leaving = asyncio.create_task(lease.release())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    gc.collect()
    shop.closing_gate.set()
    await eventually(lambda: lease.value.closed == 1)


async def test_an_error_of_the_closing_reaches_the_last() -> None:
    async def close(thing: Thing) -> None:
        raise OSError("it does not close")

    async def open_() -> Thing:
        return Thing()

    sharing: Sharing[Thing] = Sharing(close)
    lease = await sharing.acquire("a", open_)
    with pytest.raises(OSError, match="does not close"):
        await lease.release()


async def test_it_knows_nothing_of_the_context_of_its_first_opener() -> None:
    shop = Shop()
    TENANT.set("the first")
    lease = await shop.acquire()
    assert lease.value.tenant == "nobody"
    await lease.release()


def test_each_event_loop_has_its_own_and_waits_for_none_that_has_ended() -> None:
    leases: list[Lease[Thing]] = []

    async def open_() -> Thing:
        return Thing()

    async def close(thing: Thing) -> None:
        thing.closed += 1

    sharing: Sharing[Thing] = Sharing(close)

    async def hold() -> None:
        leases.append(await sharing.acquire("a", open_))

    async def let_go() -> None:
        for lease in leases:
            await lease.release()
        leases.append(await sharing.acquire("a", open_))
        await leases[-1].release()

    for _ in range(3):
        asyncio.run(hold())
    assert len({id(lease.value) for lease in leases}) == 3
    asyncio.run(let_go())
    assert [lease.value.closed for lease in leases] == [0, 0, 0, 1]


def test_what_a_loop_that_has_ended_had_is_forgotten() -> None:
    async def open_() -> Thing:
        return Thing()

    async def close(thing: Thing) -> None: ...

    sharing: Sharing[Thing] = Sharing(close)
    seen: list[weakref.ref[Thing]] = []

    async def hold() -> None:
        seen.append(weakref.ref((await sharing.acquire("a", open_)).value))

    for _ in range(3):
        asyncio.run(hold())
    gc.collect()
    assert [thing() is None for thing in seen] == [True, True, False]


async def test_a_lease_released_on_another_loop_is_closed_by_its_own() -> None:
    shop = Shop()
    lease = await shop.acquire()
    thread = threading.Thread(target=asyncio.run, args=(lease.release(),))
    thread.start()
    await eventually(lambda: lease.value.closed == 1)
    thread.join()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["acquire", "cancel", "release", "die", "open", "fail", "stall"]), st.integers(0, 9)
        ),
        max_size=40,
    )
)
def test_whatever_happens_each_is_closed_once_and_by_the_last(steps: list[tuple[str, int]]) -> None:
    asyncio.run(_play(steps))


async def _play(steps: list[tuple[str, int]]) -> None:
    shop = Shop()
    asking: list[asyncio.Task[Lease[Thing]]] = []
    held: list[Lease[Thing]] = []
    for step, number in steps:
        if step == "acquire":
            asking.append(asyncio.create_task(shop.acquire()))
        elif step == "cancel" and asking:
            asking[number % len(asking)].cancel()
        elif step == "release" and held:
            await held.pop(number % len(held)).release()
        elif step == "die" and held:
            held[number % len(held)].value.dead = True
        elif step in ("open", "fail"):
            shop.error = OSError("no") if step == "fail" else None
            shop.gate.set()
        elif step == "stall":
            shop.gate.clear()
        for _ in range(number):
            await asyncio.sleep(0)
        _collect(asking, held)
        assert all(lease.value.closed == 0 for lease in held)
        living = {id(t) for t in shop.things if not t.dead and not t.closed}
        assert len(living) <= 1
    shop.gate.set()
    while asking:
        await asyncio.wait(asking)
        _collect(asking, held)
    await asyncio.gather(*(lease.release() for lease in held))
    await eventually(lambda: all(thing.closed == 1 for thing in shop.things))


def _collect(asking: list[asyncio.Task[Lease[Thing]]], held: list[Lease[Thing]]) -> None:
    for task in [task for task in asking if task.done()]:
        asking.remove(task)
        if not task.cancelled() and task.exception() is None:
            held.append(task.result())
