"""Everything that reaches into aiokafka, the client library. No other room uses its private names.

aiokafka is capped to the minor version 0.14, against which this room is tested. What it needs, and why:

guard.py        `client._get_conn`, `_metadata_update`, `conn._handle_frame`, `_requests`, ...: each answer is checked
                before the library uses it, and asking for a topic makes none
monitor.py      `client._conns`: whether a broker is connected; requests for metadata have a pause between them
consumers.py    `consumer._fetcher`, `_subscription`, `_closed` and its tasks: to take fetched bytes, to know the
                position, to notice that a task has died, to end a consumer whose `stop()` would wait for a broker
coordinator.py  `consumer._coordinator`: commits that name the place in the group; leaving while joining
producers.py    `producer._txn_manager`, `_message_accumulator`, `_sender`: to take sequence numbers back after a
                refusal, to fail batches of deleted topics, to abort what was added to a transaction, to end at once
record_batch.py the methods of `BatchBuilder` that `producer.send_batch` and what is behind it call
batches.py      `FetchResult._partition_records` and the record parsers: header names of any bytes, and limits
fetched.py      `FetchResult`, `PartitionRecords`: records are parsed while they are handed over

connect.py, answers.py, limits.py and requests.py use public names only.
"""
