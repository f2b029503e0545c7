"""An answer as text: a list for each query, ids in short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrac_scale.query.topk import TopK

DIGITS = 4


def table(answer: TopK, below: str = "") -> str:
    """The lists of all queries.

    Args:
        answer: what is shown.
        below: a folder that the ids lie in, such as "training-images/", left out of each.
    """
    parts = [_list(answer, query, below) for query in range(len(answer.ids))]
    if answer.resolved is not None and not answer.resolved[answer.listed].all():
        parts.append(
            "~ stands less than two standard errors of the difference before the next: that order is not resolved"
        )
    return "\n\n".join(parts)


def _list(answer: TopK, query: int, below: str) -> str:
    lines = [f"query {answer.query_ids[query]}"]
    for side, places in answer.sides.items():
        rows = [place for place in range(places.start or 0, places.stop) if answer.listed[query, place]]
        if len(answer.sides) > 1 or not rows:
            lines.append(f"  {side}" if rows else f"  no {side}: no score is {_sign(side)}")
        names = [str(answer.ids[query, place]).removeprefix(below) for place in rows]
        width = max(map(len, names), default=0)
        for rank, (place, name) in enumerate(zip(rows, names, strict=True), 1):
            lines.append(f"  {rank:4}  {name:{width}}  {_score(answer, query, place)}".rstrip())
    return "\n".join(lines)


def _score(answer: TopK, query: int, place: int) -> str:
    text = f"{answer.scores[query, place]:10.{DIGITS}g}"
    if answer.errors is not None:
        text += f" ± {answer.errors[query, place]:<9.2g}"
    if answer.shares is not None and answer.share_errors is not None:
        text += f" {answer.shares[query, place]:6.1%} ± {answer.share_errors[query, place]:.1%}"
    if answer.resolved is not None and not answer.resolved[query, place]:
        text += " ~"
    if answer.copies is not None and (count := len(answer.copies[query, place])):
        text += f"  and {count} {'copies' if count > 1 else 'copy'}"
    return text


def _sign(side: str) -> str:
    return "positive" if side == "proponents" else "negative"


def common_folder(ids: Sequence[Any]) -> str:
    """The folder that all ids lie in, with a slash at its end; empty where they are no paths or share none.

    >>> common_folder(["images/a/1.png", "images/b/1.png"]), common_folder(["1.png", "images/1.png"])
    ('images/', '')
    """
    names = [str(one) for one in ids]
    if not names or not all("/" in name for name in names):
        return ""
    first, last = min(names), max(names)  # between them lie all others
    parts = []
    for one, other in zip(first.split("/")[:-1], last.split("/")[:-1], strict=False):
        if one != other:
            break
        parts.append(one + "/")
    return "".join(parts)


def in_full(given: Sequence[str], ids: Sequence[Any]) -> list[Any]:
    """Ids by what they are called in short: whole, or the end of a path from a slash on, with or without its suffix.

    Raises:
        ValueError: there is no such id, or there are several; names them.
    """
    known = {str(one): one for one in ids}
    wanted = [name for name in dict.fromkeys(given) if name not in known]
    ends: dict[str, list[str]] = {name: [] for name in wanted}
    for name in known if wanted else ():
        bare = name.rpartition(".")[0] if "." in name.rpartition("/")[2] else name
        for ending in wanted:
            if f"/{name}".endswith(f"/{ending}") or f"/{bare}".endswith(f"/{ending}"):
                ends[ending].append(name)
    for ending, found in ends.items():
        if len(found) != 1:
            such = f"such as {next(iter(known))}" if not found else f"{', '.join(found[:3])}"
            what = "there is no sample" if not found else f"{len(found)} samples are called"
            raise ValueError(f"{what} {ending}: {such}; give {'an id' if not found else 'more of the path'}.")
    return [known[name if name in known else ends[name][0]] for name in given]
