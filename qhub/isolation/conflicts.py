"""Reads from what pip prints why a plugin cannot live in the running environment."""

from __future__ import annotations

import re


def read_conflicts(text: str) -> list[str]:
    """The rules that collide, from what pip prints when it finds no set of versions; empty when it says nothing of the kind."""
    lines = [line.strip() for line in text.splitlines()]
    start = next((index for index, line in enumerate(lines) if line.startswith("The conflict is caused by")), None)
    if start is None:
        return [line.removeprefix("ERROR: ") for line in lines if "because these package versions have conflicting" in line]
    rules = []
    for line in lines[start + 1 :]:
        if not line:
            break
        rules.append(re.sub(r"^The user requested \(constraint\) (\S+)==(\S+)$", r"\1 \2 is installed here", line))
    return list(dict.fromkeys(rules))
