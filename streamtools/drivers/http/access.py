"""Who may ask at a port: the name it is asked by, the web page that asks, and the token that is shown.

A browser sends a `text/plain` POST of any web page to any address it can reach, a service on its user's machine
included. It says in `Origin`, or in `Sec-Fetch-Site`, for which page; other clients send neither. So a request of a
page is refused unless the page is allowed, or the browser says that it is of the very same origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from streamtools.drivers.http import responses
from streamtools.settings import HTTPSettings
from streamtools.validation.tokens import Tokens


@dataclass(frozen=True)
class Access:
    """The rules of one port.

    Attributes:
        tokens: of which each request has to show one; any request may come when empty.
        hosts: names by which the port may be asked; any when empty.
        origins: web pages that may ask; "*" for any.
    """

    tokens: Tokens
    hosts: frozenset[str]
    origins: frozenset[str]

    @classmethod
    def of(cls, settings: HTTPSettings) -> Access:
        """The rules that settings have."""
        return cls(Tokens(settings.tokens), frozenset(map(_host, settings.hosts)), frozenset(settings.origins))

    def refusal(self, request: web.BaseRequest) -> web.Response | None:
        """The answer to who may not ask; None for all others."""
        if self.hosts and not all(self._is_ours(name) for name in _names(request)):
            return _closing(responses.error_response(421, "This service is not asked by that host name."))
        if not self._may_come(request):
            return _closing(
                responses.error_response(
                    403, "A web page of another origin asks; allow it with origins= if it is yours."
                )
            )
        if self.tokens and not self._is_shown(request):
            challenge = {"WWW-Authenticate": "Bearer"}
            return _closing(
                responses.error_response(401, "A request here shows a token: Authorization: Bearer ...", **challenge)
            )
        return None

    def _is_shown(self, request: web.BaseRequest) -> bool:
        shown = request.headers.getall("Authorization", [])
        return len(shown) == 1 and self.tokens.accept(shown[0])

    def _is_ours(self, name: str) -> bool:
        return _host(name) in self.hosts or _host(_without_port(name)) in self.hosts

    def _may_come(self, request: web.BaseRequest) -> bool:
        headers = request.headers
        if ("Origin" not in headers and "Sec-Fetch-Site" not in headers) or "*" in self.origins:
            return True
        site = headers.get("Sec-Fetch-Site", "none").lower()
        pages = [origin.lower() for origin in headers.getall("Origin", [])]
        if pages:
            return all(page in self.origins for page in pages) or site == "same-origin"
        return site in ("none", "same-origin")


def _host(name: str) -> str:
    """A host as it is compared: in lower case, an IPv6 address without its brackets."""
    bare = name.lower()
    return bare[1:-1] if bare.startswith("[") and bare.endswith("]") and ":" in bare else bare


def _without_port(name: str) -> str:
    host, colon, port = name.rpartition(":")
    return host if colon and port.isascii() and port.isdigit() else name


def _names(request: web.BaseRequest) -> list[str]:
    """Each name by which a request asks: there is one in its target too where that is a whole URL."""
    names = [name.lower() for name in request.headers.getall("Host", [""])]
    if not request.raw_path.startswith(("/", "*")):
        try:
            names.append(urlsplit(request.raw_path).netloc.lower())
        except ValueError:
            names.append("")
    return names


def _closing(response: web.Response) -> web.Response:
    response.force_close()
    return response
