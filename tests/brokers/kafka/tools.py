"""Kafka's own command-line tools: what they say is what holds."""

from __future__ import annotations

import os
import re
import subprocess

from tests.brokers.kafka import archives, jars
from tests.brokers.processes import BrokerError

#: Short-lived: the quick compiler only.
TOOL_JAVA = (
    *("java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=error",
)
#: Each tool's class, by the name of its script in Kafka's distribution.
CLASSES = {
    "kafka-configs": "kafka.admin.ConfigCommand",
    "kafka-console-consumer": "org.apache.kafka.tools.consumer.ConsoleConsumer",
    "kafka-console-producer": "org.apache.kafka.tools.ConsoleProducer",
    "kafka-consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
    "kafka-delete-records": "org.apache.kafka.tools.DeleteRecordsCommand",
    "kafka-get-offsets": "org.apache.kafka.tools.GetOffsetShell",
    "kafka-acls": "org.apache.kafka.tools.AclCommand",
    "kafka-topics": "org.apache.kafka.tools.TopicCommand",
    "kafka-transactions": "org.apache.kafka.tools.TransactionsCommand",
}
#: Seconds that a tool may take; 1 on a quiet machine.
TIMEOUT = 60.0


def kafka_tool(
    bootstrap: str, name: str, *arguments: str, stdin: str = "", archive: tuple[str, ...] | None = None
) -> str:
    """Run a tool, e.g. `kafka_tool(address.bootstrap, "kafka-topics", "--list")`, and return what it prints.

    Parameters:
        archive: options of `java` about its class archive; None for those that read it.

    Raises:
        BrokerError: it failed; with what it said.
    """
    jars.ensure_installed()
    archive = archives.reading(archives.TOOL) if archive is None else archive
    done = subprocess.run(
        [*TOOL_JAVA, *archive, CLASSES[name], "--bootstrap-server", bootstrap, *arguments],
        env={**os.environ, "CLASSPATH": jars.classpath()},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise BrokerError(f"{name} {' '.join(arguments)} failed: {(done.stderr + done.stdout).strip()[-2000:]}")
    return done.stdout


def leaders(bootstrap: str, topic: str) -> dict[int, int]:
    """Partition to the number of the node that leads it."""
    text = kafka_tool(bootstrap, "kafka-topics", "--describe", "--topic", topic)
    return {int(p): int(n) for p, n in re.findall(r"Partition: (\d+)\s+Leader: (\d+)", text)}


def group_rows(bootstrap: str, group: str, topic: str) -> dict[int, tuple[int | None, int, int | None]]:
    """Partition to (committed offset, end of the log, lag) of a group, as kafka-consumer-groups shows them."""
    text = kafka_tool(bootstrap, "kafka-consumer-groups", "--describe", "--group", group)
    found: dict[int, tuple[int | None, int, int | None]] = {}
    for line in text.splitlines():
        words = line.split()
        if words[:2] == [group, topic]:
            committed, end, lag = (None if word == "-" else int(word) for word in words[3:6])
            found[int(words[2])] = (committed, end or 0, lag)
    return found
