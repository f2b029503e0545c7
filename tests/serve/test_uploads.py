"""An uploaded picture is brought to the model as the training images were."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from retrac_scale.datasets.base import pixels
from retrac_scale.serve import Limits
from retrac_scale.serve.uploads import read_upload


@pytest.mark.parametrize("background", ["", "white"])
def test_a_transparent_upload_stands_upright_as_training_images_do(background: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by 90 degrees
    content = io.BytesIO()
    raw = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(raw).save(content, "PNG", exif=turned)
    upload = read_upload(content.getvalue(), (3, 8, 8), Limits(), background)
    expected = pixels(content.getvalue(), 3, 8, background).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(upload.pixels / 127.5 - 1, expected, atol=1e-6)
