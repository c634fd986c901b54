"""Decides whether a request is allowed, by its host name, by the web page that sent it, and by its token.

Any web page can make a browser send a `text/plain` POST to any address that the browser can reach, such as a service
on its user's machine. The browser names the page in `Origin`, or describes it in `Sec-Fetch-Site`; other clients send
neither. So a request of a web page is refused unless the page is allowed, or the browser says that the page has the
same origin as this service.
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
        tokens: each request has to show one of these tokens; if empty, a request needs none.
        hosts: the host names that a request may use for this port; if empty, any.
        origins: the origins of web pages that may send requests; "*" for any.
    """

    tokens: Tokens
    hosts: frozenset[str]
    origins: frozenset[str]

    @classmethod
    def of(cls, settings: HTTPSettings) -> Access:
        """Return the rules that the settings describe."""
        return cls(Tokens(settings.tokens), frozenset(map(_host, settings.hosts)), frozenset(settings.origins))

    def refusal(self, request: web.BaseRequest) -> web.Response | None:
        """Return the response to a request that is not allowed; None if the request is allowed."""
        if self.hosts and not all(self._is_ours(name) for name in _names(request)):
            return _closing(responses.error_response(421, "This service does not serve that host name."))
        if not self._may_come(request):
            return _closing(
                responses.error_response(
                    403, "The request is of a web page of another origin; allow it with origins= if it is yours."
                )
            )
        if self.tokens and not self._is_shown(request):
            challenge = {"WWW-Authenticate": "Bearer"}
            return _closing(
                responses.error_response(401, "A request needs a token: Authorization: Bearer ...", **challenge)
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
    """Return a host in the form in which hosts are compared: lower case, IPv6 addresses without brackets."""
    bare = name.lower()
    return bare[1:-1] if bare.startswith("[") and bare.endswith("]") and ":" in bare else bare


def _without_port(name: str) -> str:
    host, colon, port = name.rpartition(":")
    return host if colon and port.isascii() and port.isdigit() else name


def _names(request: web.BaseRequest) -> list[str]:
    """Return all host names of a request: those of `Host`, and that of its target if the target is a whole URL."""
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
