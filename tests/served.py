"""A small street from images to a served library: a tiny model, 24 images, two stores of them, hostile columns."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from diffusers import DDPMScheduler

import retrac_scale as rs
from retrac_scale.report import Pictures
from retrac_scale.serve.asked import Asked, Sketches
from retrac_scale.serve.library import Library
from retrac_scale.serve.uploads import Upload
from tests.conftest import Labelled, tiny_dit, tiny_unet
from tests.task.test_pipelines import stable_diffusion

HOSTILE = "</script><img src=x onerror=alert(1)>"
SAMPLES, QUERIES = 24, 4
COPIED, COPIES = 3, (12, 17)


class Scans:
    """Random grey 8 x 8 images with columns, and more of them where they are given."""

    def __init__(self, n: int, seed: int, more: Mapping[str, Any] | None = None) -> None:
        self.pixels = np.random.default_rng(seed).integers(0, 255, (n, 8, 8), dtype=np.uint8)
        self.more = dict(more or {})

    @property
    def columns(self) -> dict[str, Any]:
        artists = np.array([HOSTILE, "Anna", "Bela", "Anna"] * (len(self) // 4))
        return {"artist": artists, "year": 1990 + np.arange(len(self)), **self.more}

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.pixels[row].astype(np.float32))[None] / 127.5 - 1


def build(folder: Path, more: Mapping[str, Any] | None = None) -> Library:
    """Sketch, index, and open what `retrac-scale serve` would; with more columns of the samples."""
    model, scans, made = tiny_unet(), Scans(SAMPLES, 0, more), Scans(QUERIES, 1)
    for copy in COPIES:
        scans.pixels[copy] = scans.pixels[COPIED]
    task = rs.DiffusionTask(model, DDPMScheduler(num_train_timesteps=100))
    weights = {"final": model.state_dict()}
    common: dict[str, Any] = {"checkpoints": weights, "progress": False, "batch_size": 16}
    indexes, queries = {}, {}
    for noise, place in (("own", ""), ("common", "c")):
        plan = rs.EvenlySpaced(2 if noise == "own" else 4, noise=noise)  # type: ignore[arg-type]
        target = folder / f"s{place}.zarr"
        store = rs.sketch(task, scans, target, projection=rs.CountSketch(128), timesteps=plan, **common)
        asked = rs.sketch(task, made, folder / f"q{place}.zarr", like=store, **common)
        for one in (rs.TracIn(), rs.ReTrac()) if noise == "own" else (rs.ReTracRidge(),):
            name = type(one).__name__
            indexes[name], queries[name] = rs.build_index(store, one, folder / f"{name}.zarr"), asked
    pictures = Pictures(scans.pixels, store.ids, made.pixels)
    return Library(indexes, pictures, queries=queries, measured=rs.Samples((), task, weights))


def of_classes(folder: Path) -> Library:
    """The same of a model that is told classes, with training samples and uploads to ask about."""
    scans, model = Scans(SAMPLES, 0), tiny_dit()
    told = Labelled(torch.stack([scans[row] for row in range(SAMPLES)]))
    task, weights = rs.DiffusionTask(model, DDPMScheduler(num_train_timesteps=100)), {"final": model.state_dict()}
    options: dict[str, Any] = {"projection": rs.CountSketch(128), "timesteps": rs.EvenlySpaced(2), "progress": False}
    store = rs.sketch(task, told, folder / "told.zarr", checkpoints=weights, **options)
    index = rs.build_index(store, None, folder / "ReTracRidge-told.zarr")
    return Library(
        {"ReTracRidge": index}, Pictures(scans.pixels, store.ids, []), measured=rs.Samples((), task, weights)
    )


def of_prompts(folder: Path) -> Library:
    """The same of a pipeline with a VAE and a text encoder: pictures of 16 x 16 in colour."""
    torch.manual_seed(0)
    stable_diffusion(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    told = [(torch.from_numpy(one.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1, "a cat") for one in pixels]
    task, weights = rs.DiffusionTask.from_pretrained(folder / "model"), {"final": str(folder / "model" / "unet")}
    options: dict[str, Any] = {"projection": rs.CountSketch(128), "timesteps": rs.EvenlySpaced(2), "progress": False}
    store = rs.sketch(task, told, folder / "told.zarr", checkpoints=weights, **options)
    index = rs.build_index(store, None, folder / "ReTracRidge-told.zarr")
    return Library({"ReTracRidge": index}, Pictures(pixels, store.ids, []), measured=rs.Samples((), task, weights))


def uploaded(library: Library, upload: Upload) -> Asked:
    """How an upload is asked about, all of it sketched."""
    pieces, asked = list[Sketches](), None
    while asked is None:
        asked = library.upload(upload, pieces)
    return asked


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of an application that a real server serves meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
