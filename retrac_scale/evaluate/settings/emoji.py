"""Emoji by two designers, from the npm packages that hold them; nothing is downloaded here.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0

puts two tarballs into the working directory, which `load` reads. Pictures: Noto Emoji (Google, OFL 1.1 and Apache 2.0)
and Twemoji (CC-BY 4.0); the packages themselves: MIT, Cal Henderson.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DESIGNERS = ("google", "twitter")
VERSION = "16.0.0"
SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
HOW_TO_GET = (
    f"Get them with: npm pack emoji-datasource-google@{VERSION} emoji-datasource-twitter@{VERSION}, then give the "
    "folder of the two tarballs."
)
LEFT_OUT = ("Component", "Flags")
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


@dataclass(frozen=True, eq=False)
class Emoji:
    """Pictures uint8 `[n, size, size, 3]`, alpha over white, with designer, name and category of each, `[n]`."""

    pictures: Any
    designer: Any
    name: Any
    category: Any


def load(folder: Path, size: int, digests: Mapping[str, str] = SHA256) -> Emoji:
    """All emoji that both designers drew, without flags and skin tones: pairs of the same name stand together.

    Args:
        folder: holds the two tarballs, or is one of them, and the other lies beside it.
        size: to which the 64 x 64 pictures are brought, by averaging boxes of pixels; divides 64.
        digests: sha256 of each designer's tarball.

    Raises:
        FileNotFoundError: a tarball is missing; says how to get it.
        ValueError: a tarball is not the one that is known.
    """
    files = {designer: _tarball(folder, designer, digests[designer]) for designer in DESIGNERS}
    with tarfile.open(files[DESIGNERS[0]]) as archive:
        listed = json.loads(_member(archive, "emoji.json"))
    kept = [
        entry
        for entry in sorted(listed, key=lambda entry: str(entry["unified"]))
        if all(entry[f"has_img_{designer}"] for designer in DESIGNERS) and entry["category"] not in LEFT_OUT
    ]
    images = [entry["image"] for entry in kept]
    pictures = np.stack([_pictures(files[designer], designer, images, size) for designer in DESIGNERS], axis=1)
    repeated = {name: np.repeat([entry[name] for entry in kept], len(DESIGNERS)) for name in ("short_name", "category")}
    return Emoji(
        pictures.reshape(-1, size, size, 3),
        np.tile(DESIGNERS, len(kept)),
        repeated["short_name"],
        repeated["category"],
    )


def load_tones(folder: Path, size: int, digests: Mapping[str, str] = SHA256) -> Emoji:
    """Google's emoji of people in the default and in five skin tones: six of the same name stand together.

    Args:
        folder: see `load`.
        size: see `load`.
        digests: see `load`.

    Raises:
        FileNotFoundError: see `load`.
        ValueError: see `load`.
    """
    designer = DESIGNERS[0]
    file = _tarball(folder, designer, digests[designer])
    with tarfile.open(file) as archive:
        listed = json.loads(_member(archive, "emoji.json"))
    families = []
    for entry in sorted(listed, key=lambda entry: str(entry["unified"])):
        toned = [entry.get("skin_variations", {}).get(tone) for tone in TONES]
        if all(one is not None and one[f"has_img_{designer}"] for one in toned):
            families.append((entry, [entry["image"], *(one["image"] for one in toned)]))
    pictures = _pictures(file, designer, [image for _, images in families for image in images], size)
    every = np.repeat([(entry["short_name"], entry["category"]) for entry, _ in families], 1 + len(TONES), axis=0)
    return Emoji(pictures, np.full(len(pictures), designer), every[:, 0], every[:, 1])


def _pictures(file: Path, designer: str, images: Sequence[str], size: int) -> Any:
    """Those named, `[n, size, size, 3]`."""
    pictures = np.empty((len(images), size, size, 3), np.uint8)
    wanted = {f"package/img/{designer}/64/{image}": row for row, image in enumerate(images)}
    with tarfile.open(file) as archive:
        for member in archive:  # in the order of the file: random access unpacks it anew each time
            if member.name in wanted:
                content = archive.extractfile(member)
                assert content is not None
                pictures[wanted.pop(member.name)] = _picture(content.read(), size)
    if wanted:
        raise ValueError(f"{file} lists {len(wanted)} pictures that it does not hold, say {next(iter(wanted))}.")
    return pictures


def _tarball(folder: Path, designer: str, expected: str) -> Path:
    folder = folder.parent if folder.suffix == ".tgz" else folder
    file = folder / f"emoji-datasource-{designer}-{VERSION}.tgz"
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}; {HOW_TO_GET}")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{file} has sha256 {found}, expected {expected}; fetch it again.")
    return file


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    content = archive.extractfile(f"package/{name}")
    assert content is not None
    return content.read()


def _picture(content: bytes, size: int) -> Any:
    with Image.open(BytesIO(content)) as image:
        picture = image.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    # packages hold 64 x 64, a few of their pictures a pixel less
    return np.asarray(ground.convert("RGB").resize((size, size), Image.Resampling.BOX))
