"""The conformance suite: a driver that passes it keeps every promise of streamtools.

A driver's test is one subclass, which says where its broker is:

```python
class TestSQLite(ConformanceSuite):
    protocol = "sqlite"

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/queues.db"
```

The driver's `Features` steer it: a case that means nothing for a protocol is skipped, saying which
feature excludes it. Each case has a queue name of its own, so one broker may serve all of them. Where the
broker's connections can be cut, a fixture `cut` lets the suite do so. A process that has messages in hand is killed
with -9: a fixture `kill_url` says where they come back soon. Only real brokers prove anything.

    sending.py · receiving.py · handling.py · failing.py · ordering.py · killed.py · loops.py · administration.py ·
    topics.py · foreign.py    the cases
    stage.py      what a case opens, sends and receives with
    cases.py      fixtures, and what Features exclude
    payloads.py   what is sent
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
