"""What it costs to tell items by their content: python -m benchmarks.item_digests [--files 128]

U-small is sketched from PNG files, and from a tensor in memory, at the four timesteps of the default; the processor's
time is counted, in all and in the digests. Every item is read twice, to be checked and to be sketched.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

import retrac_scale as rs
from benchmarks.models import build
from retrac_scale.datasets import ImageFiles
from retrac_scale.sketching import content


def main(files: int) -> None:
    """Sketch both ways, and print the share of the words."""
    model = build("u-small")
    config: Any = model.config
    channels, size = int(config.in_channels), int(config.sample_size)
    task = rs.DiffusionTask(model, DDPMScheduler())
    pixels = np.random.default_rng(0).integers(0, 256, (files, size, size, channels), dtype=np.uint8)
    spent = Counted()
    for name in ("content_of", "digest_of"):
        setattr(content, name, spent.counted(getattr(content, name)))
    with tempfile.TemporaryDirectory() as folder:
        for row, one in enumerate(pixels):
            Image.fromarray(one.squeeze()).save(Path(folder, f"{row:05d}.png"))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        for name, dataset in (("PNG files", ImageFiles(folder, channels)), ("a tensor", images)):
            spent.seconds, spent.calls = 0.0, 0
            started = time.process_time()
            store = rs.sketch(task, dataset, None, checkpoints={"a": model.state_dict()}, batch_size=64, progress=False)
            took = time.process_time() - started
            print(
                f"{name}: {files} images of {channels} x {size} x {size}, {store.shape[1]} timesteps: {took:.2f} s, of "
                f"which {spent.seconds:.4f} s ({spent.seconds / took:.3%}) in {spent.calls} digests of "
                f"{1e6 * spent.seconds / spent.calls:.0f} us; {8 * content.CONTENT_WORDS} of "
                f"{store.shape[1] * (store.shape[2] + 20) + 8 * content.CONTENT_WORDS} bytes of a row"
            )


class Counted:
    """The processor's time in some functions that call each other, and how many calls from outside there were."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._inside = 0.0, 0, False

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        def call(*arguments: Any) -> Any:
            if self._inside:
                return function(*arguments)
            self._inside, started = True, time.process_time()
            found = function(*arguments)
            self.seconds, self.calls, self._inside = self.seconds + time.process_time() - started, self.calls + 1, False
            return found

        return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=128)
    main(parser.parse_args().files)
