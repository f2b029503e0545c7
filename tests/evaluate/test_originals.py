from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils.data import Subset

import retrac_scale as rs
from retrac_scale.evaluate.learnt import unlearnt
from retrac_scale.task.items import take_apart
from tests.conftest import random_images, tiny_unet

SPREAD = 0.2
"""Mean square of the images, whose pixels have nothing to do with each other."""
KINDS = ("epsilon", "v_prediction", "sample", "flow")


class BestLine(nn.Module):
    """What predicts best as a multiple of the noisy image, for independent pixels of mean square `SPREAD`."""

    def __init__(self, scheduler: Any, kind: str, scale: float) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.layer.weight, scale)
        steps = torch.arange(1, 1001) / 1000
        signal = 1 - steps if kind == "flow" else scheduler.alphas_cumprod**0.5
        noise = steps if kind == "flow" else (1 - scheduler.alphas_cumprod) ** 0.5
        of_image, of_noise = {
            "epsilon": (0 * signal, 1 + 0 * signal),
            "v_prediction": (-noise, signal),
            "sample": (1 + 0 * signal, 0 * signal),
            "flow": (-1 + 0 * signal, 1 + 0 * signal),
        }[kind]
        best = (of_image * signal * SPREAD + of_noise * noise) / (signal**2 * SPREAD + noise**2)
        self.register_buffer("best", best)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        factors: Tensor = self.get_buffer("best")[(time - 1 if time.is_floating_point() else time).long()]
        predicted: Tensor = self.layer(noisy * factors.reshape(-1, 1, 1, 1))
        return predicted


def measured(kind: str, told: str, scale: float = 1.0, measure: Any = "mse") -> rs.SketchStore:
    """Images measured by the best line of a kind, with a scheduler that tells another, or the same."""
    scheduler = FlowMatchEulerDiscreteScheduler() if told == "flow" else DDPMScheduler(prediction_type=told)
    model = BestLine(DDPMScheduler(), kind, scale)
    task = rs.DiffusionTask(model, scheduler, measure=measure)
    images = SPREAD**0.5 * torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    return rs.sketch(task, images, None, checkpoints={"only": model.state_dict()}, progress=False)


@pytest.mark.parametrize("measure", ["mse", "l1", "mean_squared_output"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_tell_a_model_that_predicts_from_one_that_does_not(kind: str, measure: Any) -> None:
    assert unlearnt(measured(kind, kind, measure=measure)) == ""
    assert "checkpoint only has learnt little" in unlearnt(measured(kind, kind, 0.0, measure))


@pytest.mark.parametrize("other", ["v_prediction", "sample"])
@pytest.mark.parametrize("turned", [False, True])
def test_losses_tell_a_scheduler_of_another_prediction(other: str, turned: bool) -> None:
    kind, told = (other, "epsilon") if turned else ("epsilon", other)
    assert f"to predict something else than {told}" in unlearnt(measured(kind, told))


def test_losses_without_a_kind_or_scale_say_nothing() -> None:
    given = rs.write_store(None, {"a": np.ones((2, 2, 4))}, losses={"a": np.ones((2, 2))}, timesteps=[1, 9])
    assert unlearnt(given) == ""
    assert unlearnt(measured("epsilon", "epsilon", 0.0, rs.Huber())) == ""


def asked(dataset: Any, altered: Any = None, estimator: rs.Estimator | None = None) -> rs.evaluate.Originals:
    """What a dataset's altered images find, by a U-Net that nobody trained."""
    model = tiny_unet()
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    diffusion = rs.DiffusionTask(model, scheduler)
    options: Mapping[str, Any] = {"checkpoints": {"only": model.state_dict()}, "progress": False}
    store = rs.sketch(diffusion, dataset, None, **options)
    queries = rs.sketch(diffusion, altered or rs.evaluate.Altered(dataset), None, like=store, **options)
    return rs.evaluate.find_originals(rs.build_index(store, estimator), queries)


def test_all_is_not_well_where_nobody_trained_the_model_though_copies_are_found() -> None:
    found = asked(random_images(12))
    assert found.are_first
    assert not found.learnt
    assert not found.is_well
    assert "losses are as of a model that predicts nothing" in str(found)
    (cause,) = found.causes
    assert "checkpoint only has learnt little" in cause


class Images:
    """Images in an order of their own, in items of some form."""

    def __init__(self, form: Any = lambda image: image) -> None:
        self.images, self.form, self.ids = random_images(12), form, np.arange(12)[::-1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.form(self.images[row])


@pytest.mark.parametrize(
    "form",
    [
        lambda image: (image, 3),
        lambda image: {"pixel_values": image, "label": 3},
        lambda image: {"image": image, "id": "any"},
    ],
)
def test_images_are_altered_in_whatever_items_they_come(form: Any) -> None:
    plain, altered = Images(form), rs.evaluate.Altered(Images(form))
    both = [take_apart(0, one) for one in (plain[11], altered[len(altered) - 3])]
    assert altered.ids[-3] == "0, darker"
    torch.testing.assert_close(both[1].sample, (both[0].sample + 1) * 0.9 - 1)
    assert both[0].label == both[1].label
    with pytest.raises(ValueError, match="item 11, plain is no image"):
        rs.evaluate.Altered(Images(lambda image: {"latents": image}))[0]


def test_originals_of_a_subset_are_known_by_the_ids_of_its_samples() -> None:
    part: Any = Subset(Images(), [9, 3, 5])  # type: ignore[arg-type]
    assert rs.evaluate.Altered(part).columns["original"][::5].tolist() == [2, 8, 6]
    assert asked(part).plain == 1


def test_queries_whose_original_was_deleted_do_not_count() -> None:
    model = tiny_unet()
    task = rs.DiffusionTask(model, DDPMScheduler(num_train_timesteps=100))
    options: Mapping[str, Any] = {"checkpoints": {"only": model.state_dict()}, "progress": False}
    store = rs.sketch(task, Images(), None, **options)
    queries = rs.sketch(task, rs.evaluate.Altered(Images(), [3, 7]), None, like=store, **options)
    store.delete([3])
    found = rs.evaluate.find_originals(rs.build_index(store), queries)
    assert found.counts["plain"] == (1, 1)
    assert set(found.originals.tolist()) == {7}
    store.delete([7])
    with pytest.raises(ValueError, match="the index has no sample 3"):
        rs.evaluate.find_originals(rs.build_index(store), queries)


class Uneven(Images):
    """Images of which the later ones have longer gradients."""

    def __getitem__(self, row: int) -> Any:
        return (1 + row) / 4 * self.images[0] + 0.5 * self.images[row]


def test_inner_products_that_go_with_length_are_not_laid_to_the_weights() -> None:
    others = "the model, its weights or the images are others"
    found = asked(Uneven(), estimator=rs.GradDot())
    assert found.plain < 1
    assert "GradDot multiplies whole gradients" in found.causes[-1]
    assert not any(others in cause for cause in found.causes)
    assert asked(Uneven()).plain == 1
    swapped = rs.evaluate.Altered(Images(), [0, 3, 8])
    swapped.columns["original"] = swapped.columns["original"][::-1]
    assert any(others in cause for cause in asked(Images(), swapped).causes)
