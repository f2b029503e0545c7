"""What the page shows, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrac_scale.columns import Texts, distinct
from retrac_scale.measurement.halves import Repeatability
from retrac_scale.query.explain import Explanation, explain_lists
from retrac_scale.query.index import Index
from retrac_scale.query.topk import Side, TopK
from retrac_scale.report.pictures import Images, PictureFiles, Pictures, data_uri
from retrac_scale.report.shown import check_shown
from retrac_scale.report.trust import Told, check_given, repeatability_for_page, shared_by_halves, told
from retrac_scale.store import SketchStore

if TYPE_CHECKING:
    from retrac_scale.evaluate.originals import Originals

MOST_LABELS = 1000
"""A column with more distinct values is no grouping."""
GROUPS = 10
EXACT_INTEGER = 2**53
"""Up to here a browser's numbers hold every integer."""
DIGITS = 5
Json = dict[str, Any]


def content(
    answers: Mapping[str, TopK],
    pictures: Pictures,
    *,
    title: str,
    curve: tuple[Any, Any, Any] | None = None,
    indexes: Mapping[str, Index] | None = None,
    queries: SketchStore | Mapping[str, SketchStore] | None = None,
    repeatability: Mapping[str, Told] | None = None,
    check: Mapping[str, Originals] | None = None,
) -> Json:
    """All that a page holds; arguments as for `write_report`. Ids are strings, scores numbers or null."""
    first = next(iter(answers.values()))
    indexes = indexes or {}
    sketched = queries_of_indexes(indexes, queries)
    _check_same_queries(answers, sketched)
    check_same_samples(indexes)
    lists = {name: ranked(answer) for name, answer in answers.items()}
    asked: list[Json] = [
        {
            "id": str(query),
            "picture": data_uri(pictures.query(place)),
            "lists": {name: each[place] for name, each in lists.items()},
        }
        for place, query in enumerate(first.query_ids.tolist())
    ]
    notes: list[str] = []
    measured = dict(repeatability or {})
    check_given(measured, answers, len(asked))
    for name, own in sketched.items():
        index = indexes[name]
        _add_groups(asked, name, index, own)
        try:
            _add_explanations(asked, name, index, own)
        except ValueError as error:  # an estimator or a store that cannot be taken apart
            notes.append(f"{name} has no explanations: {error}")
        if repeatability is None:
            measured[name] = repeatability_for_page(index, own, list_length(answers[name]))
    for name, found in measured.items():
        if isinstance(found, Repeatability):
            for query, shared in zip(asked, shared_by_halves(found), strict=True):
                query.setdefault("shared", {})[name] = shared
    rows = Rows(next(iter(indexes.values()))) if indexes else None
    every = np.unique(np.concatenate([_ids_of(answer) for answer in answers.values()]))
    notes += _notes_of_pictures(every, pictures, indexes, sketched)
    return {
        "title": title,
        "queries": asked,
        "samples": samples(every, pictures, rows),
        "curve": None if curve is None else curve_of(curve),
        "notes": notes,
        "check": {name: checked(one) for name, one in (check or {}).items()},
        "repeatability": {
            name: told(measured[name], indexes[name].shape[1] if name in indexes else None)
            for name in answers
            if name in measured
        },
    }


def _notes_of_pictures(
    every: npt.NDArray[Any], pictures: Pictures, indexes: Mapping[str, Index], queries: Mapping[str, SketchStore]
) -> list[str]:
    """Sentences about the pictures that may not be those that were sketched; those that surely are not are refused."""
    told = {}
    for name, index in indexes.items():
        if (store := index.check_store()) is not None:
            shown = (pictures.image(sample) for sample in every.tolist())
            told[f"Training samples ({name})"] = check_shown(
                store, every.tolist(), shown, exact=_of_files(pictures.images)
            )
    for name, own in queries.items():
        shown = (pictures.query(place) for place in range(len(own.ids)))
        told[f"Queries ({name})"] = check_shown(own, own.ids.tolist(), shown, exact=_of_files(pictures.queries))
    return [f"{who}: {note}." for who, note in told.items() if note]


def _of_files(images: Images) -> bool:
    return isinstance(images, PictureFiles)


def queries_of_indexes(
    indexes: Mapping[str, Index], queries: SketchStore | Mapping[str, SketchStore] | None
) -> dict[str, SketchStore]:
    """The store of queries that each index is asked with; none where there are no queries.

    Raises:
        ValueError: an index has none, or there is one for an index that is not there.
    """
    if queries is None or isinstance(queries, SketchStore):
        return {} if queries is None else dict.fromkeys(indexes, queries)
    if set(queries) != set(indexes):
        raise ValueError(
            f"queries= has stores for {', '.join(queries) or 'no index'}, but the indexes are "
            f"{', '.join(indexes) or 'none'}; give one store for all, or one for each."
        )
    return {name: queries[name] for name in indexes}


def check_same_samples(indexes: Mapping[str, Index]) -> None:
    """Raise ValueError unless all indexes hold the same samples, so that one picture and row stands for each id."""
    names = list(indexes)
    for name in names[1:]:
        if not np.array_equal(indexes[name].ids, indexes[names[0]].ids):
            raise ValueError(
                f"{name} holds other samples than {names[0]}; a page is about the samples of one data set."
            )


