"""What a prompt, a class or other conditioning adds to the model's prediction, differentiated in place of the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrac_scale.task.asking import Asked
from retrac_scale.task.encoding import EMBEDDINGS
from retrac_scale.task.items import CLASS_LABELS, About, Item

AGAINST = " against "
"""Before the names of what the model is told on the other side; no argument of a forward has a space in its name."""


@dataclass(frozen=True, eq=False)
class Concept:
    """Something that a conditional model can be told, and what it is compared with.

    What is differentiated is minus the mean square of what the concept adds to the prediction, the difference of the
    predictions under the two conditionings; its gradient is -2 times that difference, held, times the difference's own.
    So a positive score means, as for the loss, that training on a sample made the concept count for more.

    Attributes:
        told: a prompt, the number of a class, or {argument of the model's forward: tensor}; None for what an item
            itself brings.
        against: likewise. None is the empty prompt, the class that stands for none in a model that has one (a DiT), or
            what an item itself brings if `told` is given by arguments.
    """

    told: str | int | Mapping[str, Tensor] | None
    against: str | int | Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.told is None and self.against is None:
            raise ValueError("Concept(None) compares an item with itself; say what it is told, or against what.")

    @property
    def words(self) -> str:
        """For the fingerprint of a store."""
        return f"{_words(self.told)} against {_words(self.against)}"


class Concepts(Asked):
    """A dataset whose samples are asked about for a concept: map-style, for `sketch` and `Samples`.

    Args:
        dataset: map-style, as for `sketch`: the pictures in which the concept is looked for.
        concept: one for all samples, or {name: concept}: then every sample is asked about once for each name, and has
            the id "id: name".

    Attributes:
        concept: in words, for the fingerprint of a store.
    """

    def __init__(self, dataset: Any, concept: Concept | Mapping[str, Concept]) -> None:
        given = dict(concept) if isinstance(concept, Mapping) else {"": concept}
        for one in given.values():
            if not isinstance(one, Concept):
                raise ValueError(f'a concept must be one, such as rs.Concept("red", against=""), got {one!r}.')
        super().__init__(dataset, concept)
        words = {name: one.words for name, one in given.items()}
        self.concept = words if isinstance(concept, Mapping) else words[""]

    def asked(self, item: Any, way: Any, row: int) -> About:
        """See `Asked`."""
        return About(item, way)


def sides_of(number: Any, item: Item, prompts: bool, classes: bool, no_class: int | None) -> tuple[Item, Item]:
    """An item as it is told the concept, and as it is told what that is compared with.

    Args:
        number: names the item in errors.
        item: whose concept it is.
        prompts: whether the model can be told a prompt.
        classes: whether it can be told a class.
        no_class: the class that stands for none, if there is one.

    Raises:
        ValueError: the model is told nothing of the kind, or there is nothing to compare it with.
    """
    concept: Concept = item.concept
    told, against = concept.told, concept.against
    for one in (told, against):
        if isinstance(one, str) and not prompts:
            other = "classes; give the number of one" if classes else "no prompts; use DiffusionTask.from_pretrained"
            raise ValueError(f"the concept {one!r} is a prompt, but the task's model is told {other}.")
        if isinstance(one, int) and not classes:
            other = "prompts; give a text" if prompts else "nothing, so that it knows no concepts"
            raise ValueError(f"the concept {one!r} is a class, but the task's model is told {other}.")
    if against is None and isinstance(told, str):
        against = ""
    if against is None and isinstance(told, int):
        against = no_class
        if against is None:
            raise ValueError(f"the model has no class for none; say what class {told} is compared with: against=.")
    plain = replace(item, concept=None)
    return _told(plain, told), _told(plain, against)


def _told(item: Item, what: Any) -> Item:
    if isinstance(what, str):
        names = {name for names in EMBEDDINGS.values() for name in names}
        kept = {name: value for name, value in item.conditioning.items() if name not in names}
        return replace(item, prompt=what, conditioning=kept)
    if isinstance(what, int):
        kept = {name: value for name, value in item.conditioning.items() if name != CLASS_LABELS}
        return replace(item, label=torch.tensor(what), conditioning=kept)
    if what is None:
        return item
    given = {name: torch.as_tensor(value) for name, value in what.items()}
    return replace(item, label=None if CLASS_LABELS in given else item.label, conditioning=item.conditioning | given)


def _words(what: Any) -> str:
    if isinstance(what, Mapping):
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(what):
            array = np.asarray(what[name])
            digest.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array, np.float32).tobytes())
        return f"{', '.join(sorted(what))} {digest.hexdigest()}"
    return "what is given" if what is None else repr(what)
