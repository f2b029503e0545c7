"""Trains a tiny denoiser under accelerate as diffusers' example scripts do; run by tests/training/test_recorder.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import retrac_scale as rs
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images

STEPS, BATCH, LR = 6, 4, 0.05


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = SmallDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    clean = images(32)
    loader: Any = DataLoader(list(enumerate(clean)), BATCH, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    recorder = rs.TrainingRecorder(
        folder / "recorded",
        len(clean),
        SCHEDULER,
        sketch=rs.CountSketch(64),
        store=folder / "store.zarr",
        model=model,
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(accelerator.process_index)
    step = 0
    for _ in range(3):
        for ids, batch in loader:
            with accelerator.accumulate(model):
                timesteps = torch.randint(0, 100, (len(ids),), generator=generator)
                noise = rs.draw_noise(batch.shape[1:], ids.numpy(), timesteps, step)
                noisy = SCHEDULER.add_noise(batch, noise, timesteps)
                loss = (model(noisy, timesteps, return_dict=False)[0] - noise).square().mean()
                recorder.batch(ids, timesteps, step, loss=loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients and step == STEPS - 2 and accelerator.is_main_process:
                    torch.save(accelerator.unwrap_model(model).state_dict(), folder / "weights.pt")
                    gradients = {name: p.grad for name, p in accelerator.unwrap_model(model).named_parameters()}
                    torch.save(gradients, folder / "gradients.pt")
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                recorder.update(LR)
                step += 1
    recorder.checkpoint("last")
    timesteps = torch.zeros(len(ids), dtype=torch.int64)
    accelerator.backward((model(batch, timesteps)[0] - batch).square().mean())
    recorder.step(ids, timesteps, None, LR)
    try:
        recorder.checkpoint("last")
    except (RuntimeError, ValueError) as error:
        (folder / f"refused-{accelerator.process_index}").write_text(f"{type(error).__name__}: {error}")
    accelerator.end_training()  # a process group that is alive at exit can abort the process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
