"""Queries about a concept: gradients against autograd in float64, what the sketches say, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import retrac_scale as rs
from tests.conftest import CONDITIONAL, Labelled, random_images, tiny_dit, tiny_unet
from tests.oracle import gradient
from tests.query.test_regions import DDPM, STEPS, close, gradients
from tests.task.test_pipelines import stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def by_hand(model: nn.Module, clean: Tensor, told: Any, against: Any, weights: Any = 1.0) -> Any:
    """Autograd in float64 of -2 times the mean of what the concept adds, held, times what it adds, `[n, t, P]`."""
    model, rows = copy.deepcopy(model).double().eval(), []
    for row, sample in enumerate(clean):
        for step in STEPS:
            noise = rs.draw_noise(sample.shape, None, [step], 0).double()
            signal = DDPM.alphas_cumprod[step].double()
            noisy = signal.sqrt() * sample[None].double() + (1 - signal).sqrt() * noise

            def predicted(given: Any, noisy: Tensor = noisy, step: int = step, row: int = row) -> Tensor:
                one = {name: value[row : row + 1] for name, value in given.items()}
                found: Tensor = model(noisy, timestep=torch.tensor([step]), **one, return_dict=False)[0]
                return found

            added = predicted(told) - predicted(against)
            value = -2 * (added.detach() * added * torch.as_tensor(weights)).mean()
            rows.append(gradient(model, value).numpy())
    return np.stack(rows).reshape(len(clean), len(STEPS), -1)


def labels(*numbers: int) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor(numbers)}


def test_a_class_against_another_and_against_none() -> None:
    task, dataset = rs.DiffusionTask(tiny_dit(), DDPM), Labelled(random_images(2))
    found = gradients(task, rs.Concepts(dataset, {"3": rs.Concept(3, against=7), "any": rs.Concept(3)}))
    found = found.reshape(2, 2, len(STEPS), -1)
    close(found[:, 0], by_hand(task.model, dataset.images, labels(3, 3), labels(7, 7)))
    close(found[:, 1], by_hand(task.model, dataset.images, labels(3, 3), labels(10, 10)))  # of ten classes
    own = gradients(task, rs.Concepts(dataset, rs.Concept(None, against=7)))
    close(own, by_hand(task.model, dataset.images, labels(0, 1), labels(7, 7)))


def test_a_concept_in_a_part_of_the_picture_told_by_arguments() -> None:
    torch.manual_seed(0)
    task = rs.DiffusionTask(UNet2DConditionModel(**CONDITIONAL), DDPM)
    red, nothing = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    name = "encoder_hidden_states"
    dataset = [{"image": image, name: torch.zeros(3, 8)} for image in random_images(2)]
    inside = np.zeros((8, 8))
    inside[2:, :5] = 1
    concept = rs.Concept({name: red}, against={name: nothing})
    told, against = ({name: torch.stack([x, x]).double()} for x in (red, nothing))
    expected = by_hand(task.model, random_images(2), told, against, inside)
    close(gradients(task, rs.Regions(rs.Concepts(dataset, concept), (0, 2, 5, 8))), expected)
    close(gradients(task, rs.Concepts(rs.Regions(dataset, (0, 2, 5, 8)), concept)), expected)


def test_a_prompt_against_another_of_plain_and_of_encoded_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "model")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model")
    dataset = [(image.tanh(), "a cat") for image in random_images(2).repeat(1, 3, 2, 2)]
    encoded = rs.encode(task, dataset, tmp_path / "encoded", progress=False)
    given = {
        text: {
            name: torch.stack([value, value]) for name, value in task.check_item(0, (dataset[0][0], text))[1].items()
        }
        for text in ("snow", "")
    }
    latents = torch.stack([item["latents"] for item in (encoded[0], encoded[1])])
    in_float64 = [{name: value.double() for name, value in given[text].items()} for text in ("snow", "")]
    model, rows, lost = copy.deepcopy(task.model).double(), [], list[float]()
    for row in range(2):
        for step in STEPS:
            noise = rs.draw_noise(latents.shape[1:], None, [step], 0).double()
            signal = task.scheduler.alphas_cumprod[step].double()
            noisy = signal.sqrt() * latents[row : row + 1].double() + (1 - signal).sqrt() * noise
            with_it, without = (
                model(noisy, torch.tensor([step]), **{k: v[:1] for k, v in told.items()}).sample for told in in_float64
            )
            rows.append(gradient(model, -(with_it - without).square().mean()).numpy())
            # float32's digits that the difference of two outputs alike has not
            lost.append((with_it.norm() / (with_it - without).norm()).item())
    expected = np.stack(rows).reshape(2, len(STEPS), -1)
    for samples in (dataset, encoded):
        close(gradients(task, rs.Concepts(samples, rs.Concept("snow"))), expected, 3e-6 * max(lost))


def test_a_concept_is_asked_about_over_the_store_as_it_is_and_the_sketches_say_so(tmp_path: Path) -> None:
    task, state = rs.DiffusionTask(tiny_dit(), DDPM), tiny_dit().state_dict()
    options: dict[str, Any] = {"checkpoints": {"c": state}, "progress": False, "dtype": "float32"}
    train, asked = Labelled(random_images(12)), Labelled(random_images(2, seed=5), ids=["x", "y"])
    store = rs.sketch(task, train, None, timesteps=rs.Explicit(STEPS), projection=rs.Identity(), **options)
    samples = rs.Samples(asked, task, {"c": state}, concept=rs.Concept(3, against=7))
    index = rs.build_index(store, rs.TracIn(pairing="matched"), None, dtype="float32")
    expected = np.einsum(
        "qtk,ntk->qn",
        by_hand(task.model, asked.images, labels(3, 3), labels(7, 7)),
        store.sketches("c").astype(np.float64),
    )
    ranked = np.argsort(-expected, axis=1)
    np.testing.assert_array_equal(index.query(samples, k=12).ids, ranked)
    train_samples = rs.Samples(train, task, {"c": state}, rs.Explicit(STEPS))
    np.testing.assert_array_equal(index.query(samples, k=3, rerank=12, train=train_samples).ids, ranked[:, :3])
    assert samples.sketch(like=store).fingerprint["concept"] == "3 against 7"
    rs.sketch(task, samples.dataset, tmp_path / "q", like=store, **options)
    other = rs.Concepts(asked, rs.Concept(3, against=8))
    with pytest.raises(ValueError, match="concept is '3 against 7' there and '3 against 8' here"):
        rs.sketch(task, other, tmp_path / "q", like=store, **options)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_what_adapters_add_in_a_part_of_the_picture(options: dict[str, Any]) -> None:
    plain, adapted = tiny_unet(), tiny_unet()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"], **options), adapted)
    torch.manual_seed(1)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    task = rs.DiffusionTask(adapted, DDPM)
    before = [value.requires_grad for value in adapted.parameters()]
    asked = rs.Concepts(random_images(2), rs.Concept(None, against=rs.Unadapted()))
    found = gradients(task, rs.Regions(asked, (0, 2, 5, 8)))
    inside = torch.zeros(8, 8, dtype=torch.float64)
    inside[2:, :5] = 1
    with_it, without, rows = copy.deepcopy(adapted).double(), plain.double(), []
    for sample in random_images(2):
        for step in STEPS:
            noise = rs.draw_noise(sample.shape, None, [step], 0).double()
            signal = DDPM.alphas_cumprod[step].double()
            noisy = signal.sqrt() * sample[None].double() + (1 - signal).sqrt() * noise
            added = with_it(noisy, torch.tensor([step])).sample - without(noisy, torch.tensor([step])).sample
            rows.append(gradient(with_it, -(added.square() * inside).mean()).numpy())
    close(found, np.stack(rows).reshape(2, len(STEPS), -1))
    assert [value.requires_grad for value in adapted.parameters()] == before
    asked = rs.Concepts(random_images(1), rs.Concept(None, against=rs.Unadapted()))
    with pytest.raises(ValueError, match="the concept is what adapters add, but the task's model has none"):
        gradients(rs.DiffusionTask(tiny_unet(), DDPM), asked)


def conditional() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(**CONDITIONAL)


@pytest.mark.parametrize(
    ("model", "concept", "why"),
    [
        (tiny_unet, rs.Concept(3, against=7), "concept 3 is a class, but the task's model is told nothing"),
        (tiny_unet, rs.Concept("red"), "concept 'red' is a prompt, but the task's model is told nothing"),
        (tiny_dit, rs.Concept("red"), "concept 'red' is a prompt, but the task's model is told classes"),
        (tiny_dit, rs.Concept({"tone": torch.ones(2)}), "brings 'tone', which is none of the model's arguments"),
        (conditional, rs.Concept("red"), "no prompts, without a text encoder; use DiffusionTask.from_pretrained"),
        (tiny_dit, rs.Concept(11), "the concept 11 is no class: the model knows 10, from 0"),
    ],
)
def test_what_the_model_cannot_be_told_is_said_before_any_gradient(
    model: Any, concept: rs.Concept, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(rs.DiffusionTask, "measured", measured)
    with pytest.raises(ValueError, match=why):
        gradients(rs.DiffusionTask(model(), DDPM), rs.Concepts(random_images(2), concept))


def test_a_concept_must_say_what_it_is_and_against_what() -> None:
    with pytest.raises(ValueError, match="compares an item with itself"):
        rs.Concept(None)
    with pytest.raises(ValueError, match=r'such as rs.Concept\("red", against=""\), got 3'):
        rs.Concepts(random_images(2), 3)  # type: ignore[arg-type]


def test_of_several_functions_a_concept_is_asked_of_the_loss_alone() -> None:
    task = rs.DiffusionTask(tiny_dit(), DDPM, measure=("mse", "mean_squared_output"))
    given: dict[str, Any] = {"checkpoints": {"c": task.model.state_dict()}, "timesteps": rs.EvenlySpaced(2)}
    training, asked = Labelled(random_images(12)), Labelled(random_images(3, seed=5))
    store = rs.sketch(task, training, None, projection=rs.LowRank(dim=64), progress=False, **given)
    scores = []
    for side in (store.under(*task.measures), store):
        concept = rs.Samples(asked, task, given["checkpoints"], concept=rs.Concept(3, against=7))
        index = rs.build_index(side, rs.ReTracRidge(), dtype="float32", progress=False)
        answer = index.query(concept, k=12, side="both")
        scores.append(
            [dict(zip(ids, row, strict=True)) for ids, row in zip(answer.ids.tolist(), answer.scores, strict=True)]
        )
    for both, alone in zip(*scores, strict=True):
        assert both.keys() == alone.keys()
        np.testing.assert_allclose([both[one] for one in alone], list(alone.values()), rtol=1e-4, atol=1e-7)
