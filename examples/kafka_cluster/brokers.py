"""Three Kafka brokers of your own until Ctrl-C, with the project's test tools. Run it: python brokers.py

It needs Java 17 and, the first time, Maven. Where you have a cluster already, put its address into KAFKA_HOST.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.brokers.kafka.node import KafkaCluster


def main() -> None:
    """Start them, print how to use and how to kill them, and wait for Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with KafkaCluster() as cluster:
            print(f"export KAFKA_HOST={cluster.address.bootstrap}")
            for node in cluster.nodes:
                print(f"kill -9 {node.pid}    # broker {node.member.number}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
