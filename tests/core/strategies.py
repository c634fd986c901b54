"""What hypothesis draws: text that travels, messages, error details."""

from __future__ import annotations

from hypothesis import strategies as st

from streamtools.message import ErrorDetails, Message
from streamtools.validation.checks import RESERVED
from streamtools.wire import read_key

#: Text of any script, without lone surrogates, which no wire carries.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
some = st.none() | text
#: Moments that RFC 3339 can name, in whole microseconds.
#: As they are read: bytes where they are no plain text.
keys = st.binary(max_size=20).map(read_key) | text.map(str.encode).map(read_key)
times = st.integers(0, 253402300799 * 10**6).map(lambda n: n / 10**6)
#: A user's: hypothesis draws from the constants of our own code, too.
header_names = text.filter(lambda name: name and not name.lower().startswith(RESERVED))
headers = st.dictionaries(header_names, text, max_size=5)
json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
errors = st.builds(
    ErrorDetails, queue=text.filter(bool), handler=text, exception=text, reason=text, traceback=text,
    attempts=st.integers(0, 10**8), first_failed=times, last_failed=times,
)  # fmt: skip
messages = st.builds(
    Message, body=st.binary(max_size=50), queue=st.just("orders"), id=text, type=some, source=some,
    time=st.none() | times, content_type=some, content_encoding=some, correlation_id=some, causation_id=some,
    reply_to=some, intent=some, key=st.none() | keys, headers=headers, attempt=st.integers(1, 10**8),
    deliver_at=st.none() | times, expires_at=st.none() | times, error=st.none() | errors,
)  # fmt: skip
