"""Indexes of a command: those that it names, or those of the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.project import FILE, RECORDED, Project

if TYPE_CHECKING:
    from retrac_scale.columns import Column
    from retrac_scale.estimators import Estimator
    from retrac_scale.query.index import Index
    from retrac_scale.store import SketchStore


def open_indexes(urls: Sequence[str], project: Project) -> dict[str, Index]:
    """Indexes by the names of their estimators, with the place where two are of one kind.

    Without URLs, those of the project, built where they are missing or older than their store.
    """
    from retrac_scale.query.index import open_index

    if not urls:
        return build_indexes(project)
    indexes: dict[str, Index] = {}
    for url in urls:
        index = open_index(url)
        name = str(index.meta["estimator"]["kind"])
        indexes[name if name not in indexes else f"{name} ({url})"] = index
    return indexes


def build_indexes(project: Project) -> dict[str, Index]:
    """The project's indexes; what stands already is kept. Of a store alone, that of the recommended estimator."""
    from retrac_scale.api.index import build_index

    store = open_sketches(project)
    wanted = [of_measure(name, store) for name in project.estimators]
    if "estimators" not in project.stated:
        wanted = [recommended_of(store)]
    named = {type(estimator).__name__: (own, estimator) for own, estimator in wanted}
    return {
        name: build_index(own, one, place_of(project, one, own), progress=f"index of {name}")
        for name, (own, one) in named.items()
    }


def refresh_beside(project: Project, built: Mapping[str, Index]) -> tuple[dict[str, Index], list[str]]:
    """Further indexes of the project's store in its output folder, built again as they were where it has changed.

    Returns:
        the indexes, and a sentence on each that cannot be built now.
    """
    from retrac_scale.api.index import build_index
    from retrac_scale.query.index import open_index
    from retrac_scale.store import open_store
    from retrac_scale.store.schema import whereabouts

    known, found, notes = {str(index.url) for index in built.values()}, {}, []
    for url in sorted(map(str, Path(project.place("")).glob("*.zarr"))):
        try:
            index = open_index(url)
        except (FileNotFoundError, ValueError):  # a store, or an index that nobody finished
            continue
        if url in known or index.meta["store"] != whereabouts(project.store):
            continue
        name, measure = type(index.estimator).__name__, index.meta["measure"]
        try:
            store = open_store(project.store, measure=measure)
            complete = store.is_complete
        except ValueError:  # one measure has timesteps that another lacks
            complete = False
        if complete:
            shown: dict[str, Any] = {"dtype": index.meta["dtype"], "progress": f"index of {name}"}
            found[f"{name} ({url})"] = build_index(store, index.estimator, url, **shown)
        else:  # it grew under the measures of the file alone
            told = measure if isinstance(measure, str) else ",".join(measure)
            notes.append(f"{url} stays as it was: run `retrac-scale sketch --measure {told}` first")
    return found, notes


def measures_of(project: Project) -> tuple[str, ...]:
    """What `sketch` differentiates: what the file says and what its estimators are of, the store's own before others.

    Raises:
        ValueError: there is no estimator of a name.
    """
    kinds, own = [make_estimator(name).measures for name in project.estimators], own_measures(project)
    further = [kind[0] for kind in kinds if kind and not set(own) & set(kind)]
    held, every = held_measures(project), dict.fromkeys([*own, *further])
    return tuple([one for one in held if one in every] + [one for one in every if one not in held])


def own_measures(project: Project) -> tuple[str, ...]:
    """What the project compares pictures by: what the file says, else what its store has of that, else its first."""
    if "measure" in project.stated:
        return project.measures
    if held := held_measures(project):
        return tuple(one for one in project.measures if one in held) or (held[0],)
    common = project.noise == "common" and project.timesteps != RECORDED
    return project.measures if common else project.measures[:1]  # else timesteps are averaged, of one function


def held_measures(project: Project) -> list[str]:
    """Those of the project's store; none where nothing was measured yet, for then it may not be laid out for all."""
    from retrac_scale.store import open_store

    try:
        store = open_store(project.store)
    except (FileNotFoundError, ValueError):  # whatever else is there, sketch names it
        return []
    if not any(store.committed(name).any() for name in store.checkpoints):
        return []
    return [one for one in store.measurements if one != "given"]  # arrays, which may be of anything


def of_measure(name: str, store: SketchStore) -> tuple[SketchStore, Estimator]:
    """The store under what an estimator differentiates, and the estimator, with the pairing that suits the store.

    Of several measures side by side, an estimator that averages timesteps takes the first.

    Raises:
        ValueError: there is none of that name, or the store was not measured for it; says what to do.
    """
    from retrac_scale.estimators import recommended
    from retrac_scale.store import open_store
    from retrac_scale.store.part import measures_in

    plain = make_estimator(name)
    if not plain.measures or "measure" not in store.fingerprint:  # given sketches may be of anything
        first, *others = measures_in(store.fingerprint)
        return store.under(first) if others and plain.pairing != "matched" else store, plain
    measured = next((one for one in store.measurements if one in plain.measures), None)
    if measured is None:
        kind = type(plain).__name__
        raise ValueError(
            f"{kind} differentiates {' or '.join(plain.measures)}, which {store.url} was not measured by; name {kind} "
            f"among the estimators of {FILE} and run `retrac-scale sketch`, which adds what is missing."
        )
    own = open_store(store.url, measure=measured)
    return own, recommended(own)


