"""What all image datasets share: ids, columns, pixels, and what happens to a corrupt image."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageOps

from retrac_scale.columns import check_columns, check_ids, lacking

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Corrupt = Literal["raise", "skip"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""How the files of images usually end; `ImageFiles` takes all that Pillow opens."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are not whole images."""


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Columns = str | Sequence[str] | Mapping[str, str]


class CorruptImageError(ValueError):
    """An image of a dataset cannot be read."""


def local(path: str | os.PathLike[str], folder: str = "") -> str:
    """A path, in a folder if that is given, as workers that run elsewhere see it too; a URL as it is."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(os.path.join(folder, os.path.expanduser(text)))


def listed(paths: Paths, what: str) -> list[str]:
    """Paths as a list, `~` expanded; one alone is a list of one.

    Raises:
        ValueError: there are none, or something is no path; names it.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise ValueError(f"{what}.")
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"a path must be a string or a Path, got {path!r}.")
    return [os.path.expanduser(os.fspath(path)) for path in given]


def suffixes() -> tuple[str, ...]:
    """Those of the files that Pillow opens, with their dots."""
    Image.init()
    return tuple(suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN)


def origins(columns: Columns | None) -> dict[str, str]:
    """{name: column of the source} of columns given as such, as a sequence of names, or as one name."""
    if isinstance(columns, Mapping):
        return dict(columns)
    return {name: name for name in ([columns] if isinstance(columns, str) else columns or ())}


class ImageDataset(ABC):
    """Images as tensors `[channels, h, w]`, float32 in -1 .. 1, with ids and columns that go into the store.

    A subclass sets up ids and columns and says in `raw` where the image of a row is. An item is the tensor, or, with
    `given`, a dict of "image" and what else the task takes: "label", "prompt", ...

    Args:
        source: what it is read from, for messages.
        ids: `[n]` unique integers or strings; None: 0 .. n-1, for `n` samples.
        columns: {name: `[n]`} of booleans, numbers or strings.
        given: {name: `[n]`}, handed on with each image.
        channels: 1 or 3.
        size: None leaves images as they are; otherwise the shorter side is resized to it (bilinear) and the middle
            square cut out, as diffusers' training examples do.
        corrupt: "raise" stops at an image that cannot be read when it is asked for; "skip" reads all of them now,
            leaves out those that cannot be read and keeps them, with the reason, in `skipped`.
        n: number of samples when there are no ids.

    Raises:
        ValueError: values are missing, of the wrong number or of a kind that cannot be kept; names column and row.
    """

    advice = "repair it, or leave such images out with corrupt='skip'"
    background = ""
    """A colour, such as "white" or "#808080", that transparent images are put onto; empty: see `opaque`."""

    def __init__(
        self,
        source: str,
        *,
        ids: Sequence[Any] | npt.NDArray[Any] | None,
        columns: Mapping[str, Any] | None,
        given: Mapping[str, Sequence[Any]] | None,
        channels: int,
        size: int | None,
        corrupt: Corrupt,
        n: int | None = None,
    ) -> None:
        check_channels(channels)
        if corrupt not in ("raise", "skip"):
            raise ValueError(f"corrupt must be 'raise' or 'skip', got {corrupt!r}.")
        self.source, self.channels, self.size = source, channels, size
        count = len(ids) if ids is not None else n or 0
        if ids is not None:
            _refuse_odd(source, "id", ids, lists=False)
        self.ids = check_ids(ids, count)
        for name, values in (columns or {}).items():
            _refuse_odd(source, name, values, lists=False)
        self.columns = check_columns(columns, count)
        self._given: dict[str, Sequence[Any]] = {}
        for name, values in (given or {}).items():
            self.give(name, values, count)
        self._rows = np.arange(count)
        self.skipped: dict[Any, str] = {}
        if corrupt == "skip":
            self._leave_out_corrupt()

    @abstractmethod
    def raw(self, row: int) -> Any:
        """The image of a row, before any is left out: encoded bytes, a PIL image or an array."""

    def files(self) -> Sequence[str] | None:
        """The local file that holds each row, before any is left out; None where there is none."""
        return None

    def give(self, name: str, values: Any, count: int | None = None) -> None:
        """Hand values on with the images under a name, as `given` does.

        Args:
            name: in the items.
            values: `[n]`, of all images, those that were left out too; by their places, whatever index they have.
            count: n where it is not known yet.

        Raises:
            ValueError: they are of another number, one is missing, whose row is named, or the name is the image's.
        """
        if name == "image":
            raise ValueError(f"{self.source} has its pictures under {name!r}; hand values on under another name.")
        count = len(self._rows) + len(self.skipped) if count is None else count
        if len(values) != count:
            raise ValueError(f"{self.source} gives {len(values)} values of {name!r} for {count} images.")
        _refuse_odd(self.source, name, values, lists=True)
        self._given[name] = values.to_numpy() if hasattr(values, "iloc") else values  # a Series goes by its labels

    @property
    def stamps(self) -> npt.NDArray[np.uint64] | None:
        """A digest of size and time of each sample's file, how it is read and what it is given; None without files."""
        files = self.files()
        if files is None:
            return None
        how = f"{self.channels} {self.size}" + (f" {self.background}" if self.background else "")
        stamp_of = {file: _stamp(file, how) for file in dict.fromkeys(files)}
        stamps = [stamp_of[file] for file in files]
        if self._given:  # a caption changes without its image
            told = zip(*self._given.values(), strict=True)
            words = (tuple(map(_told, one)) for one in told)
            stamps = [stamp and _word(f"{stamp} {one!r}") for stamp, one in zip(stamps, words, strict=True)]
        return np.array(stamps, np.uint64)[self._rows]

    def read(self, row: int) -> Tensor:
        """The image of a row, before any is left out, as a tensor."""
        return pixels(self.raw(row), self.channels, self.size, self.background)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Tensor | dict[str, Any]:
        place = int(self._rows[row])
        image = self._image(place, self.ids[row])
        if not self._given:
            return image
        return {"image": image, **{name: values[place] for name, values in self._given.items()}}

    def _image(self, place: int, sample: Any) -> Tensor:
        try:
            return self.read(place)
        except UNREADABLE as error:
            raise CorruptImageError(
                f"image {sample!s} of {self.source} cannot be read: {error}; {self.advice}."
            ) from error

    def _leave_out_corrupt(self) -> None:
        whole = []
        for place, sample in enumerate(self.ids.tolist()):
            try:
                self._image(place, sample)
                whole.append(place)
            except CorruptImageError as error:
                self.skipped[sample] = str(error.__cause__)
        self._rows = np.array(whole, dtype=np.int64)
        self.ids = self.ids[self._rows]
        self.columns = {name: values[self._rows] for name, values in self.columns.items()}
        if self.skipped:
            logger.warning("%s: left out %d corrupt images: %s", self.source, len(self.skipped), list(self.skipped))


