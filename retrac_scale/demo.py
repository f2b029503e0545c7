"""The demo: train a small diffusion model on scanned digits, and ask what made it draw what it draws."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from retrac_scale.api.index import build_index
from retrac_scale.api.sketch import sketch
from retrac_scale.estimators import ReTrac, TracIn
from retrac_scale.estimators.self_influence import self_influence
from retrac_scale.evaluate import Altered, find_originals, largest_share, unique_fraction
from retrac_scale.measurement.repeatability import repeatability
from retrac_scale.projections import CountSketch, LowRank
from retrac_scale.report import Pictures, attribution_figure, norm_curve, write_report
from retrac_scale.sketching.calibration import torch_threads
from retrac_scale.store import SketchStore
from retrac_scale.task.diffusion import DiffusionTask
from retrac_scale.task.measures import Measure
from retrac_scale.task.timesteps import EvenlySpaced, draw_noise
from retrac_scale.training.recorded import Recorded
from retrac_scale.training.recorder import TrainingRecorder

# The paper's cosine schedule and evenly spaced checkpoints: a checkpoint's weight counts all steps since the one before
# it, so that with late checkpoints alone the first of them would decide everything.
EPOCHS = 21
KEPT_EPOCHS = (7, 14, 21)
BATCH = 64
LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
OUTLIERS = 36
GENERATED = 16
SAMPLING_STEPS = 100
QUERY_TIMESTEPS = 20
MEASURES: tuple[Measure, ...] = ("mse", "mean_squared_output")
TIMESTEPS, ENTRIES = 10, 512
"""Four timesteps show nines for a nine as well; with these most names in a list come again in another run."""
DIM = 4096
COMPILED_FOR = 64


@dataclass(frozen=True)
class Scans:
    """Images in -1 .. 1, `[n, 1, 8, 8]`; the last `OUTLIERS` are photograph patches, the others digits."""

    images: Tensor
    digits: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.images[row]

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """What each scan shows."""
        return {"shows": np.array([f"digit {digit}" for digit in self.digits] + ["photograph"] * OUTLIERS)}

    @property
    def is_outlier(self) -> npt.NDArray[np.bool_]:
        """Which samples are planted, `[n]`."""
        return np.arange(len(self)) >= len(self) - OUTLIERS


def load_scans() -> Scans:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, and patches of its two sample photographs."""
    from sklearn.datasets import load_digits, load_sample_images

    scanned = load_digits()
    digits = torch.from_numpy(scanned.images).float().unsqueeze(1) / 8 - 1
    rng = np.random.default_rng(0)
    photos = [photo.mean(2) for photo in load_sample_images().images]
    patches = []
    for number in range(OUTLIERS):
        photo = photos[number % 2]
        top, left = (int(rng.integers(0, size - 64)) for size in photo.shape)
        patch = torch.from_numpy(photo[top : top + 64, left : left + 64]).float()
        patches.append(F.avg_pool2d(patch[None], 8) / 127.5 - 1)
    return Scans(torch.cat([digits, torch.stack(patches)]), scanned.target)


