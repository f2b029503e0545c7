"""What the model is told of each image: captions and classes, from what stands beside the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.project import NO_CAPTIONS

if TYPE_CHECKING:
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.task.concepts import Told
    from retrac_scale.task.diffusion import DiffusionTask
    from retrac_scale.task.encoding import Encoder

BESIDE = ".txt"
"""Texts beside images, as kohya's trainers and many others have them."""
ADVICE = (
    "give each a text in a column text, caption or prompt of metadata.jsonl, .csv or .parquet in the folder, or in a "
    f"{BESIDE} file beside it; --captions says another column or suffix, --captions {NO_CAPTIONS} that the model is "
    "told the empty prompt"
)


def tell(images: ImageFiles, task: DiffusionTask, captions: str = "", *, needed: bool = True) -> str:
    """Hand on with images what the model is told of each.

    Args:
        images: that a task takes.
        task: whose model is told.
        captions: as the project says it: a column, a suffix, none; "" looks for them.
        needed: whether images without captions are refused; else the model is told the empty prompt of those.

    Returns:
        a line on the prompts; empty where the model is told none.

    Raises:
        ValueError: captions or classes are missing where they are needed, or cannot be read; says what to do.
    """
    from retrac_scale.task.items import LABEL_KEYS

    told = task.told
    column = next((name for name in LABEL_KEYS if name in images.described), None)
    if told.classes and column is not None:
        images.give("label", _classes(images, column, told))
    elif told.classes and needed and not told.prompts:
        raise ValueError(
            f"the model is told classes, and nothing says those of {images.source}: give each image's number in a "
            f"column {LABEL_KEYS[0]} of metadata.jsonl, .csv or .parquet in the folder."
        )
    if told.prompts:
        assert task.encoder is not None
        return prompts(images, captions, needed=needed, encoder=task.encoder)
    if captions not in ("", NO_CAPTIONS) and needed:
        raise ValueError(f"the model is told no prompts, so that captions ({captions}) are of no use; leave them out.")
    if told.embeddings and needed:
        raise ValueError(
            "the model is told what a text encoder makes of prompts, and there is none that is known to fit: give the "
            "--model of a whole pipeline with tokenizer and text_encoder; those that encode prompts in a way of their "
            "own are sketched in Python, with embeddings in the items."
        )
    return ""


def look_beside(images: ImageFiles, paths: Sequence[str]) -> None:
    """Describe files that are named one by one as the nearest metadata in a folder above does, if it speaks of them."""
    place = {sample: row for row, sample in enumerate(images.ids.tolist())}
    beside: dict[Path, list[Path]] = {}
    for path in (path for one in paths if (path := Path(one).expanduser()).is_file()):
        beside.setdefault(path.parent, []).append(path)
    for below, files in beside.items():
        folder = _described(below)
        for file, name, value in [] if folder is None else _values(folder, files):
            images.described.setdefault(name, [None] * len(images))[place[str(file)]] = value


def _described(folder: Path) -> Path | None:
    """The nearest of a folder and those above it that has metadata, as `imagefolder` looks for it."""
    from retrac_scale.datasets.metadata import FILES

    above = (folder, *folder.parents)
    return next((one for one in above if any((one / name).is_file() for name in FILES)), None)


def _values(folder: Path, files: Sequence[Path]) -> Iterator[tuple[Path, str, Any]]:
    """(file, column, value) of files that a folder's metadata describe."""
    from retrac_scale.datasets.metadata import columns_beside

    try:
        for name, values in columns_beside(folder, files).items():
            yield from ((file, name, value) for file, value in zip(files, values, strict=True))
    except ValueError:  # it says nothing of one of them
        for file in files if len(files) > 1 else ():
            yield from _values(folder, [file])


def prompts(images: ImageFiles, captions: str = "", *, needed: bool = True, encoder: Encoder | None = None) -> str:
    """Hand on with images their captions, and a line on them; see `tell`."""
    origin = captions or found(images)
    if not origin and needed:
        raise ValueError(f"the model is told prompts, and the images of {images.source} have no captions: {ADVICE}.")
    given = [None] * len(images) if origin in ("", NO_CAPTIONS) else _captions(images, origin, needed)
    texts = ["" if text is None else str(text) for text in given]
    images.give("prompt", texts)
    if all(text is None for text in given):
        return f"{images.source}: the model is told the empty prompt of all"
    what = f"{origin} files" if origin.startswith(".") else f"column {origin}"
    empty = [place for place, text in enumerate(texts) if not text.strip()]
    lacking = "are empty or missing" if None in given else "are empty"
    some = f"; {len(empty)} of {len(texts)} {lacking}, such as that of {images.ids[empty[0]]}" if empty else ""
    if encoder is not None:
        from diffusers.utils import logging

        logging.set_verbosity_error()  # it would say so of each
        longer, most = encoder.cut(texts)
        some += f"; {longer} of {len(texts)} are cut to {most} tokens, as the text encoder takes them" if longer else ""
    return f"{images.source}: captions are in {what}{some}"


def _captions(images: ImageFiles, origin: str, needed: bool) -> list[Any]:
    """The captions in a column, or in files of a suffix, `[n]`; where they are not needed, None where there is none."""
    from retrac_scale.datasets.metadata import texts_beside

    if needed:
        return images.told(origin)
    if origin.startswith("."):
        return [*texts_beside(origin, [Path(file) for file in images.files()])]
    return images.described.get(origin, [None] * len(images))


def found(images: ImageFiles) -> str:
    """The column of captions that images have, or the suffix of texts beside them; empty where there are neither.

    Raises:
        ValueError: there are several such columns.
    """
    from retrac_scale.task.items import PROMPT_KEYS

    columns = [name for name in images.described if name in PROMPT_KEYS]
    if len(columns) > 1:
        raise ValueError(
            f"{images.source} has columns {' and '.join(columns)}; say by --captions which of them the model was told."
        )
    if columns:
        return columns[0]
    return BESIDE if any(Path(file).with_suffix(BESIDE).is_file() for file in images.files()) else ""


def _classes(images: ImageFiles, column: str, told: Told) -> Sequence[int]:
    """Numbers of classes of all images; ValueError where one is none."""
    values: list[Any] = images.told(column)
    for sample, value in zip(images.ids.tolist(), values, strict=True):
        inside = type(value) is int and value >= 0 and (told.count is None or value < told.count)
        if not inside and (told.no_class is None or value != told.no_class):
            known = "" if told.count is None else f", 0 to {told.count - 1}"
            raise ValueError(f"{sample} has {column} {value!r}; the model is told the number of a class{known}.")
    return values
