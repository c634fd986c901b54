"""The entry point: every handler in one process, until SIGTERM or Ctrl-C.

python examples/run.py            (or, from examples/: streamtools run run:runner --workers 2)
"""

from __future__ import annotations

from handlers import orders, payments

from streamtools import ConsumerRunner

# The producer that a handler sends with is the runner's too: opened before the first message, closed
# after the last.
runner = ConsumerRunner(orders.consumers, payments.consumers, orders.payments)

if __name__ == "__main__":
    runner.run()
