"""The paper's data sets, read from the files in which they are distributed; nothing is downloaded."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

import retrac_scale as rs
from retrac_scale.datasets import ImageDataset
from retrac_scale.evaluate.settings.images import Images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Data:
    """Images to train on, and held out; which of the former are planted, bool `[n]`."""

    train: Images
    validation: Images
    planted: Any = None


def digits(_: Path | None = None) -> Data:
    """1,000 of scikit-learn's 8 x 8 digits to train on, the other 797 held out, in random order."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return Data(Images(images[:1000]), Images(images[1000:]))


def cifar10(folder: Path) -> Data:
    """CIFAR-10 from the folder `cifar-10-batches-py` of its Python version."""
    train = [_cifar_batch(folder / f"data_batch_{number}")[0] for number in range(1, 6)]
    return Data(Images(_scaled(np.concatenate(train))), Images(_scaled(_cifar_batch(folder / "test_batch")[0])))


def cifar_mnist(folder: Path, label: int = 1, zeros: int = 200) -> Data:
    """One class of CIFAR-10 and 200 zeros of MNIST, planted, as in the paper's outlier experiment.

    Args:
        folder: holds `cifar-10-batches-py`, and `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, gzipped or not.
        label: of the CIFAR class; 1 is automobile.
        zeros: how many are planted.
    """
    batches = [_cifar_batch(folder / "cifar-10-batches-py" / f"data_batch_{number}") for number in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    tested, of_test = _cifar_batch(folder / "cifar-10-batches-py" / "test_batch")
    drawn = _idx(folder / "train-images-idx3-ubyte")[_idx(folder / "train-labels-idx1-ubyte") == 0][:zeros]
    if len(drawn) < zeros:
        raise ValueError(f"{folder} has {len(drawn)} zeros of MNIST, {zeros} were asked for.")
    outliers = np.repeat(np.pad(drawn, ((0, 0), (2, 2), (2, 2)))[:, None], 3, axis=1)
    chosen = images[labels == label]
    return Data(
        Images(_scaled(np.concatenate([chosen, outliers]))),
        Images(_scaled(tested[of_test == label])),
        np.arange(len(chosen) + zeros) >= len(chosen),
    )


def artbench(folder: Path, styles: Sequence[str] | None = None, size: int = 32) -> Data:
    """ArtBench from `train/STYLE/*.jpg` and `test/STYLE/*.jpg` of its image-folder release, resized.

    ArtBench-2 has the styles "post_impressionism" and "ukiyo_e"; None takes all ten.
    """

    def read(part: str) -> Images:
        found = sorted(path for path in _folder(folder / part).iterdir() if path.is_dir())
        lost = set(styles or ()) - {path.name for path in found}
        if lost:
            raise ValueError(f"{folder / part} has no style {sorted(lost)[0]!r}; it has {[p.name for p in found]}.")
        return _pictures([path for path in found if styles is None or path.name in styles], size)

    return Data(read("train"), read("test"))


def tiny_imagenet(folder: Path, size: int = 64) -> Data:
    """Tiny-ImageNet from `train/WNID/images/*.JPEG` and `val/images/*.JPEG` of `tiny-imagenet-200`; 5 GB as float32."""
    classes = sorted(path / "images" for path in _folder(folder / "train").iterdir() if path.is_dir())
    return Data(_pictures(classes, size), _pictures([_folder(folder / "val" / "images")], size))


class Captioned(ImageDataset):
    """A folder of images with captions, in the layout that diffusers' train_text_to_image_lora.py takes.

    Args:
        folder: holds images, and a metadata.jsonl with lines {"file_name": "a.png", "text": "its caption"}.
        size: of the middle square that is cut out of an image, in pixels.
    """

    def __init__(self, folder: Path, size: int) -> None:
        file = _existing(folder / "metadata.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if not isinstance(line.get("text"), str) or not isinstance(line.get("file_name"), str):
                raise ValueError(f'{file}, line {number}, needs "file_name" and "text", both strings.')
        names = [line["file_name"] for line in lines]
        self._files = [_existing(folder / name) for name in names]
        given = {"prompt": [line["text"] for line in lines]}
        super().__init__(str(folder), ids=names, columns=None, given=given, channels=3, size=size, corrupt="raise")

    def raw(self, row: int) -> bytes:
        """See `ImageDataset.raw`."""
        return self._files[row].read_bytes()


def captioned(folder: Path, base: Path, work: Path, size: int = 512) -> Data:
    """Latents and prompt embeddings of a folder of images with captions, every tenth held out.

    Args:
        folder: see `Captioned`.
        base: a Stable Diffusion in diffusers' layout, whose VAE and text encoder are used.
        work: where what they give is kept.
        size: see `Captioned`.
    """
    task = rs.DiffusionTask.from_pretrained(_folder(base))
    encoded = rs.encode(task, Captioned(folder, size), work / "encoded.zarr")
    items = [encoded[row] for row in range(len(encoded))]
    stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    every, held = Images(stacked.pop("latents"), given=stacked), np.arange(len(items)) % 10 == 9
    return Data(every.some(~held), every.some(held))


LOADERS: dict[str, Callable[[Any], Data]] = {
    "digits": digits,
    "cifar-10": cifar10,
    "cifar-mnist": cifar_mnist,
    "artbench-2": lambda folder: artbench(folder, ("post_impressionism", "ukiyo_e")),
    "artbench-10": artbench,
    "artbench-10-64": lambda folder: artbench(folder, size=64),
    "tiny-imagenet": tiny_imagenet,
}


class _Arrays(pickle.Unpickler):
    """Reads pickles of dicts and arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no batch of CIFAR does.")


def _cifar_batch(file: Path) -> tuple[Any, Any]:
    """Images uint8 `[n, 3, 32, 32]` and labels `[n]`."""
    with _existing(file).open("rb") as source:
        content = _Arrays(source, encoding="bytes").load()
    return content[b"data"].reshape(-1, 3, 32, 32), np.array(content[b"labels"])


def _idx(file: Path) -> Any:
    """An array of bytes in MNIST's IDX format, from the file or its .gz."""
    packed = file.with_name(file.name + ".gz")
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else _existing(file).read_bytes()
    zero, kind, axes = int.from_bytes(content[:2], "big"), content[2], content[3]
    shape = tuple(np.frombuffer(content, ">u4", axes, 4).tolist())
    if (zero, kind) != (0, 8) or len(content) != 4 + 4 * axes + int(np.prod(shape)):
        raise ValueError(f"{file} is no whole IDX file of bytes.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _pictures(folders: Sequence[Path], size: int) -> Images:
    """All images of the folders, in the order of their names, `[n, 3, size, size]`."""
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ValueError(f"there are no images in {', '.join(map(str, folders[:2])) or 'no folder'}.")
    images = np.empty((len(files), 3, size, size), np.uint8)
    for row, file in enumerate(files):
        with Image.open(file) as image:
            picture = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        images[row] = np.asarray(picture).transpose(2, 0, 1)
    return Images(_scaled(images))


def _scaled(images: Any) -> Tensor:
    return torch.from_numpy(images).float() / 127.5 - 1


def _existing(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; download and unpack the data set there.")
    return file


_folder = _existing
