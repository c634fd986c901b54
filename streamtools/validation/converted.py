"""Types of settings that a user gives as one type and reads as another: gives a password as text, reads a secret.

At run time each name here is the type that is read, and pydantic converts the given value. Type checkers see a
descriptor, whose methods name both types (PEP 681).
"""

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import SecretStr

Given = TypeVar("Given", contravariant=True)
Read = TypeVar("Read", covariant=True)

if TYPE_CHECKING:

    class Converted(Generic[Given, Read]):
        """A field that takes one type and has another."""

        def __get__(self, instance: object, owner: type[Any] | None = None) -> Read: ...
        def __set__(self, instance: Any, value: Given) -> None: ...

    Secret = Converted[str | SecretStr, SecretStr]
    SecretOrNone = Converted[str | SecretStr | None, SecretStr | None]
    Secrets = Converted[str | SecretStr | list[str] | tuple[str | SecretStr, ...], tuple[SecretStr, ...]]
    Texts = Converted[str | list[str] | tuple[str, ...], tuple[str, ...]]
else:
    Secret, SecretOrNone, Secrets, Texts = SecretStr, SecretStr | None, tuple[SecretStr, ...], tuple[str, ...]
