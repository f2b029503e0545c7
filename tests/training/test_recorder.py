"""The training record: complete, replayable, safe against crashes, the same from every loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import retrac_scale as rs
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images

ROOT = Path(__file__).parents[2]


def losses(model: torch.nn.Module, clean: torch.Tensor, rows: Any) -> torch.Tensor:
    """The losses `[n]` of recorded rows."""
    rows = np.array(rows)
    steps = torch.from_numpy(rows["timestep"].astype(np.int64))
    noise = rs.draw_noise(clean.shape[1:], rows["sample"], steps, rows["noise_seed"])
    noisy = SCHEDULER.add_noise(clean[rows["sample"]], noise, steps)
    each: torch.Tensor = (model(noisy, steps, return_dict=False)[0] - noise).square().flatten(1).mean(1)
    return each


def mean_gradient(model: torch.nn.Module, clean: torch.Tensor, rows: Any) -> dict[str, torch.Tensor]:
    """The gradient of a recorded step, one row at a time."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        loss = losses(model, clean, [row]).sum()
        for name, gradient in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += gradient / len(rows)
    return total


@pytest.mark.slow
def test_two_accelerate_processes_record_and_sketch_every_step_whole_and_it_is_replayed(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "training" / "accelerate_script.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = rs.read_record(tmp_path / "recorded")
    assert record is not None
    assert record.checkpoints == {"last": 6}
    for process in range(2):
        refused = (tmp_path / f"refused-{process}").read_text()
        assert refused.startswith(f"ValueError: {tmp_path / 'recorded'} has a checkpoint 'last'")
    rows = record.rows(0, 6)
    assert np.bincount(rows["step"]).tolist() == [0] + [16] * 6  # 2 processes x 2 accumulated batches x 4
    for epoch in range(3):  # two steps each
        assert sorted(rows["sample"][rows["epoch"] == epoch].tolist()) == list(range(32))
    model = SmallDenoiser()
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    trained = torch.load(tmp_path / "gradients.pt")
    replayed = mean_gradient(model, images(32), rows[rows["step"] == 5])
    for name, gradient in trained.items():
        assert (replayed[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    store = rs.open_store(tmp_path / "store.zarr")
    assert store.is_complete
    assert store.weights["last"] == rs.Recorded(tmp_path / "recorded").weight("last") == pytest.approx(0.05 * 3)
    assert (store.timesteps("last") >= 0).all()
    for row in rows[rows["step"] == 5]:
        with rs.GradientSketcher(model, rs.CountSketch(64)) as sketcher:
            sketch, _ = sketcher(losses(model, images(32), [row]))
        found = torch.from_numpy(store.sketches("last")[row["sample"]])
        assert (found - sketch).norm() <= 1e-4 * sketch.norm()


def train(model: Any, recorder: rs.TrainingRecorder, first: int, last: int) -> None:
    """Plain SGD over the steps first .. last - 1, the learning rate changing."""
    clean = images(12)
    for step in range(first, last):
        rng = np.random.default_rng(step)
        ids, steps = rng.permutation(12)[:5], torch.from_numpy(rng.integers(0, 100, 5))
        noise = rs.draw_noise(clean.shape[1:], ids, steps, step)
        noisy = SCHEDULER.add_noise(clean[ids], noise, steps)
        model.zero_grad()
        (model(noisy, steps, return_dict=False)[0] - noise).square().mean().backward()
        lr = 0.1 / (1 + step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
        recorder.step(ids, steps, step, lr)


def test_recorded_gradients_times_learning_rates_make_up_the_weight_change(tmp_path: Path) -> None:
    model = SmallDenoiser()
    recorder = rs.TrainingRecorder(tmp_path, 12, SCHEDULER)
    train(model, recorder, 0, 3)
    recorder.checkpoint("a")
    at_a = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, recorder, 3, 9)
    recorder.checkpoint("b")
    record = rs.read_record(tmp_path)
    assert record is not None
    after, until = record.before("b")
    assert (after, until) == (3, 9)
    rows = record.rows(after, until)
    replay = SmallDenoiser()
    replay.load_state_dict(at_a)
    change = {name: torch.zeros_like(value) for name, value in at_a.items()}
    for step in np.unique(rows["step"]):
        chosen = rows[rows["step"] == step]
        for name, gradient in mean_gradient(replay, images(12), chosen).items():
            change[name] -= float(chosen["lr"][0]) * gradient
        replay.load_state_dict({name: at_a[name] + change[name] for name in at_a})
    for name, value in model.state_dict().items():
        moved = value - at_a[name]
        assert moved.norm() > 0
        assert (change[name] - moved).norm() <= 1e-3 * moved.norm(), name


def test_a_killed_process_loses_no_step_and_a_resumed_run_replaces_what_came_after_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = f"""
import os, retrac_scale as rs
from types import SimpleNamespace
recorder = rs.TrainingRecorder({str(tmp_path)!r}, 4, SimpleNamespace(config=SimpleNamespace(num_train_timesteps=100)))
for step in range(5):
    recorder.step([0, 1, 2, 3], [step] * 4, step, 0.5)
    if step == 2:
        recorder.checkpoint("a")
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -9
    record = rs.read_record(tmp_path)
    assert record is not None
    assert record.rows(0, 5)["timestep"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    again = rs.TrainingRecorder(tmp_path, 4, SCHEDULER)
    assert again.steps == 3
    again.step([2, 3], [70, 71], None, 0.5)
    again.checkpoint("b")
    record = rs.read_record(tmp_path)
    assert record is not None
    rows = record.rows(2, 4)
    assert rows["timestep"].tolist() == [2] * 4 + [70, 71]
    assert rows["epoch"].tolist() == [2] * 4 + [3] * 2
    assert rs.Recorded(tmp_path).pairs("b", np.arange(4), 100).timesteps.ravel().tolist() == [2, 2, 70, 71]
    back = rs.TrainingRecorder(tmp_path, 4, SCHEDULER)
    back.restart(1)
    assert "checkpoints ['a', 'b'] count no more" in caplog.text
    back.step([0, 1], [50, 51], 7, 0.5)
    back.checkpoint("b")
    assert rs.Recorded(tmp_path).pairs("b", np.arange(4), 100).timesteps.ravel().tolist() == [50, 51, 0, 0]
    with pytest.raises(ValueError, match=r"no training record for checkpoint 'a' .* \(it has \['b'\]\)"):
        rs.Recorded(tmp_path).weight("a")


def test_a_record_cut_off_in_writing_is_read_to_its_last_whole_step(tmp_path: Path) -> None:
    recorder = rs.TrainingRecorder(tmp_path, 4, SCHEDULER)
    recorder.step([0, 1], [5, 6], 0, 0.5)
    recorder.checkpoint("a")
    recorder.step([2, 3], [7, 8], 0, 0.5)
    file, log = next(tmp_path.glob("*.rows")), tmp_path / "log.jsonl"
    os.truncate(file, file.stat().st_size - 50)
    with open(log, "ab") as torn:
        torn.write(b'{"checkpoint": "b", "st')
    record = rs.read_record(tmp_path)
    assert record is not None
    assert record.checkpoints == {"a": 1}
    assert len(record.rows(0, 1)) == 2
    with pytest.raises(ValueError, match=r"process 0 of 1 lacks 1 of the steps 1 \.\. 2, the first of them 2"):
        record.rows(0, 2)
    again = rs.TrainingRecorder(tmp_path, 4, SCHEDULER)
    again.step([2, 3], [17, 18], 0, 0.5)
    again.checkpoint("b")
    assert rs.Recorded(tmp_path).pairs("b", np.arange(4), 100).timesteps.ravel().tolist() == [5, 6, 17, 18]
    log.write_bytes(b"nonsense\n" + log.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 of .*log\.jsonl is damaged"):
        rs.read_record(tmp_path)


def test_ids_of_the_dataset_are_recorded_and_asked_for_by_name(tmp_path: Path) -> None:
    class Named:
        ids = ("cat.png", "dog.png", "owl.png")

        def __len__(self) -> int:
            return 3

    recorder = rs.TrainingRecorder(tmp_path, Named(), SCHEDULER)
    recorder.step(["owl.png", "cat.png", "dog.png"], torch.tensor([3, 1, 2]), 0, 0.5)
    recorder.checkpoint("a")
    with pytest.raises(ValueError, match=r"'emu\.png' is none of the recorded training set's ids"):
        recorder.step(["emu.png"], [1], 0, 0.5)
    asked = np.array(["dog.png", "owl.png"])
    assert rs.Recorded(tmp_path).pairs("a", asked, 100).timesteps.ravel().tolist() == [2, 3]
    with pytest.raises(ValueError, match="holds the record of other ids"):
        rs.TrainingRecorder(tmp_path, 3, SCHEDULER)


class Denoising:
    """What a user's training step does, in both trainers."""

    def __init__(self, recorder: rs.TrainingRecorder) -> None:
        self.recorder = recorder

    def loss(self, model: torch.nn.Module, ids: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        timesteps, seed = torch.full((len(ids),), 10), self.recorder.steps
        noise = rs.draw_noise(clean.shape[1:], ids.numpy(), timesteps, seed)
        predicted = model(SCHEDULER.add_noise(clean, noise, timesteps), timesteps)[0]
        loss: torch.Tensor = (predicted - noise).square().mean()
        self.recorder.batch(ids, timesteps, seed, loss=loss)
        return loss


def check_trainer_record(folder: Path, checkpoints: dict[str, int], lrs: list[float]) -> None:
    record = rs.read_record(folder)
    assert record is not None
    assert record.checkpoints == checkpoints
    rows = record.rows(0, max(checkpoints.values()))
    assert [rows["lr"][rows["step"] == step][0] for step in np.unique(rows["step"])] == pytest.approx(lrs)
    for epoch in np.unique(rows["epoch"]):
        assert sorted(rows["sample"][rows["epoch"] == epoch].tolist()) == list(range(8))


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer_records_through_the_callback_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    clean = images(8)
    data = [{"id": i, "clean": clean[i]} for i in range(8)]
    for resume in (False, True):
        recorder = rs.TrainingRecorder(tmp_path / "recorded", 8, SCHEDULER)
        denoising = Denoising(recorder)

        class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, denoising: Any = denoising, **kwargs: Any
            ) -> Any:
                loss = denoising.loss(model, inputs["id"], inputs["clean"])
                return (loss, {}) if return_outputs else loss

        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), use_cpu=True, max_steps=6 if resume else 4, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=0.1, lr_scheduler_type="constant", save_steps=2,
            eval_strategy="steps", eval_steps=1, label_names=["clean"], prediction_loss_only=True,
            remove_unused_columns=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            SmallDenoiser(),
            arguments,
            train_dataset=data,
            eval_dataset=data[:2],
            callbacks=[rs.transformers_callback(recorder)],
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2") if resume else None)
        saved = {f"checkpoint-{step}": step for step in range(2, arguments.max_steps + 1, 2)}
        check_trainer_record(tmp_path / "recorded", saved, [0.1] * arguments.max_steps)


@pytest.mark.filterwarnings("ignore")
def test_lightning_records_through_the_callback(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    recorder = rs.TrainingRecorder(tmp_path / "recorded", 8, SCHEDULER)
    denoising = Denoising(recorder)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = SmallDenoiser()

        def training_step(self, batch: Any, number: int) -> Any:
            return denoising.loss(self.model, *batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}]

    saving = lightning.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[saving, rs.lightning_callback(recorder)],
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(list(enumerate(images(8))), 2, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(Module(), loader)
    check_trainer_record(tmp_path / "recorded", {"step-2": 2, "step-4": 4}, [0.1, 0.1, 0.05, 0.05])


def test_a_disk_that_is_full_for_a_moment_costs_no_step_and_never_leaves_half_a_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = rs.TrainingRecorder(tmp_path / "recorded", 4, SCHEDULER)
    write, refusals = os.write, [False, False, True]

    def nearly_full(file: int, content: Any) -> int:
        if refusals.pop(0):
            raise OSError(28, "No space left on device")
        return write(file, content[:50])

    def make_step(number: int) -> None:
        recorder.step(np.arange(4), np.arange(4) + number, number, 0.1)

    make_step(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", nearly_full)
        recorder.batch(np.arange(4), np.arange(4) + 2, 2)
        with pytest.raises(OSError, match="No space left"):
            recorder.update(0.1)
    recorder.update(0.1)  # the same step again
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:50]))
    make_step(3)
    recorder.checkpoint("last")
    recorder.close()
    record = rs.read_record(tmp_path / "recorded")
    assert record is not None
    rows = record.rows(0, 3)
    assert rows["step"].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert rows["timestep"].tolist() == [1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6]
