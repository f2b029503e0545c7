"""What the readers of the documentation have by the time that they run a block, all of it small."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import retrac_scale as rs
from tests.pages import Before, Names
from tests.task.test_pipelines import captioned, pixels, stable_diffusion

SAMPLES, ASKED = 24, 3


def unet() -> Any:
    """A model in diffusers' layout for images of 8 x 8 in colour."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )


def pictures(n: int, seed: int) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((n, 3, 8, 8), dtype=np.float32)
    return torch.from_numpy(values).tanh()


def folders_of_images(names: Names) -> None:
    """PNG files in two folders, and a model: what the README asks for."""
    rng = np.random.default_rng(0)
    for folder, count in (("training-images", 500), ("generated-images", 2)):
        Path(folder).mkdir()
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(f"{folder}/{number}.png")
    unet().save_pretrained("model/unet")
    DDPMScheduler().save_pretrained("model/scheduler")


def a_model(names: Names) -> None:
    """A model with its scheduler, a training set and images that it made."""
    model, scheduler = unet(), DDPMScheduler(num_train_timesteps=100)
    model.save_pretrained("model/unet")
    training, asked = pictures(SAMPLES, 0), pictures(ASKED, 1)
    names |= {
        "rs": rs,
        "np": np,
        "torch": torch,
        "model": model,
        "scheduler": scheduler,
        "task": rs.DiffusionTask(model, scheduler),
        "checkpoints": {"final": "model/unet"},
        "timesteps": rs.EvenlySpaced(2),
        "training_images": training,
        "generated_images": asked,
    }


def a_store(names: Names) -> None:
    """A training set and some queries, sketched."""
    a_model(names)
    options = {"checkpoints": names["checkpoints"], "progress": False}
    store = rs.sketch(names["task"], names["training_images"], "sketches.zarr", **options)
    names["store"] = store
    names["queries"] = rs.sketch(names["task"], names["generated_images"], None, like=store, **options)


def a_store_of_artists(names: Names) -> None:
    """The same, and whose pictures they are."""
    a_store(names)
    names["artists"] = np.array(["Anna", "Bela"] * (SAMPLES // 2))


def an_index(names: Names) -> None:
    a_store(names)
    names["index"] = rs.build_index(names["store"], out="index.zarr")


def a_training_loop(names: Names) -> None:
    """One step's worth of it."""
    if "model" not in names:
        a_model(names)
    ids = torch.arange(4)
    images = pictures(SAMPLES, 0)
    names |= {
        "scheduler": DDPMScheduler(num_train_timesteps=100),
        "dataset": images,
        "images": images,
        "loader": [(ids, images[ids])],
        "optimizer": torch.optim.AdamW(names["model"].parameters(), lr=1e-3),
        "ids": ids,
        "timesteps": torch.tensor([3, 50, 70, 99]),
        "step": 0,
        "lr": 1e-3,
    }


def adapters(names: Names) -> None:
    """A pipeline in a folder, checkpoints of a run that trained adapters of it, and images with captions."""
    Path("adapting").mkdir()
    os.chdir("adapting")
    torch.manual_seed(0)
    stable_diffusion(Path("model"))
    for step in (250, 500):
        denoiser = UNet2DConditionModel.from_pretrained("model/unet")
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        get_peft_model(denoiser, config).save_pretrained(f"run/checkpoint-{step}")
    names["dataset"] = captioned(pixels(3, 16, 16))


def captions(names: Names) -> None:
    """A latent pipeline, a file of adapters, and a folder of images with captions."""
    folders_of_images(names)
    torch.manual_seed(0)
    stable_diffusion(Path("sd"))
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted = get_peft_model(UNet2DConditionModel.from_pretrained("sd/unet"), config)
    save_file(get_peft_model_state_dict(adapted), "lora.safetensors")
    files = sorted(Path("training-images").iterdir())
    for file in files[SAMPLES:]:
        file.unlink()
    rows = [json.dumps({"file_name": file.name, "text": "a cat"}) for file in files[:SAMPLES]]
    Path("training-images/metadata.jsonl").write_text("\n".join(rows))


def retraining(names: Names) -> None:
    """What "trains" on a subset, and the losses of the queries under the outcome: here made up."""
    an_index(names)
    names |= {
        "evaluate": rs.evaluate,
        "n": SAMPLES,
        "ids": names["store"].ids,
        "client": None,
        "train": lambda ids, seed: np.random.default_rng([seed, *ids]),
        "measure": lambda model: model.standard_normal(ASKED),
    }


def subsets(names: Names) -> None:
    """Losses under retrained models, and scores to be judged by them: here made up."""
    rng = np.random.default_rng(0)
    members = rs.evaluate.random_subsets(SAMPLES, 16)
    names |= {"np": np, "n": SAMPLES, "members": members, "losses": rng.standard_normal((16, 64))}
    names["scores"] = rng.standard_normal((64, SAMPLES))


def likeness(names: Names) -> None:
    names["my_method"] = lambda model, images, asked: asked.flatten(1) @ images.flatten(1).T


def a_journey(names: Names) -> None:
    names["noise"] = torch.randn(ASKED, 3, 8, 8)


def a_network(names: Names) -> None:
    class PackedTransformer(nn.Module):
        pass

    model, example = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    names |= {"rs": rs, "torch": torch, "nn": nn, "model": model, "example": example}
    names["PackedTransformer"] = PackedTransformer


BEFORE: Mapping[str, Mapping[int, Before]] = {
    "README.md": {0: folders_of_images, 1: a_training_loop, 2: adapters},
    "docs/cluster.md": {0: a_store},
    "docs/evaluation.md": {0: retraining},
    "docs/index.md": {0: a_model},
    "docs/latents.md": {0: captions},
    "docs/methods.md": {0: a_model, 1: a_journey},
    "docs/querying.md": {0: a_store_of_artists},
    "docs/training.md": {0: a_training_loop, 1: a_training_loop},
    "docs/trust.md": {0: an_index},
    "docs/writing-a-rule.md": {0: a_network},
    "docs/yardstick.md": {0: likeness, 1: subsets},
}
"""Page -> number of a block -> what its reader has."""

INSTEAD: Mapping[str, Mapping[str, str]] = {
    # starting eight processes takes twenty seconds, and there is no bucket; tests/runtime has both
    "docs/cluster.md": {
        "n_workers=8, threads_per_worker=1": "n_workers=1, processes=False, dashboard_address=':0'",
        "s3://bucket/": "bucket/",
    },
    # the tiny model's images
    "docs/latents.md": {"size=512": "size=16"},
    # fifty steps take ten seconds; fewer take the same way
    "docs/methods.md": {"steps=50": "steps=4"},
    # which is trained in minutes when it is first asked for
    "docs/yardstick.md": {"setting.model, ": "None, "},
}
"""Page -> what is printed there -> what is run in its place, and why."""
