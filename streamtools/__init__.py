"""An asyncio-native toolkit of producers and consumers: one service, any message broker."""
from streamtools.consumer import CONSUMER_LOOPS, Consumer
from streamtools.delivery import Delivery
from streamtools.message import Message
from streamtools.policy import Retry
from streamtools.producer import PRODUCERS, Producer, Receipt
