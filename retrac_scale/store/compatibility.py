"""What a gradient depends on, as a fingerprint tells it, and whether the sketches of two stores may be multiplied."""

from __future__ import annotations

import contextlib
import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from retrac_scale.store.part import plans_of
from retrac_scale.store.schema import CONTENT, differences

if TYPE_CHECKING:
    from retrac_scale.store.reader import SketchStore

LIBRARIES = ("torch", "diffusers", "peft")
"""Whose versions gradients may depend on."""


@cache
def library_versions() -> dict[str, str]:
    """Of what is installed; read once: a process without privileges may no longer reach the packages' files."""
    versions = {}
    for name in ("retrac_scale", "zarr", "numpy", *LIBRARIES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


Purpose = Literal["query", "rerank", "grow"]
"""What two fingerprints are compared for; a run that goes on must find every entry unchanged, see `as_told_by`."""


@dataclass(frozen=True)
class Field:
    """An entry of a fingerprint, and for which purposes it must agree.

    Attributes:
        what: what of the gradient it tells.
        query: whether queries must have the same as the training side: asked, of a report or of a service.
        rerank: whether samples that are measured again must; what else matters there is compared in its own way.
        grow: whether everything that a store grows by must; the others are compared by name or make a part of their
            own.
    """

    what: str
    query: bool = True
    rerank: bool = False
    grow: bool = True


FIELDS = {
    "projection": Field("what a gradient is projected by: kind, dimensions, seed, revision"),
    "parameters": Field("which parameters it is of: names and shapes"),
    "checkpoints": Field("digests of all weights, and what LoRA's are multiplied with, by checkpoint", grow=False),
    "scheduler": Field("what of the scheduler's configuration determines noisy images, targets and times", rerank=True),
    "measure": Field("what is differentiated, and how it is weighted over timesteps", rerank=True, grow=False),
    "forward": Field(
        "what runs: call=, the model's code and plain attributes, adapters, mixed precision, noising", rerank=True
    ),
    "autocast": Field("mixed precision, as earlier releases told it", query=False),
    "frozen": Field("the model's configuration; digests of VAE, text encoders, a ControlNet's U-Net", rerank=True),
    "timesteps": Field("the plan, and a digest of every timestep and noise seed", query=False, grow=False),
    "region": Field("which part of every sample it is of, where it is not of all", query=False, rerank=True),
    "concept": Field("for which concept, where it is not of what is measured", query=False, rerank=True),
    "precondition": Field("digests of what it is divided by, by checkpoint", query=False, grow=False),
}
"""Everything that a gradient is a function of, beside the samples themselves. A fingerprint has no other entries."""

NOT_EVERYWHERE = ("frozen", "forward")
"""Entries of which only what both sides tell is compared.

Latents and embeddings may come without an encoder, and an earlier release tells less of the forward.
"""


def check_compatible(
    train: Mapping[str, Any], train_checkpoints: list[str], queries: Mapping[str, Any], query_checkpoints: list[str]
) -> None:
    """Compare the fingerprints and checkpoint names of the training side and of the queries.

    Raises:
        ValueError: they were sketched otherwise; says which field differs and what to do.
    """
    found = differences(*compared("query", train, queries))
    if not found and set(train_checkpoints) != set(query_checkpoints):
        found = [f"checkpoints are {train_checkpoints} there and {query_checkpoints} here"]
    if found:
        raise ValueError(
            f"the queries do not fit the training sketches: {'; '.join(found)}; "
            "sketch the queries with like=store and the same checkpoints."
        )
    check_noise(train, queries)


def check_noise(train: Mapping[str, Any], queries: Mapping[str, Any]) -> None:
    """Raise ValueError where a training side under common noise meets queries that did not see that noise."""
    common = {plan.get("seed", 0) for plan in plans_of(train) if plan.get("noise") == "common"}
    for plan in plans_of(queries) if common else ():
        if plan.get("noise") != "common" or plan.get("seed", 0) not in common:
            seeds = " and ".join(str(seed) for seed in sorted(common))
            theirs = f"common noise of seed {plan.get('seed', 0)}" if "noise" in plan else "noise of their own"
            raise ValueError(
                f"the training samples were measured under common noise of seed {seeds}, the queries under {theirs}; "
                "scores would be the luck of two draws. Sketch the queries with like=store and without timesteps=."
            )


def slots(fingerprint: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What each measurement of a sample sees under common noise, (seed, draws); in the order of its timesteps."""
    found: list[tuple[Any, ...]] = []
    for plan in plans_of(fingerprint):
        seen = (plan.get("seed", 0), plan.get("draws", 1)) if plan.get("noise") == "common" else ()
        found += [seen] * int(plan.get("count", len(plan.get("timesteps", " "))))
    return found


def compared(
    purpose: Purpose, stored: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two fingerprints tell of all that must agree for a purpose, of `NOT_EVERYWHERE` what both name."""
    left, right = agreed(purpose, stored), agreed(purpose, given)
    for field in NOT_EVERYWHERE:
        told = [_told(one, field) for one in (stored, given)]
        names = told[0].keys() & told[1].keys()
        left[field], right[field] = ({name: one[name] for name in names} for one in told)
    return left, right


def agreed(purpose: Purpose, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a fingerprint that must agree for a purpose; None where it has none."""
    return {name: fingerprint.get(name) for name, field in FIELDS.items() if getattr(field, purpose)}


def as_told_by(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without what the stored one, of an earlier release, cannot tell."""
    told = {key: value for key, value in given.items() if key in stored or key != "forward"}
    if "forward" in told:
        told["forward"] = {name: value for name, value in told["forward"].items() if name in stored["forward"]}
    return told


def warn_of_versions(store: SketchStore) -> None:
    """Warn where a store was written under other libraries than those that compute here.

    They may have changed what their models do, which no fingerprint tells; a patch is taken to change nothing.
    """
    here = library_versions()
    there = {name: version for name, version in store.meta["written_by"].items() if name in LIBRARIES and name in here}
    other = [name for name, version in there.items() if version.split(".")[:2] != here[name].split(".")[:2]]
    if other:
        said = ", ".join(f"{name} {there[name]}, here is {here[name]}" for name in other)
        warnings.warn(
            f"{store.url or 'the store'} was written under {said}; what a library changed in its models stands in no "
            "fingerprint: compute both sides under one, or compare a sample's norm.",
            stacklevel=3,
        )


def kept_alike(stored: Sequence[str], given: Sequence[str]) -> list[str]:
    """Quantities to be kept, without what a store of an earlier release does not keep."""
    return [name for name in given if name in stored or name != CONTENT]


def _told(fingerprint: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    earlier = {"autocast": fingerprint["autocast"]} if field == "forward" and "autocast" in fingerprint else {}
    return {**earlier, **(fingerprint.get(field) or {})}
