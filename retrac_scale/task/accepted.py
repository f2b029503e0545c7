"""Which dataset items a model takes, and what of them: checked before anything is encoded or computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from retrac_scale.task.adapters import switches
from retrac_scale.task.calling import Call, call_model, layout_of
from retrac_scale.task.concepts import Told, sides_of
from retrac_scale.task.denoisers import (
    Takes,
    class_count,
    class_of_diffusers,
    forward_of_diffusers,
    image_shape,
    knows_classes,
    no_class,
    settings,
)
from retrac_scale.task.encoding import FRAMES_FIRST, Encoder
from retrac_scale.task.items import CLASS_LABELS, Item, check_label, take_apart
from retrac_scale.task.regions import pixel_mask

EMBEDDINGS_NAME = "encoder_hidden_states"
"""The argument by which denoisers of diffusers take the embeddings of a prompt."""


@dataclass(frozen=True, eq=False)
class Accepted:
    """What a task accepts.

    Attributes:
        model: its denoiser.
        call: how that is called.
        encoder: of pixels and prompts, if any.
        autocast: its mixed precision, if any.
        takes: what the denoiser's forward takes.
    """

    model: nn.Module
    call: Call
    encoder: Encoder | None
    autocast: str | None
    takes: Takes

    def read(self, number: Any, item: Any) -> Item:
        """See `DiffusionTask.read_item`."""
        found = take_apart(number, item)
        if found.concept is None:
            return self._read(number, found)
        told, against = sides_of(found, self.told)
        read = self._read(number, told)
        return replace(read, against=self._read(number, against) if isinstance(against, Item) else against)

    @property
    def told(self) -> Told:
        """What the model can be told of a concept."""
        embeddings = self._takes_prompts()
        prompts = self.encoder is not None and self.encoder.reads and embeddings
        count = class_count(self.model) if self._labels_known() else None
        adapters = bool(switches(self.model))
        return Told(prompts, self._takes_labels(), count, no_class(self.model), embeddings, adapters)

    def _read(self, number: Any, found: Item) -> Item:
        several = self._takes_prompts() or layout_of(self.model) is not None or not forward_of_diffusers(self.model)
        expected = None if several else image_shape(self.model)
        alone = expected is not None and not self.encodes(found) and "concatenated" not in found.conditioning
        if alone and tuple(found.sample.shape) != expected:
            raise ValueError(
                f"dataset item {number} has shape {tuple(found.sample.shape)}, but the model takes {expected}; "
                "resize or convert it in the dataset."
            )
        self._check_arguments(number, found)
        self._check_given(number, found)
        if found.region is not None:
            turned = self.frames_first and not self.encodes(found)
            found = replace(found, region=pixel_mask(number, found, getattr(self.encoder, "cell", None), turned))
        found = replace(
            found,
            label=found.label if self._takes_labels() else None,
            prompt=found.prompt if self.encoder is not None and self._takes_prompts() else None,
        )
        if found.label is not None:
            check_label(number, found.label, settings(self.model) if self._labels_known() else {})
        dtype = found.sample.dtype
        narrow = self.dtype.itemsize < 4 and self.autocast is None and not self.encodes(found)
        if narrow and dtype != self.dtype:
            raise ValueError(
                f"dataset item {number} has dtype {dtype}, but the model's weights are {self.dtype}; load the model "
                "in float32 and give the task autocast='bfloat16', or convert the items."
            )
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(value.dtype for value in self.model.parameters() if value.is_floating_point())

    @property
    def frames_first(self) -> bool:
        """Whether videos reach the model as `[f, c, h, w]`."""
        pipeline = None if self.encoder is None else self.encoder.pipeline
        return type(pipeline).__name__ in FRAMES_FIRST or class_of_diffusers(self.model) in FRAMES_FIRST

    def encodes(self, item: Item) -> bool:
        """Whether an item's sample is of pixels, for the VAE."""
        return self.encoder is not None and self.encoder.vae is not None and not item.encoded

    def _check_arguments(self, number: Any, found: Item) -> None:
        """Raise ValueError for what an item brings and no argument of the model takes.

        Labels and prompts, which datasets bring anyway, are left aside where the model surely takes none.
        """
        taken = self.takes
        others = f"of the model's arguments ({', '.join(taken.names) or 'none but sample and time'})"
        for key in found.conditioning:
            if self.call is call_model and key != "concatenated" and not taken.take(key.partition(".")[0]):
                raise ValueError(
                    f"dataset item {number} brings {key!r}, which is none {others}; leave it out of the items, make it "
                    "one of the dataset's columns, or name it as the argument that takes it."
                )
        if found.label is not None and taken.names and not self._takes_labels() and not self._labels_known():
            raise ValueError(
                f"dataset item {number} brings a label, and {CLASS_LABELS!r} is none {others}; give it in a dict under "
                "the name of the argument that takes it, or leave it out of the items."
            )
        can_matter = self.call is not call_model or taken.anything or {*taken.names} - {CLASS_LABELS}
        if found.prompt is not None and can_matter and (self.encoder is None or not self._takes_prompts()):
            lack = "the task has no text encoder" if self.encoder is None else "no argument takes its embeddings"
            raise ValueError(
                f"dataset item {number} brings a prompt, but {lack}; use DiffusionTask.from_pretrained, give the "
                "embeddings by the names of the model's arguments, or leave it out of the items."
            )

    def _check_given(self, number: Any, found: Item) -> None:
        """Raise ValueError for what the model cannot do without, and an item does not bring."""
        if self.call is not call_model:
            return
        given = {key.partition(".")[0] for key in found.conditioning}
        needed = {*self.takes.needed, *(() if layout_of(self.model) is None else (EMBEDDINGS_NAME,))}
        if self._labels_known() and self._takes_labels():
            needed.add(CLASS_LABELS)
        given |= set() if found.label is None else {CLASS_LABELS}
        prompted = self.encoder is not None and found.prompt is not None
        lacking = sorted(needed - given)
        if lacking and not prompted:
            raise ValueError(
                f"dataset item {number} brings no {lacking[0]!r}, which the model's forward needs; give it in the items"
                + (", as a label" if lacking[0] == CLASS_LABELS else "")
                + (", or a prompt to a task of from_pretrained." if lacking[0] == EMBEDDINGS_NAME else ".")
            )

    def _takes_prompts(self) -> bool:
        return self.call is not call_model or self.takes.take(EMBEDDINGS_NAME)

    def _takes_labels(self) -> bool:
        """A forward of diffusers' own takes them where the model was made with classes, any other by its signature."""
        if self.call is not call_model:
            return True
        return knows_classes(self.model) if self._labels_known() else self.takes.take(CLASS_LABELS)

    def _labels_known(self) -> bool:
        """Whether a label can have no other name than `CLASS_LABELS`."""
        return self.call is call_model and forward_of_diffusers(self.model)
