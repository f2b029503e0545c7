"""Opening the zarr groups of stores and indexes: what is there is checked before anything of it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import zarr
from zarr.errors import GroupNotFoundError

from retrac_scale.store import objects
from retrac_scale.store.errors import DamagedStoreError
from retrac_scale.store.part import ROOT, Part, check_root, measures_in, plans_of
from retrac_scale.store.schema import ATTRIBUTE, FORMAT_VERSION, Url, get_group, zarr_location

WHAT = "sketch store"
PARTS = "parts"


def open_root(url: Url, what: str, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """Open the zarr group of a store or an index, checking that it is one of a known version.

    Raises:
        FileNotFoundError: there is no zarr group.
        ValueError: it is something else, or of a newer format.
        DamagedStoreError: its metadata cannot be read.
    """
    try:
        root = zarr.open_group(zarr_location(url), mode=mode)
    except FileExistsError:
        raise FileNotFoundError(f"{url} is a file and no {what}; choose another path.") from None
    except (FileNotFoundError, NotADirectoryError, GroupNotFoundError) as error:
        raise FileNotFoundError(f"there is no {what} at {url}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{url}/{ROOT} is damaged: {error}.") from error
    check_description(root.attrs.get(ATTRIBUTE), what, url)
    return root


def check_description(attribute: Any, what: str, place: Url) -> None:
    """Raise ValueError unless a group's attribute describes a store (or an index) that this release can read."""
    if not isinstance(attribute, dict) or attribute.get("what") != what:
        raise ValueError(f"{place} is a zarr group but no {what}.")
    if not isinstance(attribute.get("format"), int) or attribute["format"] > FORMAT_VERSION:
        raise ValueError(
            f"{place} has format version {attribute.get('format')}, this release reads up to {FORMAT_VERSION}; "
            "update retrac_scale."
        )


def open_parts(root: zarr.Group, url: Url) -> list[Part]:
    """The parts of the store at a zarr group, that at its root first, then those that were added, in their order."""
    parts = [part for _, part in _each(root, url) if part is not None]
    if not parts:
        raise ValueError(f"{url} was being created when its process ended; repeat the sketch(...) that began it.")
    return parts


def begun_parts(root: zarr.Group, url: Url) -> list[str]:
    """Names of the parts that are being laid out, or were when their process ended."""
    return [name for name, part in _each(root, url) if part is None and name]


def _each(root: zarr.Group, url: Url) -> Iterator[tuple[str, Part | None]]:
    yield "", _open_part(root, "", str(url))
    for name in objects.names(root, PARTS):
        if name != ROOT:
            yield name, _open_part(root, name, f"{url}/{PARTS}/{name}")


def _open_part(root: zarr.Group, name: str, place: str) -> Part | None:
    """One part, None when it has not been laid out to the end."""
    key = f"{PARTS}/{name}/{ROOT}" if name else ROOT
    content = objects.read(root, key)
    if content is None and name:
        if all(file.endswith(".partial") for file in objects.names(root, f"{PARTS}/{name}")):
            return None
        content = objects.read(root, key)  # which may have come meanwhile
    if content is None:
        raise DamagedStoreError(f"{place}/{ROOT} is missing; run `retrac-scale verify` on the store.")
    try:
        attribute = json.loads(content).get("attributes", {}).get(ATTRIBUTE)
    except (ValueError, AttributeError) as error:
        raise DamagedStoreError(f"{place}/{ROOT} is damaged: {error}.") from None
    check_description(attribute, WHAT, place)
    if attribute.get("creating"):
        return None
    meta = check_root(content, place)
    return Part(get_group(root, f"{PARTS}/{name}") if name else root, meta, name, place)


def of_measures(parts: Sequence[Part], measures: Sequence[str], url: Url) -> list[Part]:
    """Those of some measures, which then stand side by side like further timesteps, in the order of the measures.

    Raises:
        ValueError: none is named, there is no such measure, or two of them were taken at other timesteps.
    """
    if not measures:
        raise ValueError(f"name the measures to open {url} under, one or more.")
    if parts and len(taken := measures_in(parts[0].meta["fingerprint"])) > 1:
        if taken == list(measures):
            return list(parts)
        raise ValueError(
            f"these samples were taken under {' and '.join(taken)} side by side, which are not told apart any more; "
            "take them from the store under the measures that are wanted."
        )
    own = {measure: [part for part in parts if measure_of(part) == measure] for measure in measures}
    for measure, some in own.items():
        if not some:
            raise ValueError(f"{url} has no measure {measure!r}.")
    plans = {measure: list(dict.fromkeys(map(_plans, some))) for measure, some in own.items()}
    first, *others = plans
    for other in others:
        if set(plans[other]) != set(plans[first]):
            raise ValueError(
                f"{url} holds {first!r} and {other!r} at other timesteps, which cannot stand side by side."
            )
    return [part for some in own.values() for plan in plans[first] for part in some if _plans(part) == plan]


def _plans(part: Part) -> str:
    return json.dumps(plans_of(part.meta["fingerprint"]), sort_keys=True)


def measure_of(part: Part) -> str:
    """The measure that a part was sketched with, "given" for arrays that came from elsewhere."""
    return str(part.meta["fingerprint"].get("measure", "given"))
