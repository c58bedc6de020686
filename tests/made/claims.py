"""Entries of a register of claims."""

from typing import Any

EXACT: dict[str, Any] = {
    "kind": "EXACT",
    "claim": "twice two",
    "paper": "Anon",
    "place": "table 1",
    "published": {"four": 4},
    "check": "counting",
    "distance": None,
    "reproduced_when": [{"value": "product", "equals": "published.four"}],
    "needs": {},
    "recipe": None,
}
