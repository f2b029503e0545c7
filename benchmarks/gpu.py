"""One visit to a GPU: first whether everything is right there, then how fast. Under eight minutes, one JSON file.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --dry-run        # the same way on the CPU, with smaller models

Tests come first, and each says what it found: rules against autograd in float64, sketches of the GPU against the CPU's,
a store begun on one device and ended on the other. Times are medians over rounds in which contenders take turns; a
ratio is the training step's time by the contender's. A part that fails is named in the file, and the next one runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

import retrac_scale as rs
from benchmarks.models import build
from tests.architectures import ARCHITECTURES, largest_error
from tests.architectures import build as build_tiny

SECONDS = 480
"""After which no new part begins."""
TINY = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "AutoencoderKL",
)
PROJECTIONS = {"LowRank": rs.LowRank(), "CountSketch": rs.CountSketch(4096), "Dense": rs.Dense(512)}


@dataclass(frozen=True)
class Place:
    """Where it runs: the device, and whether models are small because it is a rehearsal."""

    device: str
    rehearsal: bool

    @property
    def rounds(self) -> int:
        """In which contenders take turns."""
        return 1 if self.rehearsal else 5

    @property
    def dense_entries(self) -> int:
        """Parameters up to which a dense matrix is made."""
        return 10**4 if self.rehearsal else 10**7

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> float:
        """GiB of device memory since the last call; 0 on the CPU."""
        if self.device != "cuda":
            return 0.0
        found = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return found


def rules(place: Place) -> dict[str, float]:
    """Largest relative error of sketches and norms against autograd in float64, of tiny models of every rule."""
    with torch.device(place.device):
        return {
            name: largest_error(build_tiny(name, ARCHITECTURES[name]), ARCHITECTURES[name])
            for name in TINY
            if name in ARCHITECTURES
        }


def same_sketches(place: Place) -> dict[str, float]:
    """Relative difference of sketches made on the device from those made on the CPU, by projection."""
    found = {}
    for name, projection in PROJECTIONS.items():
        if name == "Dense":
            continue  # drawn on the device: another matrix, as its store's fingerprint says
        model = build("u-small")
        rows = [torch.randn(4, 1, 16, 16), torch.tensor([10, 200, 500, 900])]
        here, there = (_sketched(copy.deepcopy(model).to(d), projection, rows, d) for d in ("cpu", place.device))
        found[name] = float((here - there).norm() / here.norm())
    return found


def _sketched(model: nn.Module, projection: Any, rows: list[Tensor], device: str) -> Tensor:
    with rs.GradientSketcher(model, projection) as sketcher:
        sketches, _ = sketcher(model(*(row.to(device) for row in rows)).sample.square().flatten(1).mean(1))
    return sketches.cpu()


def resumed(place: Place) -> dict[str, float]:
    """A store that was begun on the CPU and grown on the device: what differs from one made on the CPU alone."""
    images = torch.rand(24, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = build("u-small")
    weights = {"last": copy.deepcopy(model.state_dict())}
    with tempfile.TemporaryDirectory() as folder:
        for first, second, out in (("cpu", "cpu", "one"), ("cpu", place.device, "two")):
            for device, count in ((first, 12), (second, 24)):
                task = rs.DiffusionTask(copy.deepcopy(model), DDPMScheduler(), device=device)
                rs.sketch(task, images[:count], Path(folder, out), checkpoints=weights, grow=count > 12, progress=False)
        one, two = (rs.open_store(Path(folder, out)).sketches("last") for out in ("one", "two"))
        index = rs.build_index(rs.open_store(Path(folder, "two")))
        answers = index.query(rs.take(rs.open_store(Path(folder, "one")), [0, 13]), k=3)
    itself = float((answers.ids[:, 0] == [0, 13]).mean())
    return {"difference": float(np.linalg.norm(one - two) / np.linalg.norm(one)), "finds itself": itself}


def models(place: Place) -> Iterator[tuple[str, nn.Module, int, dict[str, Any]]]:
    """Name, model, batch, and what a forward pass takes."""
    small = place.rehearsal
    unet: nn.Module = build("u-small" if small else "u-cifar")
    config: Any = unet.config
    n = 4 if small else 64
    image = (n, config.in_channels, config.sample_size, config.sample_size)
    yield "U-cifar", unet, n, {"sample": torch.randn(image), "timestep": torch.randint(0, 1000, (n,))}
    n = 2 if small else 32
    layers = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8} if small else {}
    dit = DiTTransformer2DModel(
        **{"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, **layers},
        in_channels=4,
        out_channels=4,
        sample_size=32 if not small else 8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    size = 8 if small else 32
    labels = {"class_labels": torch.randint(0, 1000, (n,)), "timestep": torch.randint(0, 1000, (n,))}
    yield "DiT-B/2", dit, n, {"hidden_states": torch.randn(n, 4, size, size), **labels}
    n = 2 if small else 8
    width = {"block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 8} if small else {}
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    shape = {"down_block_types": blocks[0], "up_block_types": blocks[1], "layers_per_block": 1} if small else {}
    text = 32 if small else 768
    diffusion = UNet2DConditionModel(**{"cross_attention_dim": 768, "sample_size": 64, **width, **shape})
    diffusion.requires_grad_(False)
    diffusion.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    size = 16 if small else 64
    yield (
        "Stable Diffusion, LoRA",
        diffusion,
        n,
        {
            "sample": torch.randn(n, 4, size, size),
            "timestep": torch.randint(0, 1000, (n,)),
            "encoder_hidden_states": torch.randn(n, 77, text),
        },
    )


PRECISIONS = ("fp32", "tf32", "bf16")


def speeds(place: Place, name: str, model: nn.Module, n: int, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs per second and peak memory of the training step and of each projection, in each precision."""
    torch.manual_seed(0)
    model = model.to(place.device).eval()
    given = {key: value.to(place.device) for key, value in given.items()}
    rows = []
    for precision in PRECISIONS:
        if precision == "tf32" and place.device != "cuda":
            continue
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        steps = dict(_steps(place, model, given, precision == "bf16"))
        for step in steps.values():
            step()
        peaks, seconds = dict.fromkeys(steps, 0.0), {key: list[float]() for key in steps}
        for number in range(place.rounds):
            for key in random.Random(number).sample(list(steps), len(steps)):
                place.wait()
                place.peak()
                start = time.perf_counter()
                steps[key]()
                place.wait()
                seconds[key].append(time.perf_counter() - start)
                peaks[key] = max(peaks[key], place.peak())
        floor = seconds["training step"]
        rows += [
            {
                "model": name,
                "precision": precision,
                "contender": key,
                "pairs per second": n / statistics.median(took),
                "of the step": statistics.median(a / b for a, b in zip(floor, took, strict=True)),
                "peak GiB": peaks[key],
            }
            for key, took in seconds.items()
        ]
    return rows


