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


UNADAPTED = " without adapters"
"""Among the names of what the model is told: that the prediction is compared with the one without its adapters."""


@dataclass(frozen=True)
class Unadapted:
    """What a concept is compared with: the model without its active adapters, told the same."""


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
            what an item itself brings if `told` is given by arguments. `Unadapted()` is the same model told the same
            without its adapters, so that the concept is what a fine-tune by adapters has learnt; that side is held.
    """

    told: str | int | Mapping[str, Tensor] | None
    against: str | int | Mapping[str, Tensor] | Unadapted | None = None

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


@dataclass(frozen=True)
class Told:
    """What a task's model can be told.

    Attributes:
        prompts: whether prompts.
        classes: whether classes, by their numbers.
        count: how many of them, where the model's configuration says it.
        no_class: the class that stands for none, if there is one.
        embeddings: whether what a text encoder makes of prompts; without one, the task takes no prompts.
        adapters: whether it has adapters that can be left out.
    """

    prompts: bool
    classes: bool
    count: int | None
    no_class: int | None
    embeddings: bool
    adapters: bool

    def concept(self, told: str | None, against: str | None = None) -> Concept | None:
        """The concept that somebody has written: a prompt, or the number of a class if the model is told classes.

        Raises:
            ValueError: the model is told nothing of the kind, there is nothing to compare it with, or no concept.
        """
        if told is None:
            if against is not None:
                raise ValueError(f"{against!r} is what a concept is compared with, and there is no concept; give one.")
            return None
        number = self.classes and not self.prompts
        read = [int(one) if number and one is not None and one.isdecimal() else one for one in (told, against)]
        concept = Concept(read[0], against=read[1])
        self.against(concept)
        return concept

    def against(self, concept: Concept) -> str | int | Mapping[str, Tensor] | Unadapted | None:
        """What a concept is compared with: what it says, or by the rule that it leaves it to.

        Raises:
            ValueError: the model is told nothing of the kind, or there is nothing to compare it with.
        """
        for one in (concept.told, concept.against):
            self._check(one)
        if isinstance(concept.against, Unadapted) and not self.adapters:
            raise ValueError("the concept is what adapters add, but the task's model has none that are active.")
        if concept.against is not None or not isinstance(concept.told, (str, int)):
            return concept.against
        if isinstance(concept.told, str):
            return ""
        if self.no_class is None:
            raise ValueError(f"the model has no class for none; say what class {concept.told} is compared with.")
        return self.no_class

    def _check(self, one: Any) -> None:
        if isinstance(one, str) and not self.prompts:
            why = "nothing, so that it knows no concepts"
            if self.classes:
                why = "classes; give the number of one"
            elif self.embeddings:
                why = "no prompts, without a text encoder; use DiffusionTask.from_pretrained, or the whole pipeline"
            raise ValueError(f"the concept {one!r} is a prompt, but the task's model is told {why}.")
        if isinstance(one, int) and not self.classes:
            other = "prompts; give a text" if self.prompts else "nothing, so that it knows no concepts"
            raise ValueError(f"the concept {one!r} is a class, but the task's model is told {other}.")
        if isinstance(one, int) and self.count is not None and not 0 <= one < self.count and one != self.no_class:
            raise ValueError(f"the concept {one!r} is no class: the model knows {self.count}, from 0.")


def sides_of(item: Item, told: Told) -> tuple[Item, Item | Unadapted]:
    """An item as it is told its concept, and as it is told what that is compared with; raises as `Told.against`."""
    concept: Concept = item.concept
    plain, against = replace(item, concept=None), told.against(concept)
    return _told(plain, concept.told), against if isinstance(against, Unadapted) else _told(plain, against)


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
    if isinstance(what, Unadapted):
        return "without adapters"
    return "what is given" if what is None else repr(what)
