"""The first question to any index: do training images, plain and altered, find their originals?"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from retrac_scale.columns import check_ids
from retrac_scale.estimators import GradDot, ReTrac, TracIn
from retrac_scale.evaluate.learnt import unlearnt
from retrac_scale.task.items import LATENTS, dataset_ids, with_sample

if TYPE_CHECKING:
    from retrac_scale.query.index import Index
    from retrac_scale.store import SketchStore

ALTERED = ("shifted", "darker", "noisy", "JPEG", "mirrored")
PLAIN = "plain"
ASKED = (PLAIN, "moved", "darker", "noisy", "JPEG")
"""A mirrored digit may be another one, and of 16 pixels a whole one is much: no copies that should find an original."""
MOVED = 64
"""A picture is moved by this part of its width."""
IMAGES = 12
PLAIN_FIRST, ALTERED_FIRST = 0.95, 0.9
"""Shares of queries whose original stands first from which all is well."""


class Altered:
    """Training images as queries, each plain and in four ways altered; what `sketch(..., like=store)` takes.

    Args:
        dataset: map-style, as for `sketch`, of images `[c, h, w]` in -1 .. 1.
        ids: of the training images to ask about; None for a dozen, evenly spaced.

    Raises:
        ValueError: an id is none of the dataset's, or an item is no image.

    Attributes:
        ids: "ID, darker" and the like, `[q]`.
        columns: "original", the training image's id, and "altered", how; each `[q]`.
    """

    def __init__(self, dataset: Any, ids: Sequence[Any] | npt.NDArray[Any] | None = None) -> None:
        self._dataset = dataset
        own = check_ids(dataset_ids(dataset), len(dataset))
        rows = {sample: row for row, sample in enumerate(own.tolist())}
        few = np.unique(np.linspace(0, len(own) - 1, min(IMAGES, len(own))).astype(int))
        chosen = own[few] if ids is None else np.asarray(ids)
        if unknown := [sample for sample in chosen.tolist() if sample not in rows]:
            raise ValueError(f"there is no {unknown[0]!r} among the images.")
        self._asked = [(rows[sample], how) for sample in chosen.tolist() for how in ASKED]
        originals = np.repeat(chosen, len(ASKED))
        hows = np.tile(ASKED, len(chosen))
        self.ids = np.array([f"{sample}, {how}" for sample, how in zip(originals, hows, strict=True)])
        self.columns = {"original": originals, "altered": hows}

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, place: int) -> Any:
        row, how = self._asked[place]

        def altered(key: str, image: Any) -> Tensor:
            if key == LATENTS or not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3):
                raise ValueError(f"item {self.ids[place]} is no image of 1 or 3 channels, so it cannot be altered.")
            return image if how == PLAIN else alter(image[None], how)[0]

        return with_sample(self.ids[place], self._dataset[row], altered)


@dataclass(frozen=True, eq=False)
class Originals:
    """Where the originals of some queries stand.

    Attributes:
        originals: ids `[q]` of the training images.
        altered: how each query was altered `[q]`, "plain" where it was not.
        ranks: place of the original among all samples `[q]`, 1 is first.
        samples: how many there are.
        causes: what is likely wrong where not all is well, sentences.
        learnt: whether nothing in the losses says that the model predicts no better than zeros.
    """

    originals: npt.NDArray[Any]
    altered: npt.NDArray[Any]
    ranks: npt.NDArray[np.int64]
    samples: int
    causes: tuple[str, ...] = ()
    learnt: bool = True

    @property
    def plain(self) -> float:
        """Share of the unaltered queries whose original stands first."""
        return float((self.ranks[self.altered == PLAIN] == 1).mean())

    @property
    def copies(self) -> float:
        """Share of the altered ones."""
        return float((self.ranks[self.altered != PLAIN] == 1).mean())

    @property
    def are_first(self) -> bool:
        """Whether originals come first as they should: plain ones 95 % of the time, altered ones 90 %."""
        return self.plain >= PLAIN_FIRST and self.copies >= ALTERED_FIRST

    @property
    def is_well(self) -> bool:
        """Whether they do, and by a model that has learnt something."""
        return self.are_first and self.learnt

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """{how altered: (queries whose original stands first, queries)}."""
        every = {how: self.ranks[self.altered == how] for how in ASKED}
        return {how: (int((ranks == 1).sum()), len(ranks)) for how, ranks in every.items() if len(ranks)}

    @property
    def meaning(self) -> str:
        """One line on what the figures mean."""
        if self.is_well:
            return f"a training image is found among {self.samples:,}, also where it was altered a little."
        if self.are_first:
            return (
                "a training image is found, but losses are as of a model that predicts nothing: lists say nothing yet."
            )
        if self.plain >= PLAIN_FIRST:
            return "a training image is found as it is, but not where it was altered a little: read lists with care."
        return "not even a training image itself is found: these lists say nothing yet."

    def __str__(self) -> str:
        firsts = ", ".join(f"{how} {first} of {count}" for how, (first, count) in self.counts.items())
        return f"originals that come first: {firsts}; {self.meaning}"


def find_originals(index: Index, queries: SketchStore) -> Originals:
    """Where the originals of queries stand, among all samples; queries whose original was deleted do not count.

    Plain queries saw what their rows saw, under common noise to the last bit, so that another place than the first
    means that something is wrong; altered ones tell more.

    Args:
        index: of the training side.
        queries: sketches of an `Altered` data set.

    Raises:
        ValueError: the queries are others, or the index has no original of one.
    """
    if not {"original", "altered"} <= set(queries.columns):
        raise ValueError("give sketches of rs.evaluate.Altered(dataset), which know their originals.")
    originals, altered = queries.columns["original"], queries.columns["altered"]
    places = index.places.find(originals)
    here = np.flatnonzero(places >= 0)
    if not len(here):
        raise ValueError(
            f"the index has no sample {originals.tolist()[0]!r}, of which a query is a copy, nor one of another query."
        )
    scores = index.scores(queries)[here]
    own = scores.vindex[np.arange(len(here)), places[here]]
    ranks = (1 + (scores > own[:, None]).sum(axis=1)).compute()
    said = unlearnt(queries)  # always: gradients of any weights find copies
    found = Originals(originals[here], altered[here], ranks, index.shape[1], learnt=not said)
    return found if found.is_well else replace(found, causes=_causes(found, index, queries, said))


def _causes(found: Originals, index: Index, queries: SketchStore, said: str) -> tuple[str, ...]:
    """What is likely wrong, the likeliest first; what was said of the losses among it."""
    if found.are_first:
        return (said,)
    plans = queries.fingerprint.get("timesteps", {})
    common = "common" in str(plans)
    causes = []
    if not common:
        causes.append(
            "the query and its original were measured under different noise, and most of a gradient is the luck of its "
            'noise: measure anew with noise = "common"'
        )
    if said:
        causes.append(said)
    estimator = index.estimator
    finds_itself = estimator.damping is not None or (isinstance(estimator, ReTrac) and estimator.pairing == "matched")
    if common and found.plain < PLAIN_FIRST and finds_itself:
        causes.append("the model, its weights or the images are others than those that the sketches were made of")
    if isinstance(estimator, (TracIn, GradDot)):
        causes.append(
            f"{type(estimator).__name__} multiplies whole gradients, so that samples with long ones come before the "
            "original, whatever the weights are: take ReTracRidge"
        )
        return tuple(causes)
    if estimator.pairing == "cross" and common:
        causes.append("under cross pairing the noise of one timestep meets that of another: take ReTracRidge")
    causes.append(f"{queries.shape[1]} timesteps are too few: measure at more, up to where answers repeat")
    if len(queries.checkpoints) == 1:
        causes.append("the one checkpoint is not of the model that was trained on these images")
    return tuple(causes)


def alter(images: Tensor, how: str) -> Tensor:
    """Images in -1 .. 1, `[n, c, h, w]`, altered.

    Args:
        images: of any size.
        how: "shifted" by a pixel, "moved" by a sixty-fourth of the width, a tenth "darker", "noisy" by 0.1, through
            "JPEG" of quality 75, or "mirrored".
    """
    if how == "shifted":
        return _shifted(images, 1)
    if how == "moved":
        whole, part = divmod(images.shape[-1] / MOVED, 1)
        return torch.lerp(_shifted(images, int(whole)), _shifted(images, int(whole) + 1), part)
    if how == "darker":
        return (images + 1) * 0.9 - 1
    if how == "noisy":
        return images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([_through_jpeg(image) for image in images]) if how == "JPEG" else images.flip(-1)


def _shifted(images: Tensor, pixels: int) -> Tensor:
    """To the right, the first column repeated."""
    width = images.shape[-1]
    return torch.cat([images[..., :1].expand(*images.shape[:-1], pixels), images[..., : width - pixels]], dim=-1)


def _through_jpeg(image: Tensor) -> Tensor:
    pixels = ((image + 1) * 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=75)
    read = np.array(Image.open(buffer))
    return torch.from_numpy(read.reshape(pixels.shape)).permute(2, 0, 1).float() / 127.5 - 1
