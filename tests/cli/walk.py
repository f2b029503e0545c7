"""What a newcomer has: pictures in folders, some transparent, and a small model as diffusers' example leaves it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image, ImageDraw
from torch.nn import functional as F

from retrac_scale.datasets import ImageFiles

SIZE, STEPS, KEPT = 16, 160, (80, 160)
COLOURS = ("red", "orange", "gold", "green", "teal", "navy", "purple", "pink", "brown", "grey")
SHAPES = ("circle", "square", "triangle", "cross")


def draw(shape: str, colour: str, *, transparent: bool = False) -> Image.Image:
    """A picture of one shape on white, or on nothing."""
    picture = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0) if transparent else "white")
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((2, 2, 13, 13), fill=colour)
    elif shape == "square":
        pen.rectangle((3, 3, 12, 12), fill=colour)
    elif shape == "triangle":
        pen.polygon(((8, 1), (14, 13), (1, 13)), fill=colour)
    else:
        pen.rectangle((6, 1, 9, 14), fill=colour)
        pen.rectangle((1, 6, 14, 9), fill=colour)
    return picture if transparent else picture.convert("RGB")


def draw_all(folder: Path) -> None:
    """40 pictures to train on, the circles without a ground, and three to ask about."""
    for shape in SHAPES:
        place = folder / "training-images" / shape
        place.mkdir(parents=True)
        for colour in COLOURS:
            draw(shape, colour, transparent=shape == "circle").save(place / f"{colour}.png")
    (folder / "generated-images").mkdir()
    for shape, colour in (("circle", "crimson"), ("square", "darkgreen"), ("cross", "slateblue")):
        draw(shape, colour).save(folder / "generated-images" / f"{shape}.png")


def train(folder: Path) -> None:
    """A run of a few seconds, with checkpoints of its weights and of their averages, and the pipeline beside them."""
    torch.manual_seed(0)
    images = ImageFiles([folder / "training-images"])
    images.background = "white"
    pictures = torch.stack([images[row] for row in range(len(images))])  # type: ignore[misc]
    model = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    averaged = UNet2DModel.from_config(model.config)
    averaged.load_state_dict(model.state_dict())
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, STEPS + 1):
        clean = pictures[torch.randint(len(pictures), (16,))]
        noise, steps = torch.randn_like(clean), torch.randint(1000, (len(clean),))
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, steps), steps).sample, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(value.data, 0.05)
        if step in KEPT:
            model.save_pretrained(folder / "run" / f"checkpoint-{step}" / "unet")
            averaged.save_pretrained(folder / "run" / f"checkpoint-{step}" / "unet_ema")
    averaged.save_pretrained(folder / "run" / "unet")
    scheduler.save_pretrained(folder / "run" / "scheduler")