def _steps(
    place: Place, model: nn.Module, given: dict[str, Any], bf16: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    def losses() -> Tensor:
        with torch.autocast(place.device, dtype=torch.bfloat16, enabled=bf16):
            out: Tensor = model(**given, return_dict=False)[0].float()
        return out.square().flatten(1).mean(1)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(losses().sum())

    yield "training step", train
    for name, projection in PROJECTIONS.items():
        if name == "Dense" and sum(p.numel() for p in model.parameters() if p.requires_grad) > place.dense_entries:
            continue  # its matrix has dim times as many
        sketcher = rs.GradientSketcher(model, projection)

        def sketch(sketcher: Any = sketcher) -> None:
            with sketcher:
                sketcher(losses())

        yield name, sketch


def machine(place: Place) -> dict[str, Any]:
    """What it ran on."""
    card = torch.cuda.get_device_name() if place.device == "cuda" else platform.machine()
    return {"device": card, "torch": torch.__version__, "cuda": torch.version.cuda, "rehearsal": place.rehearsal}


def main() -> None:
    """Run all parts and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the file of figures (default: gpu.json)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small models")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --dry-run goes the same way on the CPU.")
    place = Place("cpu" if arguments.dry_run else "cuda", arguments.dry_run)
    found: dict[str, Any] = {"machine": machine(place), "failed": {}}
    begun = time.monotonic()

    def part(name: str, work: Callable[[], Any]) -> None:
        if time.monotonic() - begun > SECONDS:
            found["failed"][name] = f"not begun: {SECONDS} s were over"
            return
        try:
            found[name] = work()
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        except Exception:
            found["failed"][name] = traceback.format_exc()
            print(f"{name} failed:\n{found['failed'][name]}", flush=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")  # after each part: a visit may be cut short

    part("rules against autograd", lambda: rules(place))
    part("sketches against the CPU's", lambda: same_sketches(place))
    part("a store resumed on the device", lambda: resumed(place))
    for name, model, n, given in models(place):
        part(f"speed of {name}", lambda: speeds(place, name, model, n, given))  # noqa: B023  (called at once)
    print(f"{time.monotonic() - begun:.0f} s; {len(found['failed'])} parts failed; figures in {arguments.out}")
    raise SystemExit(bool(found["failed"]))


if __name__ == "__main__":
    main()
