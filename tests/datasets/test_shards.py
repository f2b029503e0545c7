"""Tar shards: whole or refused, and every file in them found."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrac_scale.datasets import TarShards
from retrac_scale.datasets.base import pixels

RAW = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)


def encoded(row: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.fromarray(RAW[row]).save(content, kind)
    return content.getvalue()


def packed(place: Path, files: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    with tarfile.open(place, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return place


def end_of(shard: Path) -> int:
    with tarfile.open(shard) as tar:
        tar.getmembers()
        return tar.offset


def test_a_shard_that_is_cut_or_damaged_is_never_shorter(tmp_path: Path) -> None:
    shard = packed(tmp_path / "0.tar", {f"{row}.png": encoded(row % 2) for row in range(3)})
    whole, end = shard.read_bytes(), end_of(shard)
    with tarfile.open(shard) as tar:
        _, second, last = (member.offset for member in tar.getmembers())
    damaged = whole[:last] + b"\1" * 100 + whole[last + 100 :]
    emptied = whole[:second] + bytes(last - second) + whole[last:]
    cut = [whole[:stop] for stop in (last, last + 100, end, end + 512)]
    for content in (*cut, damaged, emptied, whole + whole):
        shard.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"0\.tar is cut or damaged at byte \d+, where there is neither a file nor"
        ):
            TarShards(shard)
    shard.write_bytes(whole[: end - 512])
    with pytest.raises(ValueError, match=r"0\.tar is no whole uncompressed tar file: unexpected end of data"):
        TarShards(shard)
    for content in (whole, whole[: end + 1024]):
        shard.write_bytes(content)
        assert len(TarShards(shard)) == 3


def test_a_hard_link_is_the_file_that_it_stands_for(tmp_path: Path) -> None:
    files = {"x/a.png": encoded(0), "x/b.png": encoded(1)}
    shard = packed(tmp_path / "0.tar", files, {"x/c.png": (tarfile.LNKTYPE, "x/b.png")})
    dataset = TarShards(shard)
    assert dataset.ids.tolist() == ["x/a", "x/b", "x/c"]
    assert (dataset.read(2) == dataset.read(1)).all()
    for kind, target in ((tarfile.LNKTYPE, "x/d.png"), (tarfile.SYMTYPE, "b.png")):
        shard = packed(tmp_path / "0.tar", files, {"x/c.png": (kind, target)})
        with pytest.raises(ValueError, match=rf"0\.tar holds x/c\.png as a link to {target}; pack the file itself"):
            TarShards(shard)


@pytest.mark.parametrize(
    ("names", "asked", "taken"),
    [
        (("left.png", "right.png"), "right.png", 1),
        (("png", "jpg"), "PNG", 0),
        (("webp", "png"), ".png", 1),
        (("ppm",), None, 0),
        (("mask.png", "png"), None, 1),
        (("left.png",), None, 0),
    ],
)
def test_the_image_of_a_sample_is_found_by_its_extension(
    names: tuple[str, ...], asked: str | None, taken: int, tmp_path: Path
) -> None:
    shard = packed(tmp_path / "0.tar", {f"a.{name}": encoded(row) for row, name in enumerate(names)})
    assert (TarShards(shard, image=asked).read(0) == pixels(encoded(taken), 3, None)).all()


def test_of_several_images_of_a_sample_one_is_said(tmp_path: Path) -> None:
    shard = packed(tmp_path / "0.tar", {"a.left.png": encoded(0), "a.right.png": encoded(1)})
    with pytest.raises(ValueError, match=r"'a' of .* has images left\.png, right\.png; say which, image="):
        TarShards(shard)
    with pytest.raises(ValueError, match=r"'a' of .* has no image \.png, only \['left\.png', 'right\.png'\]"):
        TarShards(shard, image="png")


@pytest.mark.parametrize(
    ("extension", "content", "origin", "message"),
    [
        ("cls", b"cat", "cls", "file .cls of sample 'a' cannot be read: invalid literal for int"),
        ("txt", b"\xff\xfe", "txt", "file .txt of sample 'a' cannot be read: 'utf-8' codec"),
        ("json", b"{", "json.x", "file .json of sample 'a' cannot be read: Expecting"),
        ("json", b"5", "json.x", "JSON file of sample 'a' has no entry 'x', only 5"),
    ],
)
def test_a_field_that_cannot_be_read_is_named_with_its_sample(
    extension: str, content: bytes, origin: str, message: str, tmp_path: Path
) -> None:
    shard: Any = packed(tmp_path / "0.tar", {"a.png": encoded(0), f"a.{extension}": content})
    with pytest.raises(ValueError, match=re.escape(message)):
        TarShards(shard, columns={"x": origin})
