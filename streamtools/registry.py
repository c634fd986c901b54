"""Registry: protocol names to classes, each imported when it is first asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeVar, overload

from streamtools.errors import ConfigurationError, UnknownProtocol, suggest
from streamtools.protocols import (
    ALIASES,
    BUILT_IN,
    EXTRAS,
    PLANNED,
    SCHEMES,
    default_url,
)
from streamtools.text.installation import install_line

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

log: logging.Logger = logging.getLogger("streamtools")

T = TypeVar("T")
D = TypeVar("D")
#: RFC 3986, section 3.1.
SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

#: Where third parties announce a module that registers their classes: name = protocol, value = module.
ENTRY_POINTS: Final = "streamtools.protocols"


class Registry(MutableMapping[str, type[T]], Generic[T]):
    """A mapping of protocol name to class, where a class may be a "module:Class" string until first used.

    Aliases work in `[]`, `in` and `.get()`; iteration names each protocol once.

    Parameters:
        kind: what the classes are, for errors.
        builtin: name -> "module:Class".
        lacking: names of protocols that have no such class -> why not.
    """

    def __init__(
        self, kind: str, builtin: Mapping[str, str], lacking: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._kind = kind
        self._lacking = lacking
        self._entries: dict[str, type[T] | str] = dict(builtin)
        self._announced = False
        #: Names that several packages announce -> what to say about it.
        self._clashes: dict[str, str] = {}
        self._loading: str | None = None

    def __getitem__(self, name: str) -> type[T]:
        key = self._key(name)
        entry = self._entries.get(key)
        if entry is None:
            raise self._unknown(name, key)
        if key in self._clashes:
            raise ConfigurationError(self._clashes[key])
        return self._load(key, entry) if isinstance(entry, str) else entry

    @overload
    def get(self, name: str, default: None = None, /) -> type[T] | None: ...
    @overload
    def get(self, name: str, default: D, /) -> type[T] | D: ...
    def get(self, name: str, default: D | None = None, /) -> type[T] | D | None:
        """The class, or `default` where no protocol has this name.

        Raises:
            UnknownProtocol: there is one, and its client library is not installed.
        """
        return self[name] if name in self else default

    def __setitem__(self, name: str, value: type[T]) -> None:
        if name in ALIASES:
            raise ConfigurationError(f"{name!r} is an alias of {ALIASES[name]!r}; register under another name.")
        taken = self._entries.get(name)
        if taken is not None and name != self._loading and not _same(taken, value):
            raise ConfigurationError(
                f"{self._kind} {name!r} is taken by {taken!r}, so {value!r} cannot register under it. "
                f"Choose another protocol name, or `del` the entry first."
            )
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[self._key(name)]

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(self._entries)

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._key(name) in self._entries

    def of_url(self, url: str | ProtocolSettings | None) -> type[T]:
        """The class for a URL or a settings object; for the default address when None.

        Raises:
            UnknownProtocol: no protocol has this URL's scheme.
        """
        if url is None or isinstance(url, str):
            return self[self.protocol(default_url() if url is None else url)]
        return self[url.protocol]

    def protocol(self, url: str) -> str:
        """The protocol that a URL's scheme belongs to.

        Raises:
            UnknownProtocol: no protocol has this scheme.
        """
        match = SCHEME.match(url)
        if match is None:  # what stands there is not shown: it may be a password
            schemes = ", ".join(self._schemes())
            raise UnknownProtocol(
                f"The URL does not begin with a scheme and ://, as in sqlite:///x.db. Known: {schemes}."
            )
        scheme = match[1].lower()
        name = SCHEMES.get(scheme, scheme)
        if name in self:
            return name
        if name in PLANNED or name in self._lacking:
            raise self._unknown(name, name)
        raise UnknownProtocol(f"No URL begins with {scheme}://. {suggest(scheme, self._schemes())}")

    def _schemes(self) -> list[str]:
        others = set(self) - {protocol.name for protocol in BUILT_IN}
        return sorted(others.union(scheme for scheme, name in SCHEMES.items() if name in self))

    def _key(self, name: str) -> str:
        key = ALIASES.get(name, name)
        if key not in self._entries:
            self._discover()
        return key

    def _discover(self) -> None:
        if self._announced:
            return
        self._announced = True
        from importlib.metadata import entry_points  # noqa: PLC0415 - a fifth of the import time, often not needed

        for point in entry_points(group=ENTRY_POINTS):
            taken = self._entries.setdefault(point.name, point.value)
            if taken == point.value:
                continue
            if isinstance(taken, str) and ":" not in taken:
                self._clashes[point.name] = (
                    f"Two packages announce the protocol {point.name!r}: {taken} and {point.value}. Uninstall one."
                )
            else:  # a built-in one, or a class that the program has registered itself
                log.warning("%s announces %r, which is taken by %r and stays so.", point.value, point.name, taken)

    def _load(self, key: str, target: str) -> type[T]:
        module, built_in, _ = target.partition(":")
        # Where an announced module has its classes from is its own affair.
        self._loading = None if built_in else key
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(key)
            if extra is None or (error.name or "").startswith("streamtools"):
                error.add_note(f"It was imported for the protocol {key!r}: {target}.")
                raise
            raise UnknownProtocol(
                f"{key!r} needs the package {error.name!r}, which is not installed. Install it: {install_line(extra)}"
            ) from error
        finally:
            self._loading = None
        loaded = self._entries[key]
        if isinstance(loaded, str):
            raise ConfigurationError(
                f"Importing {module!r} did not register a {self._kind} named {key!r}; "
                f'its class statement should say: class {target.partition(":")[2] or "Mine"}(..., protocol="{key}").'
            )
        return loaded

    def _unknown(self, name: str, key: str) -> UnknownProtocol:
        if key in self._lacking:
            return UnknownProtocol(f"{name!r} {self._lacking[key]}")
        if key in PLANNED:
            return UnknownProtocol(f"{name!r} is not in this version. {suggest(name, self)}")
        aliases = [alias for alias, target in ALIASES.items() if target in self]
        return UnknownProtocol(f"No {self._kind} is named {name!r}. {suggest(name, [*self, *aliases])}")


def _same(taken: type | str, value: type) -> bool:
    if isinstance(taken, str):
        module, built_in, name = taken.partition(":")
        if not built_in:  # an entry point names a module alone; its class may stand elsewhere in the package
            return value.__module__.partition(".")[0] == module.partition(".")[0]
        return (value.__module__ == module and value.__qualname__ == name) or value.__module__.startswith(
            module + "."
        )
    # A reloaded module defines its class anew under the same name: that is the same class.
    return (taken.__module__, taken.__qualname__) == (value.__module__, value.__qualname__)
