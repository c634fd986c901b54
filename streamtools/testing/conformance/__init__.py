"""The conformance suite: a driver that passes it keeps every promise of streamtools.

A driver's test is one subclass, which says where its broker is:

```python
class TestSQLite(ConformanceSuite):
    protocol = "sqlite"

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/queues.db"
```

The driver's `Features` decide which cases run: if a case does not apply to a protocol, it is skipped, and names the
feature that excludes it. Each case has its own queue name, so one broker can serve all of them. If your test can cut
the connections to the broker, write a fixture `cut` that does it. The suite also kills a process with messages in
hand; the fixture `kill_url` is an address where such messages come back soon. Only tests with real brokers prove
anything.

    sending.py · receiving.py · handling.py · failing.py · ordering.py · killed.py · loops.py · administration.py ·
    topics.py · foreign.py    the cases
    stage.py      opens producers and consumers, sends and receives, for the cases
    cases.py      the fixtures, and the rules by which Features exclude cases
    payloads.py   the payloads, bodies, names and headers that cases send
"""

from __future__ import annotations

from streamtools.testing.conformance.administration import AdministrationCases
from streamtools.testing.conformance.failing import FailingCases
from streamtools.testing.conformance.foreign import ForeignCases
from streamtools.testing.conformance.handling import HandlingCases
from streamtools.testing.conformance.killed import KilledCases
from streamtools.testing.conformance.loops import LoopCases
from streamtools.testing.conformance.ordering import ConnectionCases, GroupCases, OrderingCases
from streamtools.testing.conformance.receiving import ReceivingCases
from streamtools.testing.conformance.sending import SendingCases
from streamtools.testing.conformance.topics import TopicCases

__all__ = ["ConformanceSuite", "ConnectionCases"]


class ConformanceSuite(
    SendingCases,
    ReceivingCases,
    HandlingCases,
    FailingCases,
    OrderingCases,
    GroupCases,
    ConnectionCases,
    KilledCases,
    LoopCases,
    AdministrationCases,
    TopicCases,
    ForeignCases,
):
    """Subclass it, name the `protocol`, and write the fixture `url`."""
