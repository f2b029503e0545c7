"""Settings: data bit for bit, models that differ by their samples alone, queries that are the same for everybody."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retrac_scale import evaluate
from retrac_scale.evaluate.settings import SETTINGS, Setting, data, emoji, joined, shapes
from retrac_scale.evaluate.settings.generating import generate, generate_anew
from retrac_scale.evaluate.settings.images import Images
from retrac_scale.evaluate.settings.losses import Losses
from retrac_scale.evaluate.settings.removal import removal
from retrac_scale.evaluate.settings.trainer import Trainer
from retrac_scale.evaluate.settings.training import AdapterTraining, ClassTraining, DiTTraining, Training
from retrac_scale.task.noising import noising_of
from retrac_scale.task.timesteps import draw_noise
from retrac_scale.training.record import read_record

FEW = Path(__file__).parents[1] / "data" / "emoji"
DIGESTS = {
    "google": "663a1953ea832eb91b26e9ef9d5bb88c03dea6700951253fad466c1cca647a8b",
    "twitter": "2cee3413107b6a522e3595354bb40db42c88a8f21d5f196a7fe434fa3d07ec81",
}
TINY: dict[str, Any] = {"epochs": 2, "kept": (1, 2), "batch": 4, "channels": (8, 16), "warmup_steps": 1}


def few(n: int = 8, channels: int = 1) -> Images:
    rng = np.random.default_rng(0)
    return Images(torch.from_numpy(rng.uniform(-1, 1, (n, channels, 8, 8)).astype(np.float32)))


@pytest.mark.parametrize("name", ["digits8", "shapes16"])
def test_data_that_need_no_file_are_those_of_the_queries_bit_for_bit(name: str) -> None:
    setting = evaluate.setting(name, work="unused")
    assert {len(images) for images in setting.queries.values()} == {64}  # refused where a bit differs
    assert torch.equal(setting.queries["held out"].images, setting.pictures.held_out.images)
    assert torch.equal(setting.queries["training"].images, setting.images[:64])
    for told, values in setting.queries["training"].given.items():
        assert torch.equal(values, setting.train.given[told][:64])


def test_other_data_are_refused() -> None:
    setting = evaluate.setting("digits8", work="unused")
    changed = setting.images.clone()
    changed[0, 0, 0, 0] += 1e-6
    other = replace(setting, pictures=replace(setting.pictures, train=Images(changed)))
    with pytest.raises(ValueError, match=r"the data of digits8 have digest .*, the truths were made with"):
        _ = other.queries


def test_queries_of_a_truth_stand_in_the_order_of_its_rows() -> None:
    setting, truth = evaluate.setting("digits8", work="unused"), evaluate.truth("digits8-lds")
    asked = setting.asked(truth)
    assert (len(asked), len(setting.ids)) == truth.shape
    for kind, rows in truth.rows.items():
        assert torch.equal(asked.images[rows], setting.queries[kind].images)


def test_settings_that_are_not_there_or_lack_their_data_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no setting 'digits'; there are: digits8, emoji16"):
        evaluate.setting("digits")
    with pytest.raises(ValueError, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        evaluate.setting("emoji16")
    with pytest.raises(FileNotFoundError, match="npm pack"):
        evaluate.setting("emoji16", folder=tmp_path)
    with pytest.raises(ValueError, match=r"has sha256 663a.*expected fb5f.*fetch it again"):
        evaluate.setting("emoji16", folder=FEW)


def test_emoji_are_averaged_over_white_and_stand_in_pairs() -> None:
    found = emoji.load(FEW, 16, DIGESTS)
    assert found.name.tolist() == [name for name in ("pizza", "dog", "grinning", "rocket", "heart") for _ in range(2)]
    assert found.designer.tolist() == ["google", "twitter"] * 5
    assert set(found.category) == {"Food & Drink", "Animals & Nature", "Smileys & Emotion", "Travel & Places"}
    for row, file in ((2, "1f436.png"), (3, "1f436.png")):
        designer = str(found.designer[row])
        with tarfile.open(FEW / f"emoji-datasource-{designer}-16.0.0.tgz") as archive:
            content = archive.extractfile(f"package/img/{designer}/64/{file}")
            assert content is not None
            drawn = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGBA"), np.float64)
        over = drawn[..., :3] * drawn[..., 3:] / 255 + 255 - drawn[..., 3:]
        averaged = over.reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.abs(found.pictures[row] - averaged).max() < 1.5  # composing rounds to a level, and so does averaging


def test_tones_of_one_emoji_stand_together() -> None:
    found = emoji.load_tones(FEW, 16, DIGESTS)
    assert found.name.tolist() == ["wave"] * 6
    skin = found.pictures[:, 8, 8].astype(int).sum(1)  # in the middle of the hand
    assert (np.diff(skin[1:]) < 0).all()  # from light to dark


def test_a_tarball_stands_for_its_folder() -> None:
    file = FEW / "emoji-datasource-google-16.0.0.tgz"
    np.testing.assert_array_equal(emoji.load(file, 16, DIGESTS).pictures, emoji.load(FEW, 16, DIGESTS).pictures)


def test_held_out_combinations_are_in_no_training_picture_and_both_parents_are() -> None:
    pictures = data.shapes16(None)
    seen = set(zip(pictures.columns["shape"], pictures.columns["colour"], strict=True))
    held = pictures.held_out_columns
    asked = list(zip(held["shape"], held["colour"], strict=True))
    assert len(asked) == 64
    assert len(set(asked)) == 16
    assert not seen & set(asked)
    assert {shape for shape, _ in seen} == set(shapes.SHAPES)
    assert {colour for _, colour in seen} == set(shapes.COLOURS)
    told = np.array(list(shapes.SHAPES))[pictures.train.given["class_labels"].numpy()]
    assert (told == pictures.columns["shape"]).all()


def test_a_disc_has_its_area_and_colour() -> None:
    disc, blue = list(shapes.SHAPES).index("disc"), list(shapes.COLOURS).index("blue")
    picture = shapes.draw([disc], [blue], seed=0)[0]
    rng = np.random.default_rng(0)
    radius, _, _, shade = rng.uniform(4, 6.5), *(rng.uniform() for _ in range(2)), rng.uniform(0.85, 1.15)
    paint = np.array(shapes.COLOURS["blue"]) * shade
    covered = ((255 - picture.astype(float)) / (255 - paint)).mean(2).sum()
    assert covered == pytest.approx(np.pi * (0.9 * radius) ** 2, rel=0.02)


def test_same_seed_models_see_a_sample_at_the_same_noise_whatever_else_they_see(tmp_path: Path) -> None:
    trainer = Trainer(few(), Training(**TINY), tmp_path / "models")
    seen = []
    for name, ids in (("all", np.arange(8)), ("half", np.array([0, 3, 5, 6]))):
        trainer.checkpoints(ids, 0, tmp_path / name)
        record = read_record(tmp_path / name)
        assert record is not None
        rows = record.rows(0, max(record.checkpoints.values()))
        seen.append(set(rows[["sample", "timestep", "noise_seed"]].tolist()))
    assert len(seen[1]) == 4 * 2
    assert seen[1] < seen[0]


def test_a_model_is_trained_once_and_the_names_of_kept_weights_stay(tmp_path: Path) -> None:
    trainer = Trainer(few(), Training(**TINY), tmp_path)
    first = trainer(np.arange(4), 0)
    (file,) = tmp_path.iterdir()
    assert file.name == "a2892bd73498c11f4eb22056.pt"  # hours of training are found by such names
    written = file.stat().st_mtime_ns
    again = trainer(np.arange(4), 0)
    assert file.stat().st_mtime_ns == written
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_training_leaves_the_callers_random_numbers_and_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weights = Trainer(few(), Training(**TINY), tmp_path / "two")(np.arange(4), 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.rand(3), expected)
    again = Trainer(few(), Training(**TINY), tmp_path / "one")(np.arange(4), 0)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_noisy_images_in_training_are_the_schedulers_bit_for_bit() -> None:
    how = Training(**TINY)
    scheduler, images = how.scheduler(), few().images
    steps = torch.arange(0, 1000, 125)
    noise = draw_noise(images.shape[1:], np.arange(8), steps, 0)
    process = noising_of(scheduler, how.build((1, 8, 8)))
    assert torch.equal(process.noisy(images, noise, steps), scheduler.add_noise(images, noise, steps))


KINDS: dict[str, Training] = {
    "class": ClassTraining(**TINY, classes=3),
    "flow": DiTTraining(**TINY, classes=3, width=16, heads=2, layers=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_told_a_class_train_generate_and_are_measured(kind: str, tmp_path: Path) -> None:
    given = {"class_labels": torch.arange(8) % 3}
    images = replace(few(channels=3), given=given)
    setting = Setting(kind, data.Pictures(images, images.some(slice(4), "held-out")), KINDS[kind], tmp_path)
    assert setting.record.exists() is False
    last = list(setting.checkpoints.values())[-1]
    made = generate(setting.training, setting.build(), last, setting.pictures.held_out, tmp_path / "made.pt")
    assert made.images.shape == (4, 3, 8, 8)
    assert made.images.abs().max() <= 1
    losses = Losses(images, setting.build(), setting.scheduler)(last)
    assert losses.shape == (8,)
    assert np.isfinite(losses).all()
    assert Losses(images, None, None).key != Losses(replace(images, given={}), None, None).key


def test_a_fine_tune_goes_on_from_a_model_that_saw_none_of_its_samples(tmp_path: Path) -> None:
    pictures = data.Pictures(few(), few(2), tuned=np.array([6, 7]))
    for training in (Training(**TINY), AdapterTraining(**TINY, rank=2)):
        setting = Setting("tuned", pictures, training, tmp_path / type(training).__name__, base=Training(**TINY))
        start = Trainer(few(), Training(**TINY), tmp_path / "base")(np.arange(6), 0)
        begun = {name.replace("base_layer.", ""): value for name, value in setting.build().state_dict().items()}
        assert all(torch.equal(begun[name], value) for name, value in start.items())
        (weights,) = setting.checkpoints.values()
        adapters = isinstance(training, AdapterTraining)
        assert all(("lora" in name) == adapters for name in weights)
        tuned = {name: value for name, value in setting.model.named_parameters() if name in weights}
        assert all(torch.equal(tuned[name].detach().cpu(), value) for name, value in weights.items())


def test_every_setting_is_named_once_and_has_its_queries() -> None:
    named = {evaluate.truth(name).setting for name in evaluate.truths()}
    assert named <= set(SETTINGS)
    for name in named:
        with np.load(Setting(name, None, None, Path()).queries_file) as file:  # type: ignore[arg-type]
            kinds = {kind: len(file[kind]) for kind in file if "/" not in kind and kind != "data"}
        for truth in (evaluate.truth(one) for one in evaluate.truths() if one.startswith(f"{name}-")):
            assert truth.kinds.items() <= kinds.items()


def test_joined_images_keep_what_the_model_is_told() -> None:
    told = [Images(torch.zeros(2, 1, 2, 2), given={"class_labels": torch.tensor([row, row])}) for row in (1, 5)]
    assert joined(told).given["class_labels"].tolist() == [1, 1, 5, 5]


@pytest.mark.slow
def test_removal_is_the_change_of_loss_and_image_without_a_querys_top_samples(tmp_path: Path) -> None:
    pictures, asked = data.Pictures(few(12), few(2)), few(3)
    how = Training(**TINY)
    setting = Setting("tiny", pictures, how, tmp_path / "work", asked_in=tmp_path)
    last = list(setting.checkpoints.values())[-1]
    made = generate_anew(how, setting.build(), last, asked)
    np.savez(setting.queries_file, data=np.array(pictures.digest), generated=made.numpy())
    scores = np.random.default_rng(0).normal(size=(3, 12))
    found = removal(setting, scores, queries=2, share=0.25, random=1)

    def without(ids: Any) -> tuple[Any, Any]:
        trainer = Trainer(pictures.train, how, tmp_path / "apart")
        weights = trainer(np.setdiff1d(np.arange(12), ids), 0)
        images = generate_anew(how, how.build((1, 8, 8)), weights, asked)
        far = ((images - made).numpy() ** 2).mean((1, 2, 3)) ** 0.5
        return Losses(Images(made), how.build((1, 8, 8)), how.scheduler())(weights), far

    whole, _ = without([])
    loss, far = without(np.argsort(-scores[0])[:3])
    assert found.loss[0] == pytest.approx(loss[0] - whole[0])
    assert found.image[0] == pytest.approx(far[0])
    assert found.loss_of_others[0] == pytest.approx((loss - whole)[1:].mean())
    assert found.image_of_others[0] == pytest.approx(far[1:].mean())
    loss, far = without(np.random.default_rng(0).permutation(12)[:3])
    assert found.loss_at_random == pytest.approx((loss - whole)[:2])
    assert found.image_at_random == pytest.approx(far[:2])
    assert found.beyond("loss", "random").value == pytest.approx((found.loss - found.loss_at_random).mean())
    with pytest.raises(ValueError, match=r"scores are \(2, 12\), expected \(3, 12\)"):
        removal(setting, scores[:2])
