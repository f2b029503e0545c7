"""Images that decoders and arrays give in their own ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from retrac_scale.datasets import Arrays, CorruptImageError, HuggingFace, ImageFiles

RAW = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
def test_what_a_decoder_says_in_a_runtime_error_is_of_a_corrupt_image(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = pytest.importorskip("datasets")

    def load(image: Image.Image) -> None:
        raise error("Failed to decode image: Truncated data")  # as AVIF's decoder says it, and DDS's

    for name in "ab":
        Image.fromarray(RAW[0]).save(tmp_path / f"{name}.png")
    files = hf.Dataset.from_dict({"image": [(tmp_path / "a.png").read_bytes()]}).cast_column("image", hf.Image())
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for dataset in (ImageFiles(tmp_path), HuggingFace(files)):
        with pytest.raises(CorruptImageError, match="cannot be read: Failed to decode image: Truncated data"):
            dataset[0]
    assert list(ImageFiles(tmp_path, corrupt="skip").skipped.values()) == ["Failed to decode image: Truncated data"] * 2


def test_an_error_that_is_no_decoders_is_not_taken_for_a_corrupt_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def opaque(*_: Any) -> Image.Image:
        raise RuntimeError("a bug")

    monkeypatch.setattr("retrac_scale.datasets.base.opaque", opaque)
    with pytest.raises(RuntimeError, match="a bug"):
        Arrays(RAW, corrupt="skip")


def test_arrays_turn_grey_or_to_colours_when_asked() -> None:
    grey: Any = Arrays(RAW, channels=1)[0]
    expected = np.asarray(Image.fromarray(RAW[0]).convert("L"), np.float32) / 127.5 - 1
    np.testing.assert_array_equal(grey.numpy(), expected[None])
    colours: Any = Arrays(RAW[..., 0], channels=3)[0]
    np.testing.assert_array_equal(colours.numpy(), [RAW[0, ..., 0].astype(np.float32) / 127.5 - 1] * 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.bfloat16])
def test_a_tensor_is_an_array(dtype: torch.dtype) -> None:
    images = torch.from_numpy(RAW).to(dtype)
    expected: Any = Arrays(RAW)[1] if dtype == torch.uint8 else images[1].float()
    found: Any = Arrays(images)[1]
    assert (found == expected).all()
    with pytest.raises(ValueError, match="the array has dtype int64; give uint8, or floats"):
        Arrays(images.long())