def build_model() -> UNet2DModel:
    """A small U-Net for 8 x 8 grey images."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


@torch_threads(1)  # several, on a busy machine, wait for each other nearly all of the time
def train(model: UNet2DModel, scheduler: Any, scans: Scans, folder: Path) -> dict[str, Path]:
    """Train, keep the weights at `KEPT_EPOCHS`, and record every pair; continues from the newest kept epoch."""
    files = {f"epoch-{epoch:02d}": folder / "checkpoints" / f"epoch-{epoch:02d}.pt" for epoch in KEPT_EPOCHS}
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
    first = 1
    for name, file in files.items():
        if file.exists():
            state = torch.load(file, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = int(name.removeprefix("epoch-")) + 1
    recorder = TrainingRecorder(folder / "recorded", len(scans), scheduler)
    recorder.restart(f"epoch-{first - 1:02d}" if first > 1 else 0)
    n_batches = -(-len(scans) // BATCH)
    model.train()
    with tqdm(total=EPOCHS * len(scans), initial=(first - 1) * len(scans), unit="image", desc="train") as bar:
        for epoch in range(first, EPOCHS + 1):
            rng = np.random.default_rng(epoch)
            for number, ids in enumerate(np.array_split(rng.permutation(len(scans)), n_batches)):
                step = (epoch - 1) * n_batches + number
                rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / (EPOCHS * n_batches))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                steps = torch.from_numpy(rng.integers(0, scheduler.config.num_train_timesteps, len(ids)))
                noise = draw_noise(scans.images.shape[1:], ids, steps, step)
                noisy = scheduler.add_noise(scans.images[ids], noise, steps)
                loss = F.mse_loss(model(noisy, steps).sample, noise)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                recorder.step(ids, steps, step, rate)
                bar.update(len(ids))
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if epoch in KEPT_EPOCHS:
                name = f"epoch-{epoch:02d}"
                recorder.checkpoint(name)
                _save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, files[name])
    return files


@torch_threads(1)
def generate(model: UNet2DModel, scheduler: Any, file: Path) -> Tensor:
    """16 images from the trained model, `[16, 1, 8, 8]`, kept in `file`."""
    if not file.exists():
        # Ancestral sampling: DDIM leaves a common blemish on all images, and queries that share it share proponents.
        sampler = DDPMScheduler.from_config(scheduler.config)
        sampler.set_timesteps(SAMPLING_STEPS)
        random = torch.Generator().manual_seed(1)
        images = torch.randn(GENERATED, 1, 8, 8, generator=random)
        model.eval()
        with torch.no_grad():
            for step in tqdm(sampler.timesteps, unit="step", desc="generate"):
                images = sampler.step(model(images, step).sample, step, images, generator=random).prev_sample
        _save(images.clamp(-1, 1), file)
    loaded: Tensor = torch.load(file, weights_only=True)
    return loaded


def sketched_by_the_recipe(
    task: DiffusionTask, scans: Scans, generated: Tensor, checkpoints: dict[str, Path], folder: Path
) -> tuple[SketchStore, SketchStore]:
    """Scans and generated digits by the recommended recipe: common noise, loss and output, and no training record."""
    loss = sketch(
        task,
        scans,
        folder / "sketches.zarr",
        checkpoints=checkpoints,
        timesteps=EvenlySpaced(TIMESTEPS),
        projection=LowRank(dim=ENTRIES),
    )
    common = loss.under(*task.measures)
    return common, sketch(task, generated, folder / "queries.zarr", checkpoints=checkpoints, like=common)


def sketched_as_in_the_paper(
    task: DiffusionTask, scans: Scans, generated: Tensor, checkpoints: dict[str, Path], folder: Path
) -> tuple[SketchStore, SketchStore]:
    """Each scan at the timestep and noise that it was trained at before each checkpoint; the digits at many."""
    recorded = sketch(
        task,
        scans,
        folder / "recorded.zarr",
        checkpoints=checkpoints,
        timesteps=Recorded(folder / "recorded"),
        projection=CountSketch(DIM),
    )
    asked = sketch(
        task,
        generated,
        folder / "recorded-queries.zarr",
        checkpoints=checkpoints,
        timesteps=EvenlySpaced(QUERY_TIMESTEPS, noise="own"),
        like=recorded,
    )
    return recorded, asked


def compile_beforehand() -> None:
    """Sketch, index and ask about a few scans: what is compiled for that is kept on disk, where `run` will find it."""
    few, model = load_scans().images[:COMPILED_FOR], build_model()
    task = DiffusionTask(model, DDPMScheduler(num_train_timesteps=1000))
    for projection in (LowRank(dim=ENTRIES), CountSketch(DIM)):
        store = sketch(
            task,
            few,
            None,
            checkpoints={"untrained": model.state_dict()},
            timesteps=EvenlySpaced(4),
            projection=projection,
            progress=False,
        )
        build_index(store).query(store, k=10)


def run(out: str | os.PathLike[str]) -> None:
    """Run the whole street into a folder and print where things are; a second run computes only what is missing."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scans = load_scans()
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    model = build_model()
    checkpoints = train(model, scheduler, scans, folder)
    generated = generate(model, scheduler, folder / "generated.pt")
    model.save_pretrained(folder / "model" / "unet")
    scheduler.save_pretrained(folder / "model" / "scheduler")
    task = DiffusionTask(model, scheduler, measure=MEASURES)
    last = dict([list(checkpoints.items())[-1]])
    common, asked = sketched_by_the_recipe(task, scans, generated, last, folder)
    recorded, asked_of_paper = sketched_as_in_the_paper(task.only("mse"), scans, generated, checkpoints, folder)
    indexes = {
        "ReTracRidge": build_index(common, out=folder / "retracridge.zarr"),
        "ReTrac": build_index(recorded, ReTrac(), folder / "retrac.zarr"),
        "TracIn": build_index(recorded, TracIn(), folder / "tracin.zarr"),
    }
    queries = {"ReTracRidge": asked, "ReTrac": asked_of_paper, "TracIn": asked_of_paper}
    answers = {name: index.query(queries[name], k=10) for name, index in indexes.items()}
    altered = sketch(
        task, Altered(scans), folder / "check.zarr", checkpoints=last, like=common, progress="altered scans"
    )
    originals = {"ReTracRidge": find_originals(indexes["ReTracRidge"], altered)}
    again = {
        "ReTracRidge": repeatability(indexes["ReTracRidge"], asked),
        "ReTrac": repeatability(recorded, asked_of_paper, ReTrac()),
        "TracIn": repeatability(recorded, asked_of_paper, TracIn()),
    }
    np.save(folder / "images.npy", _grey(scans.images))
    np.save(folder / "generated.npy", _grey(generated))
    pictures = Pictures(_grey(scans.images), common.ids, _grey(generated))
    curve = norm_curve(recorded)
    report = write_report(
        folder / "report.html",
        {name: index.query(queries[name], k=10, side="both") for name, index in indexes.items()},
        pictures,
        title="Which scans made the model draw these digits?",
        curve=curve,
        indexes=indexes,
        queries=queries,
        repeatability=again,
        check=originals,
    )
    captions = {name: f"two halves agree on {10 * found.halves.value:.1f} of 10" for name, found in again.items()}
    attribution_figure(answers, pictures, curve, captions).savefig(folder / "report.png", dpi=110)
    _print_findings(scans, recorded, answers, again, curve)
    print(f"training scans as queries, {originals['ReTracRidge']}")
    print(f"\nstores   {folder / 'sketches.zarr'}  {folder / 'recorded.zarr'}")
    print(f"queries  {folder / 'queries.zarr'}  {folder / 'recorded-queries.zarr'}")
    print(f"indexes  {'  '.join(str(index.url) for index in indexes.values())}")
    print(f"report   {report}\npicture  {folder / 'report.png'}")
    print(
        f"live     retrac-scale serve {folder / 'retracridge.zarr'} --queries {folder / 'queries.zarr'} "
        f"--images {folder / 'images.npy'} --query-images {folder / 'generated.npy'} --model {folder / 'model'} "
        f"--checkpoint epoch-{EPOCHS}={folder / 'model' / 'unet'}"
    )


