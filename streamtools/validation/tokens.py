"""Bearer tokens, read from settings and compared in constant time; and whether a host is this machine."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from typing import Final

from pydantic import SecretStr

#: The fewest characters of a token; a shorter one can be guessed.
SHORTEST: Final = 16
#: RFC 6750, section 2.1.
_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*")


def read_tokens(value: object) -> tuple[SecretStr, ...]:
    """Read the tokens of a setting: one text with commas between the tokens, or several texts.

    Raises:
        ValueError: a token is too short, or has characters that a header cannot carry; the error never shows it.
    """
    if isinstance(value, str | SecretStr):
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not text.strip():  # a secret that was not filled in must not let everyone in
            raise ValueError("it is set, but empty: leave it out if requests need no token")
        value = [part.strip() for part in text.split(",")]
    if not isinstance(value, Iterable):
        raise ValueError("tokens are several texts, or one with commas between them")
    found = [one.get_secret_value() if isinstance(one, SecretStr) else one for one in value]
    for one in found:
        if not isinstance(one, str) or len(one) < SHORTEST or _TOKEN.fullmatch(one) is None:
            raise ValueError(
                f"a token has {SHORTEST} characters or more, each a letter, a digit or one of -._~+/. Make one: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
    return tuple(SecretStr(str(one)) for one in found)


class Tokens:
    """Tokens of which a request has to show one; if there are none, every request is accepted.

    Parameters:
        tokens: several, for the time in which a new token replaces an old one.
    """

    def __init__(self, tokens: Iterable[SecretStr]) -> None:
        self._digests = tuple(_digest(token.get_secret_value()) for token in tokens)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and set(self._digests) == set(other._digests)

    def __hash__(self) -> int:
        return hash(frozenset(self._digests))

    def __repr__(self) -> str:
        return f"<{len(self._digests)} tokens>"

    def accept(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header shows one of the tokens; it is always compared with all of them.

        Parameters:
            authorization: the header's value, such as "Bearer ...".
        """
        scheme, _, token = (authorization or "").partition(" ")
        digest = _digest(token.strip())
        found = False
        for one in self._digests:
            found |= compare_digest(one, digest)
        return found and scheme.lower() == "bearer"


def is_loopback(host: str) -> bool:
    """Whether a host is an address of this machine itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogatepass")).digest()
