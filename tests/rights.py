"""The users that docs/operate/security.md makes: their permissions, read from the page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "operate" / "security.md"


def commands(user: str, program: str) -> list[list[str]]:
    """The page's commands for a user, as words without the program's name."""
    lines = re.findall(rf"^{re.escape(program)} (.*)$", PAGE.read_text(), re.MULTILINE)
    found = [words for line in lines if user in re.split(r"[\s:]", line) and (words := shlex.split(line))]
    assert found, f"{PAGE.name} has no {program} for {user}"
    return found


def rabbitmq(user: str) -> tuple[dict[str, str], str]:
    """A user's patterns, and its tags."""
    patterns, tags = {}, ""
    for words in commands(user, "rabbitmqctl"):
        if words[0] == "set_permissions":
            patterns = dict(zip(("configure", "write", "read"), words[-3:], strict=True))
        elif words[0] == "set_user_tags":
            tags = words[-1]
    return patterns, tags


def kafka(user: str) -> list[list[str]]:
    """The arguments of `kafka-acls` that give a user its rights, from `--operation` on."""
    return [words[words.index("--operation") :] for words in commands(user, "kafka-acls.sh")]