class Rows(dict[Any, Json]):
    """The user's columns of each sample, `{id: {column: value}}`, made when asked for; of samples that are there."""

    def __init__(self, index: Index) -> None:
        self._places = index.places
        self._columns = {name: index.column(name) for name in index.column_names}

    def __missing__(self, sample: Any) -> Json:
        place = int(self._places.find([sample])[0])
        return {name: plain(x.value(place) if isinstance(x, Texts) else x[place]) for name, x in self._columns.items()}


def sides(index: Index) -> Side:
    """The sides that an index has: a squared score has no opponents."""
    return "proponents" if index.estimator.squared else "both"


def ranked(answer: TopK) -> list[dict[str, list[Json]]]:
    """For each query the lists of each side, best first: id, score, and where known error, whether resolved, share.

    A list ends at zero: a positive score is no opponent's, a negative one no proponent's. Where copies were folded, a
    result that has some has their ids.
    """
    listed, sides = answer.listed, answer.sides
    known = {"id": answer.ids, "score": answer.scores, "error": answer.errors, "resolved": answer.resolved}
    known |= {"share": answer.shares, "share_error": answer.share_errors}
    fields = {name: values for name, values in known.items() if values is not None}

    def result(query: int, place: int) -> Json:
        own = {n: str(x[query, place]) if n == "id" else plain(x[query, place]) for n, x in fields.items()}
        copies = () if answer.copies is None else answer.copies[query, place]
        return own | ({"copies": list(map(str, copies))} if copies else {})

    width = answer.ids.shape[1]
    return [
        {
            side: [result(query, place) for place in np.arange(width)[places] if listed[query, place]]
            for side, places in sides.items()
        }
        for query in range(len(answer.ids))
    ]


def _ids_of(answer: TopK) -> npt.NDArray[Any]:
    """Of all samples that an answer names, copies too."""
    copies = [] if answer.copies is None else [sample for ids in answer.copies.flat for sample in ids]
    return np.concatenate([answer.ids.ravel(), np.array(copies, answer.ids.dtype)])


def list_length(answer: TopK) -> int:
    """Of the list of one side."""
    width: int = answer.ids.shape[1]
    return width // 2 if answer.side == "both" else width


def samples(ids: npt.NDArray[Any], pictures: Pictures, rows: Rows | None) -> dict[str, Json]:
    """Picture and columns of training samples, by id."""
    return {
        str(sample): {"picture": data_uri(pictures.image(sample)), "columns": {} if rows is None else rows[sample]}
        for sample in ids.tolist()
    }


def explained(explanation: Explanation) -> Json:
    """Contributions `[c][s]`, summed over the sample's own timesteps, and the timesteps of both sides."""
    steps, asked = explanation.timesteps, explanation.query_timesteps
    return {
        "score": plain(explanation.score),
        "checkpoints": explanation.checkpoints,
        "contributions": [[plain(x) for x in row] for row in explanation.contributions.sum(1)],
        "timesteps": None if steps is None else steps.tolist(),
        "query_timesteps": None if asked is None or (asked != asked[0]).any() else asked[0].tolist(),
        "measures": explanation.measures,
    }


def checked(found: Originals) -> Json:
    """What asking about training images themselves showed."""
    firsts = ", ".join(f"{how} {first} of {count}" for how, (first, count) in found.counts.items())
    return {"well": found.is_well, "meaning": found.meaning, "firsts": firsts, "causes": list(found.causes)}


def curve_of(curve: tuple[Any, Any, Any]) -> Json:
    """What `norm_curve` gives, by name."""
    names = ("timestep", "mean", "deviation")
    return {name: [plain(x) for x in values] for name, values in zip(names, curve, strict=True)}


def group_columns(index: Index) -> list[str]:
    """Columns that put several samples under one label."""
    most = min(MOST_LABELS, index.shape[1] // 2)
    labels = {name: distinct(index.column(name), most) for name in index.column_names}
    return [name for name, values in labels.items() if values is not None and len(values) > 1]


def plain(value: Any) -> Any:
    """A NumPy scalar as JSON has it: no NaN, no integer that a browser would round, floats to 5 digits."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return str(value) if type(value) is int and abs(value) > EXACT_INTEGER else value


def _check_same_queries(answers: Mapping[str, TopK], sketched: Mapping[str, SketchStore]) -> None:
    (first, answer), *others = answers.items()
    asked = dict(others) | {f"queries= of {name}": store for name, store in sketched.items()}
    for name, other in asked.items():
        ids = other.query_ids if isinstance(other, TopK) else other.ids
        if not np.array_equal(ids, answer.query_ids):
            raise ValueError(f"{name} is about other queries than {first}, or has them in another order.")
    for name in sketched:
        if name not in answers:
            raise ValueError(f"indexes= has {name}, but the answers are of {', '.join(answers)}.")


def _add_groups(asked: list[Json], name: str, index: Index, queries: SketchStore) -> None:
    for column in group_columns(index):
        answer = index.query(queries, GROUPS, side=sides(index), group_by=column)
        for query, lists in zip(asked, ranked(answer), strict=True):
            query.setdefault("groups", {}).setdefault(column, {})[name] = lists


def _add_explanations(asked: list[Json], name: str, index: Index, queries: SketchStore) -> None:
    numbers = index.places.ids.dtype.kind in "iu"
    lists = [[result for side in query["lists"][name].values() for result in side] for query in asked]
    ids = [[int(result["id"]) if numbers else result["id"] for result in results] for results in lists]
    found = explain_lists(index, queries, ids)
    for results, parts in zip(lists, found, strict=True):
        for result, part in zip(results, parts, strict=True):
            result["explanation"] = explained(part)