def recommended_of(store: SketchStore) -> tuple[SketchStore, Estimator]:
    """The recommended estimator, and the store under all of its measures if it adds up their scores, else the first."""
    from retrac_scale.estimators import recommended
    from retrac_scale.store.part import measures_in

    estimator, (first, *others) = recommended(store), measures_in(store.fingerprint)
    return store.under(first) if others and estimator.pairing != "matched" else store, estimator


def open_asked(url: str, index: Index) -> SketchStore:
    """A store of queries, under what an index is of, where it was measured by several."""
    from retrac_scale.store import open_store
    from retrac_scale.store.part import measures_in

    store = open_store(url)
    wanted = measures_in(index.meta)
    return open_store(url, measure=wanted) if set(wanted) <= set(store.measurements) else store


def open_sketches(project: Project, measures: Sequence[str] | None = None) -> SketchStore:
    """The project's store of training sketches, under some measures, else under those of the file or its first.

    Raises:
        FileNotFoundError: there is none yet; says which command makes it.
        ValueError: it was not measured by all that the file says; says which command does.
    """
    from retrac_scale.store import open_store

    try:
        store = open_store(project.store, measure=measures)
    except FileNotFoundError:
        raise FileNotFoundError(project.missing(project.store)) from None
    own = own_measures(project)
    if measures is not None or store.measurements == ["given"]:  # arrays, which may be of anything
        return store
    missing = [one for one in own if one not in store.measurements]
    if missing:
        raise ValueError(
            f"{project.store} was not measured by {' and '.join(missing)} yet, as {FILE} says; run `retrac-scale "
            "sketch`, which adds what is missing."
        )
    try:
        return store.under(*own)
    except ValueError as error:
        why = str(error).rstrip(".")
        raise ValueError(f"{why}; run `retrac-scale sketch`, which measures each at the timesteps of all.") from None


def place_of(project: Project, estimator: Estimator, store: SketchStore) -> str:
    """Where a project's index of an estimator stands; with the names of measures that are not those it takes by itself.

    Args:
        project: whose output folder it is in.
        estimator: of the index.
        store: under the measures of the index.
    """
    from retrac_scale.query.index import open_index
    from retrac_scale.store.part import measures_in

    measures, every = measures_in(store.fingerprint), store.measurements
    own = [next((one for one in every if one in estimator.measures), every[0])]
    if not estimator.measures and type(estimator)().pairing == "matched":
        own = list(own_measures(project))
    name = type(estimator).__name__.lower()
    place = project.place(f"{name}.zarr")
    if measures in (own, [None]):  # a store of arrays names none
        try:
            if measures_in(open_index(place).meta) == measures:
                return place
        except (FileNotFoundError, ValueError):  # whatever else is there, building names it
            return place
    return project.place("-".join([name, *measures]) + ".zarr")


def picture_names(index: Index) -> Column:
    """What names the files of an index's samples: their ids, or a column "path" beside ids of another kind."""
    return index.column("path") if "path" in index.column_names else index.places.ids


def make_estimator(name: str) -> Estimator:
    """An estimator by its name in upper or lower case.

    Raises:
        ValueError: there is none of that name.
    """
    from retrac_scale.estimators import Estimator

    kinds = {kind.lower(): estimator for kind, estimator in Estimator.kinds.items()}
    if name.lower() not in kinds:
        raise ValueError(f"there is no estimator {name!r}; choose one of {', '.join(Estimator.kinds)}.")
    return kinds[name.lower()]()


def with_options(estimator: Estimator, options: Mapping[str, Any]) -> Estimator:
    """An estimator with other options; those that are None stay as they are.

    Raises:
        ValueError: it has no such option, or not with that value.
    """
    from retrac_scale.estimators import Estimator

    kind = type(estimator).__name__
    given = {
        key: value for key, value in options.items() if value is not None and getattr(estimator, key, None) != value
    }
    having = {key: [name for name, one in Estimator.kinds.items() if _has(one, key)] for key in given}
    for key, value in given.items():
        if kind in having[key]:
            continue
        if key == "pairing":
            raise ValueError(f"{kind} has no {value} pairing.")
        why = "inverts no matrix, so it has no damping" if key == "damping" else f"has no {key}"
        raise ValueError(f"{kind} {why}; {', '.join(having[key])} have.")
    return replace(estimator, **given)  # type: ignore[type-var]


def _has(kind: type[Estimator], option: str) -> bool:
    return option in {one.name for one in fields(kind)}  # type: ignore[arg-type]
