"""What Kafka can do."""

from streamtools.features import Features

FEATURES = Features(
    durable=True,
    processes=True,
    groups=True,
    partitioned=True,
    in_hand=False,
    replay=True,
    topics=True,
    tombstones=True,
)
