"""Callbacks that drive a TrainingRecorder from trainers.

Both record the optimizer steps, their learning rates and the checkpoints, and restart the record where the trainer
resumes. What only the user's own code knows, it says itself where the loss is computed, before it returns the loss:

    recorder.batch(ids, timesteps, noise_seed)
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrac_scale.training.recorder import TrainingRecorder


def transformers_callback(recorder: TrainingRecorder) -> Any:
    """A `transformers.TrainerCallback`; checkpoints are named as the Trainer names its folders, "checkpoint-500"."""
    from transformers import TrainerCallback

    class RecorderCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.restart(state.global_step)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
            recorder.update(float(optimizer.param_groups[0]["lr"]))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.checkpoint(f"checkpoint-{state.global_step}")

    return RecorderCallback()


def lightning_callback(recorder: TrainingRecorder) -> Any:
    """A Lightning `Callback` (of `lightning` or `pytorch_lightning`), for automatic optimization.

    Checkpoints are named by the global step, "step-500".
    """
    if importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch import Callback
    else:
        from pytorch_lightning import Callback

    class RecorderCallback(Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            recorder.restart(trainer.global_step)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            recorder.update(float(optimizer.param_groups[0]["lr"]), epoch=trainer.current_epoch)

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            recorder.checkpoint(f"step-{trainer.global_step}")

    return RecorderCallback()