def _stamp(file: str, how: str) -> int:
    try:
        status = os.stat(file)
    except OSError:  # reading it says more
        return 0
    return _word(f"{status.st_size} {status.st_mtime_ns} {how}")


def _word(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _told(value: Any) -> Any:
    """What tells a value from others by its repr: it itself, or a digest of an array, whose repr leaves out much."""
    if isinstance(value, np.generic) or not hasattr(value, "__array__"):
        return value
    if hasattr(value, "detach"):  # a tensor, perhaps of a type or on a device that NumPy does not know
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    array = np.asarray(value)
    content = repr(array.tolist()).encode() if array.dtype.kind in "OT" else array.tobytes()
    return array.shape, hashlib.blake2b(content, digest_size=8).hexdigest()


def _refuse_odd(source: str, name: str, values: Any, *, lists: bool) -> None:
    """ValueError where a value is missing or, unless they are taken, a list; lists of texts never are."""
    row = lacking(values)
    if row is not None:
        raise ValueError(
            f"{source} has no value of {name!r} in row {row}; fill it in, or leave the row or the column out."
        )
    if getattr(values, "dtype", np.dtype(object)) != np.dtype(object):  # which holds no lists
        return
    if not any(issubclass(kind, list | tuple) for kind in set(map(type, values))):
        return
    for row, value in enumerate(values):
        if isinstance(value, (list, tuple)) and (not lists or any(isinstance(one, str) for one in value)):
            raise ValueError(
                f"{source} has a list as {name!r} in row {row}, {value!r:.60}; give one value for each image."
            )


def check_channels(channels: int) -> None:
    """Raise ValueError unless images have so many channels."""
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels, so images would have to be encoded first.")


def check_depth(image: Image.Image) -> None:
    """Raise ValueError if an image holds more than 8 bits per channel, which Pillow would cut to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"the image has more than 8 bits per channel ({image.mode}); convert it to 8 bits first")


def opaque(image: Image.Image, background: str = "") -> Image.Image:
    """An image without transparency, put onto a ground of one colour.

    Without a colour the transparency is dropped and the colours beneath it come out, as in diffusers' training
    examples, which call `convert("RGB")`.

    Raises:
        ValueError: the colour is none.
    """
    if not background:
        return image
    try:
        ground = ImageColor.getrgb(background)
    except ValueError:
        raise ValueError(f"background must be a colour such as white or #808080, got {background!r}.") from None
    if not is_transparent(image):
        return image
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, ground), whole)


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has a pixel that is not opaque."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return bool(lowest < 255)  # type: ignore[operator]


@contextmanager
def decoding() -> Iterator[None]:
    """Raises as OSError what some of Pillow's decoders, AVIF's and DDS's, say of a damaged image in a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def pixels(image: Any, channels: int, size: int | None, background: str = "") -> Tensor:
    """An image as float32 `[channels, h, w]` in -1 .. 1.

    Args:
        image: encoded bytes, a PIL image, or uint8 `[h, w]` or `[h, w, channels]`.
        channels: 1 or 3.
        size: see `ImageDataset`.
        background: see `opaque`.
    """
    if isinstance(image, bytes):
        with decoding(), Image.open(BytesIO(image)) as opened:
            upright = ImageOps.exif_transpose(opened)  # as diffusers' examples have it
        return pixels(upright, channels, size, background)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an image array has dtype {image.dtype}; give uint8.")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise ValueError(f"an image array has shape {image.shape}; give [h, w] or [h, w, channels]")
        image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"there is a {type(image).__name__} where an image should be")
    with decoding():
        image.load()
    check_depth(image)
    image = opaque(image, background).convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = middle_square(image, size)
    import torch  # which pictures that are shown have no use for

    values = torch.from_numpy(np.asarray(image, dtype=np.float32))
    return values.reshape(*values.shape[:2], channels).permute(2, 0, 1) / 127.5 - 1


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """torchvision's Resize(size) and CenterCrop(size), to the pixel."""
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))
