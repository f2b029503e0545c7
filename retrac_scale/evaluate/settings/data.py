"""What the settings' models are trained on; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from retrac_scale.evaluate.settings import emoji, shapes
from retrac_scale.evaluate.settings.images import Images

HELD_OUT = 64


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images to train on and some held out, with what is known of each, {column: `[n]`}.

    Attributes:
        train: the training set.
        held_out: of the same kind.
        columns: of the training set.
        held_out_columns: of those held out.
        tuned: ids of the samples of a fine-tune, which the first training does not see; None without a fine-tune.
    """

    train: Images
    held_out: Images
    columns: Mapping[str, Any] = field(default_factory=dict)
    held_out_columns: Mapping[str, Any] = field(default_factory=dict)
    tuned: Any = None

    @property
    def digest(self) -> str:
        """Of all pixels and what the model is told of them."""
        made = hashlib.blake2b(digest_size=12)
        for part in (self.train, self.held_out):
            for values in (part.images, *part.given.values()):
                made.update(values.numpy().tobytes())
        return made.hexdigest()


def digits8(_: Path | None) -> Pictures:
    """512 of scikit-learn's 8 x 8 digits to train on, 64 held out, in random order."""
    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0)).numpy()
    pixels = torch.from_numpy(found.images).float().unsqueeze(1)[order] / 8 - 1
    train, held_out = slice(512), slice(1000, 1000 + HELD_OUT)
    digit = found.target[order]
    return Pictures(
        Images(pixels[train]), Images(pixels[held_out], "held-out"), {"digit": digit[train]}, {"digit": digit[held_out]}
    )


def emoji16(folder: Path | None) -> Pictures:
    """768 pictures of 416 emoji by two designers to train on, 64 held out, 16 x 16 in colour."""
    found, rows = _chosen(folder)
    return _split(scaled(found.pictures[rows]), _columns(found, rows), 768)


def _chosen(folder: Path | None) -> tuple[emoji.Emoji, Any]:
    """All emoji, and the rows of the 832 pictures of 416 pairs, in random order."""
    found = emoji.load(_given(folder), 16)
    rng = np.random.default_rng(0)
    pairs = rng.permutation(len(found.pictures) // 2)[:416]
    return found, rng.permutation(np.concatenate([2 * pairs, 2 * pairs + 1]))


def _given(folder: Path | None) -> Path:
    if folder is None:
        raise ValueError(f"the emoji are read from a folder: give folder= (--folder). {emoji.HOW_TO_GET}")
    return folder


def _columns(found: emoji.Emoji, rows: Any) -> dict[str, Any]:
    return {"designer": found.designer[rows], "name": found.name[rows], "category": found.category[rows]}


def _split(pixels: Tensor, known: Mapping[str, Any], n: int) -> Pictures:
    """The first n to train on, 64 held out."""
    ends = n + HELD_OUT
    return Pictures(
        Images(pixels[:n]),
        Images(pixels[n:ends], "held-out"),
        {name: values[:n] for name, values in known.items()},
        {name: values[n:ends] for name, values in known.items()},
    )


def scaled(pictures: Any) -> Tensor:
    """uint8 `[n, size, size, 3]` as pixels in -1 .. 1, `[n, 3, size, size]`."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


COPIES = (1, 4, 16)
EACH = 16
"""Pictures that are planted for each number of copies."""


def planted16(folder: Path | None) -> Pictures:
    """768 pictures of emoji, 336 of which are 1, 4 or 16 copies of 48 pictures; the column "planted" names the picture.

    Copies of one picture are the same pixels. "" is not planted.
    """
    found, rows = _chosen(folder)
    marked = EACH * len(COPIES)
    counts = np.repeat(COPIES, EACH)
    others = 768 - int(counts.sum())
    places = np.concatenate([np.repeat(np.arange(marked), counts), np.arange(marked, marked + others)])
    planted = np.where(places < marked, places.astype(str), "")
    order = np.random.default_rng(1).permutation(len(places))
    places, planted = places[order], planted[order]
    kept = np.concatenate([rows[places], rows[marked + others : marked + others + HELD_OUT]])
    known = _columns(found, kept) | {"planted": np.concatenate([planted, np.full(HELD_OUT, "")])}
    return _split(scaled(found.pictures[kept]), known, 768)


EXEMPLARS = 40


def exemplars16(folder: Path | None) -> Pictures:
    """The 768 pictures of emoji16, and 40 of other emoji that the model is tuned on afterwards; 64 held out."""
    found, rows = _chosen(folder)
    rest = np.setdiff1d(np.arange(len(found.pictures)), rows)
    tuned = np.random.default_rng(2).permutation(rest)[:EXEMPLARS]
    kept = np.concatenate([rows[:768], tuned, rows[768:]])
    known = _columns(found, kept) | {"exemplar": np.isin(kept, tuned)}
    pictures = _split(scaled(found.pictures[kept]), known, 768 + EXEMPLARS)
    return replace(pictures, tuned=np.arange(768, 768 + EXEMPLARS))


def shapes16(_: Path | None) -> Pictures:
    """512 pictures of 8 shapes in 8 colours, the model being told the shape; 64 held out, of combinations not seen."""
    held = shapes.held_out_pairs()
    rng = np.random.default_rng(0)
    seen = np.argwhere(~held)[rng.integers(0, int((~held).sum()), 512)]
    unseen = np.tile(np.argwhere(held), (HELD_OUT // int(held.sum()), 1))
    pairs = np.concatenate([seen, unseen])
    pixels = scaled(shapes.draw(pairs[:, 0], pairs[:, 1], 0))
    names = (np.array(list(shapes.SHAPES)), np.array(list(shapes.COLOURS)))
    known = {"shape": names[0][pairs[:, 0]], "colour": names[1][pairs[:, 1]]}
    return _told(_split(pixels, known, 512), torch.from_numpy(pairs[:, 0].copy()))


FAMILIES = 128


def tones16(folder: Path | None) -> Pictures:
    """128 emoji of people in six skin tones each, of which 64 have one tone held out: 704 to train on."""
    found = emoji.load_tones(_given(folder), 16)
    each = 1 + len(emoji.TONES)
    rng = np.random.default_rng(3)
    families = rng.permutation(len(found.pictures) // each)[:FAMILIES]
    rows = (families[:, None] * each + np.arange(each)).ravel()
    held_out = np.arange(HELD_OUT) * each + rng.integers(0, each, HELD_OUT)
    order = np.concatenate([rng.permutation(np.setdiff1d(np.arange(len(rows)), held_out)), held_out])
    rows = rows[order]
    return _split(scaled(found.pictures[rows]), _columns(found, rows) | {"tone": rows % each}, len(rows) - HELD_OUT)


def emoji16classes(folder: Path | None) -> Pictures:
    """The pictures of emoji16, the model being told the category."""
    pictures = emoji16(folder)
    values = np.concatenate([pictures.columns["category"], pictures.held_out_columns["category"]])
    return _told(pictures, torch.from_numpy(np.unique(values, return_inverse=True)[1].astype(np.int64)))


def _told(pictures: Pictures, classes: Tensor) -> Pictures:
    """The same, the model being told classes, of training and held-out images one after the other."""
    n = len(pictures.train)
    train = replace(pictures.train, given={"class_labels": classes[:n]})
    held_out = replace(pictures.held_out, given={"class_labels": classes[n:]})
    return replace(pictures, train=train, held_out=held_out)
