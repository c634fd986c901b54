"""The entry point: every handler in one process, until SIGTERM or Ctrl-C.

python examples/run.py            (or, from examples/: streamtools run run:runner --workers 2)
"""

from __future__ import annotations

from handlers import orders, payments

from streamtools import ConsumerRunner

# The runner opens the producer before the first message, and closes it after the last.
runner = ConsumerRunner(orders.consumers, payments.consumers, orders.payments)

if __name__ == "__main__":
    runner.run()
