"""`http://host:9000`: requests and answers over aiohttp.

A call, not a queue: nothing stands between the sender and the handler, so the sender keeps the
message until the handler's answer is there, and sends it again while the answer is "not yet".
"""

from streamtools.drivers.http.consumer import HTTPConsumer
from streamtools.drivers.http.producer import HTTPProducer, HTTPReceipt

__all__ = ["HTTPConsumer", "HTTPProducer", "HTTPReceipt"]
