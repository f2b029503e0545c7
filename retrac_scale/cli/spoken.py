"""What the library says in Python, said as commands."""

from __future__ import annotations

import re

SPOKEN = {
    r"(run (its|the same)|repeat (the|its)) sketch\(\.\.\.\)( or write_store\(\.\.\.\))?( again| that began it"
    r"| before building an index)?": "run `retrac-scale sketch` again",
    r"by the next sketch\(\.\.\.\)": "by the next `retrac-scale sketch`",
    r"run its build_index\(\.\.\.\) again": "run `retrac-scale index` again",
    r"build the index again at another path": "build the index at another path by `retrac-scale index STORE OUT`",
    r"build the index again": "build the index again by `retrac-scale index`, outside of a project by the "
    "`retrac-scale index STORE OUT` that built it",
    r"\bsketch (them|the queries) with like=store[^.;]*": r"sketch \1 by `retrac-scale sketch`",
    r"with replace=True \(--replace\)": "with --replace",
    r"with sketch\(\.\.\., grow=True\) or until=": "with `retrac-scale sketch --until 0.9`",
    r"where sketch\(\.\.\.\) was called": "where `retrac-scale sketch` was called",
    r"\bsketch\(\.\.\.\) made": "`retrac-scale sketch` made",
    r"give it in the items, as a label": "give its number in a column label of metadata.jsonl, .csv or .parquet beside "
    "it",
    r"\bwhere=(?=['\"])": "--where ",
    r"\bwhere=": "--where",
    r"\bgroup_by=(?=['\"])": "--group-by ",
    r"\bgroup_by=": "--group-by",
    r"\bexclude_self=": "--ids",
}
"""{pattern: what the command line says}."""


def spoken(text: str) -> str:
    """A message of the library in the words of the command line."""
    for pattern, words in SPOKEN.items():
        text = re.sub(pattern, words, text)
    return text