def _print_findings(scans: Scans, recorded: SketchStore, answers: Any, again: Any, curve: Any) -> None:
    centres, mean, _ = curve
    print(
        f"\nmean gradient norm: {mean[0]:.2f} at t = {centres[0]:.0f}, {mean[len(mean) // 2]:.2f} at t = "
        f"{centres[len(mean) // 2]:.0f}"
    )
    for name, answer in answers.items():
        print(
            f"{name}: two halves of its measurements share {10 * again[name].halves.value:.1f} of the top 10, unique "
            f"fraction {unique_fraction(answer.ids):.3f}, the most frequent scan stands in "
            f"{largest_share(answer.ids):.0%} of the lists"
        )
    print(
        "TracIn and ReTrac follow the training as it was, where each scan met another noise at another timestep: most\n"
        "of a score is the luck of these draws, and under TracIn scans that met a timestep with long gradients come\n"
        "up in query after query. ReTracRidge shows scans and query the same noise at the same timesteps, so that\n"
        "only the pictures differ."
    )
    top = np.argsort(-self_influence(recorded, TracIn()))[:OUTLIERS]
    print(f"planted outliers among the {OUTLIERS} largest TracIn self-influences: {scans.is_outlier[top].sum()}")


def _grey(images: Tensor) -> npt.NDArray[np.uint8]:
    grey: npt.NDArray[np.uint8] = ((images[:, 0] + 1) * 127.5).clamp(0, 255).round().byte().numpy()
    return grey


def _save(value: Any, file: Path) -> None:
    partial = file.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, file)
