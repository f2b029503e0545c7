"""Indexes of a command: those that it names, or those of the project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retrac_scale.cli.project import Project

if TYPE_CHECKING:
    from retrac_scale.estimators import Estimator
    from retrac_scale.index import Index


def open_indexes(urls: Sequence[str], project: Project) -> dict[str, Index]:
    """Indexes by the names of their estimators, with the place where two are of one kind.

    Without URLs, those of the project, built where they are missing or older than their store.
    """
    from retrac_scale.index import open_index

    if not urls:
        return build_indexes(project)
    indexes: dict[str, Index] = {}
    for url in urls:
        index = open_index(url)
        name = str(index.meta["estimator"]["kind"])
        indexes[name if name not in indexes else f"{name} ({url})"] = index
    return indexes


def build_indexes(project: Project) -> dict[str, Index]:
    """The project's indexes; what stands already is kept."""
    from retrac_scale.indexing import build_index
    from retrac_scale.store import open_store

    store = open_store(project.store)
    return {name: build_index(store, make_estimator(name), url) for name, url in project.indexes.items()}


def make_estimator(name: str, pairing: str = "cross", damping: float | str | None = None) -> Estimator:
    """An estimator by its name; None leaves the damping at its default.

    Raises:
        ValueError: there is none of that name, or it has no such pairing or no damping.
    """
    from retrac_scale.estimators import Estimator, estimator_from_spec

    if name not in Estimator.kinds:
        raise ValueError(f"there is no estimator {name!r}; choose one of {', '.join(Estimator.kinds)}.")
    damped = [kind for kind, estimator in Estimator.kinds.items() if estimator.damping is not None]
    if damping is not None and name not in damped:
        raise ValueError(f"{name} inverts no matrix, so it has no damping; {', '.join(damped)} have.")
    given = {"pairing": pairing} if pairing != "cross" else {}
    try:
        return estimator_from_spec({"kind": name} | given | ({} if damping is None else {"damping": damping}))
    except TypeError:
        raise ValueError(f"{name} has no {pairing} pairing.") from None
