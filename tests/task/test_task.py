"""Losses of every kind of training against hand-written float64 formulas and diffusers' own schedulers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from torch import Tensor, nn
from torch.nn import functional as F

import retrac_scale as rs
from retrac_scale.runtime.tasks import FailedTasksError
from retrac_scale.task.calling import call_model
from retrac_scale.task.noising import scheduler_spec
from tests.conftest import random_images, tiny_dit, tiny_unet

N = 3
IMAGES, NOISE = random_images(N), random_images(N, seed=1)
TIMESTEPS = torch.tensor([0, 40, 99])


class Linear(nn.Module):
    """Enough of a denoiser to see what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.seen.append((sample, timestep))
        return sample * self.gain


def losses(scheduler: Any, **options: Any) -> Tensor:
    task = rs.DiffusionTask(Linear(), scheduler, **options)
    return task.losses(IMAGES, TIMESTEPS, NOISE, {}).detach().double()


def ddpm(prediction_type: str = "epsilon") -> Any:
    return DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)


def diffusion_reference(scheduler: Any, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Errors `[n, ...]` and SNR `[n]` by Ho et al.'s formulas in float64."""
    a = scheduler.alphas_cumprod.double()[TIMESTEPS].reshape(-1, 1, 1, 1)
    x, e = IMAGES.double(), NOISE.double()
    target = {"epsilon": e, "sample": x, "v_prediction": a.sqrt() * e - (1 - a).sqrt() * x}[prediction_type]
    return 0.7 * (a.sqrt() * x + (1 - a).sqrt() * e) - target, (a / (1 - a)).flatten()


def flow_reference(shift: float) -> tuple[Tensor, Tensor]:
    """Errors and noise levels of rectified flow in float64."""
    u = (TIMESTEPS.double() + 1) / 100
    level = shift * u / (1 + (shift - 1) * u)
    s = level.reshape(-1, 1, 1, 1)
    x, e = IMAGES.double(), NOISE.double()
    return 0.7 * ((1 - s) * x + s * e) - (e - x), level


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusion_losses_equal_the_formula_for_every_prediction_type(kind: str) -> None:
    error, _ = diffusion_reference(ddpm(), kind)
    close(losses(ddpm(kind)), error.square().flatten(1).mean(1))
    close(losses(ddpm(kind), measure="l1"), error.abs().flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusion_noising_and_target_are_those_of_diffusers_bit_for_bit(kind: str) -> None:
    scheduler, model = ddpm(kind), Linear()
    task = rs.DiffusionTask(model, scheduler)
    task.losses(IMAGES, TIMESTEPS, NOISE, {})
    noisy, times = model.seen[0]
    assert torch.equal(noisy, scheduler.add_noise(IMAGES, NOISE, TIMESTEPS))
    assert torch.equal(times, TIMESTEPS)
    target = {"epsilon": NOISE, "sample": IMAGES, "v_prediction": scheduler.get_velocity(IMAGES, NOISE, TIMESTEPS)}
    assert torch.equal(task.noising.target(IMAGES, NOISE, TIMESTEPS), target[kind])


def test_a_sampler_beside_the_model_stands_for_the_training_that_its_configuration_describes() -> None:
    betas = {"num_train_timesteps": 100, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    sampler = EulerDiscreteScheduler(**betas)  # its own add_noise takes no root of the signal
    sampler.set_timesteps(7)
    close(losses(sampler), losses(DDPMScheduler(**betas)))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_text_to_image_example(kind: str, gamma: float) -> None:
    """examples/text_to_image/train_text_to_image.py of diffusers 0.42.1, `--snr_gamma`."""
    snr = compute_snr(ddpm(kind), TIMESTEPS).double()
    weights = torch.minimum(snr, torch.tensor(gamma)) / (snr if kind == "epsilon" else snr + 1)
    error, _ = diffusion_reference(ddpm(), kind)
    close(losses(ddpm(kind), weighting=rs.MinSNR(gamma)), weights * error.square().flatten(1).mean(1))


def test_snr_weights_of_a_clean_sample_prediction_are_those_of_the_unconditional_example() -> None:
    """examples/unconditional_image_generation/train_unconditional.py, prediction_type "sample"."""
    error, snr = diffusion_reference(ddpm(), "sample")
    close(losses(ddpm("sample"), weighting=rs.MinSNR(None)), snr * error.square().flatten(1).mean(1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_losses_equal_the_formula(shift: float) -> None:
    error, _ = flow_reference(shift)
    scheduler = FlowMatchEulerDiscreteScheduler(100, shift=shift)
    close(losses(scheduler), error.square().flatten(1).mean(1))
    scheduler.set_timesteps(9)  # what a sampler leaves behind
    close(losses(scheduler), error.square().flatten(1).mean(1))
    solver = UniPCMultistepScheduler(100, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    close(losses(solver), error.square().flatten(1).mean(1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("precondition", [True, False])
def test_flow_matching_equals_the_sd3_example(shift: float, scheme: Any, precondition: bool) -> None:
    """The loss of examples/dreambooth/train_dreambooth_sd3.py of diffusers 0.42.1, in its own order of operations."""
    scheduler = FlowMatchEulerDiscreteScheduler(100, shift=shift)
    indices = 99 - TIMESTEPS
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
    model = Linear()
    task = rs.DiffusionTask(model, scheduler, weighting=rs.SD3Weighting(scheme, precondition_outputs=precondition))
    found = task.losses(IMAGES, TIMESTEPS, NOISE, {})
    noisy, times = model.seen[0]
    assert torch.equal(times, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(IMAGES, timesteps, NOISE), rtol=1e-6, atol=1e-6)
    prediction = noisy * 0.7
    target = NOISE - IMAGES
    if precondition:
        prediction, target = prediction * (-sigmas) + noisy, IMAGES
    weights = compute_loss_weighting_for_sd3(scheme, sigmas)
    expected = (weights * (prediction - target) ** 2).reshape(N, -1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_training_loops_timesteps_become_the_integers_that_stand_for_them() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(100, shift=3.0)
    numbers = rs.timestep_numbers(scheduler, scheduler.timesteps)
    assert numbers.tolist() == list(range(99, -1, -1))
    assert rs.timestep_numbers(FlowMatchEulerDiscreteScheduler(100), torch.tensor([0.0, 7.4, 7.6, 100])).tolist() == [
        0,
        6,
        7,
        99,
    ]


def test_a_flow_matching_loops_timesteps_are_recorded_as_integers(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(100, shift=3.0)
    recorder = rs.TrainingRecorder(tmp_path, 3, scheduler)
    recorder.step([0, 1, 2], scheduler.timesteps[torch.tensor([0, 40, 99])], None, 0.1)
    recorder.checkpoint("last")
    assert rs.Recorded(tmp_path).pairs("last", np.arange(3), 100).timesteps.flatten().tolist() == [99, 59, 0]


def test_timesteps_that_a_replay_could_not_tell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draw_noise takes integer timesteps, got dtype float32"):
        rs.draw_noise((2,), [0], FlowMatchEulerDiscreteScheduler(100, shift=3.0).timesteps[:1], 0)
    with pytest.raises(ValueError, match="timesteps of diffusion are integers"):
        rs.TrainingRecorder(tmp_path, 3, ddpm()).step([0], torch.tensor([3.7]), None, 0.1)


def test_huber_losses_equal_torchs_and_the_scheduled_huber_examples() -> None:
    """examples/research_projects/scheduled_huber_loss_training of diffusers, `--loss_type huber`, constant schedule."""
    error, _ = diffusion_reference(ddpm(), "epsilon")
    smooth = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
    close(losses(ddpm(), measure=rs.Huber()), smooth.flatten(1).mean(1))
    pseudo = 2 * 0.1 * (torch.sqrt(error**2 + 0.1**2) - 0.1)
    close(losses(ddpm(), measure=rs.PseudoHuber(0.1)), pseudo.flatten(1).mean(1))


def test_flux_is_called_as_its_example_calls_it() -> None:
    """examples/dreambooth/train_dreambooth_flux.py: packed latents, places, guidance, timestep / 1000."""
    from diffusers import FluxPipeline

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    latents, noise = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 4)
    given = {"encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8)}
    found = rs.DiffusionTask(model, scheduler).losses(latents, torch.tensor([999, 300]), noise, given)
    indices = torch.tensor([0, 699])
    sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
    noisy = (1 - sigmas) * latents + sigmas * noise
    prediction = model(
        hidden_states=FluxPipeline._pack_latents(noisy, 2, 2, 8, 4),
        timestep=scheduler.timesteps[indices] / 1000,
        guidance=torch.full((2,), 3.5),
        txt_ids=torch.zeros(5, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 2, "cpu", torch.float32),
        return_dict=False,
        **given,
    )[0]
    prediction = FluxPipeline._unpack_latents(prediction, 64, 32, 8)
    torch.testing.assert_close(found, (prediction - (noise - latents)).square().flatten(1).mean(1), rtol=1e-5, atol=0)


def test_ltx_is_called_as_its_pipeline_calls_it() -> None:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=2,
        out_channels=2,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    ).eval()
    noisy, times, text = torch.randn(2, 2, 2, 3, 4), torch.tensor([300.0, 7.0]), torch.randn(2, 5, 8)
    given = {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(2, 5)}
    found = call_model(model, noisy, times, given)
    tokens = LTXPipeline._pack_latents(noisy)
    scale = (8 / 25, 32, 32)  # temporal compression / frame rate, spatial compression
    expected = model(tokens, timestep=times, num_frames=2, height=3, width=4, rope_interpolation_scale=scale, **given)[
        0
    ]
    torch.testing.assert_close(found, LTXPipeline._unpack_latents(expected, 2, 3, 4), rtol=1e-5, atol=1e-6)


def test_models_are_not_called_without_the_rotary_embeddings_that_their_pipelines_give_them() -> None:
    options: dict[str, Any] = {
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 8,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 4,
    }
    videos, text = torch.randn(1, 2, 4, 4, 4), {"encoder_hidden_states": torch.randn(1, 4, 8)}
    for rotary in (False, True):
        model = CogVideoXTransformer3DModel(**options, use_rotary_positional_embeddings=rotary)
        task = rs.DiffusionTask(model, ddpm("v_prediction"))
        if rotary:
            with pytest.raises(
                ValueError, match=r"told of positions by image_rotary_emb=.*DiffusionTask\(call=\.\.\.\)"
            ):
                task.losses(videos, torch.tensor([3]), torch.randn_like(videos), text)
        else:
            assert task.losses(videos, torch.tensor([3]), torch.randn_like(videos), text).isfinite().all()


@pytest.mark.parametrize(
    ("options", "scheduler", "message"),
    [
        ({"weighting": rs.MinSNR()}, FlowMatchEulerDiscreteScheduler(), "not of flow matching"),
        ({"weighting": rs.SD3Weighting()}, DDPMScheduler(), "not of diffusion"),
        (
            {"measure": "l1", "weighting": rs.SD3Weighting(precondition_outputs=True)},
            FlowMatchEulerDiscreteScheduler(),
            "weights squared errors, not l1",
        ),
        ({"measure": "l3"}, DDPMScheduler(), r"one of \('mse', 'l1'"),
        ({}, DDPMScheduler(prediction_type="x"), "prediction_type 'x' is none of"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rs.DiffusionTask(Linear(), scheduler, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rs.Huber(0), "Huber needs a delta above 0, got 0"),
        (lambda: rs.PseudoHuber(-1), "PseudoHuber needs a c above 0, got -1"),
        (lambda: rs.MinSNR(-1), "MinSNR needs a gamma above 0, got -1"),
        (lambda: rs.Huber(float("nan")), "Huber needs a delta above 0, got nan"),
    ],
)
def test_losses_and_weightings_without_a_meaning_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_of_the_same_shapes_but_other_heads_is_refused_as_queries() -> None:
    built: Any = tiny_dit()

    def sketched(heads: int, like: Any = None) -> Any:
        model = type(built).from_config(built.config, num_attention_heads=heads, attention_head_dim=8 // heads)
        options: Any = {"projection": rs.CountSketch(16)} if like is None else {"like": like}
        options |= {"checkpoints": {"a": built.state_dict()}, "timesteps": rs.Explicit([5]), "progress": False}
        return rs.sketch(rs.DiffusionTask(model, ddpm()), [(image, 3) for image in IMAGES[:2]], None, **options)

    store = sketched(2)
    sketched(2, like=store)
    with pytest.raises(ValueError, match=r"num_attention_heads is '2' there and '4' here"):
        sketched(4, like=store)


def test_stores_measured_or_weighted_otherwise_do_not_mix() -> None:
    described = {
        rs.DiffusionTask(Linear(), ddpm(), measure=measure, weighting=weighting).measure
        for measure in ("mse", "l1", rs.Huber(), rs.Huber(0.5), rs.PseudoHuber())
        for weighting in (None, rs.MinSNR(), rs.MinSNR(1.0))
    }
    assert len(described) == 15


def test_functions_of_the_output_are_what_they_are_whatever_weights_the_loss() -> None:
    names: Any = ("mse", "mean_squared_output")
    weighted = rs.DiffusionTask(tiny_unet(), ddpm(), measure=names, weighting=rs.MinSNR())
    assert weighted.measures == ("mse x MinSNR(gamma=5.0)", "mean_squared_output")
    options: dict[str, Any] = {"checkpoints": {"a": dict(weighted.model.state_dict())}, "timesteps": rs.EvenlySpaced(2)}
    options |= {"projection": rs.CountSketch(16), "progress": False}
    one, plain = (
        rs.sketch(rs.DiffusionTask(tiny_unet(), ddpm(), measure=names[1], weighting=how), IMAGES[:2], None, **options)
        for how in (rs.MinSNR(), None)
    )
    np.testing.assert_array_equal(one.sketches("a"), plain.sketches("a"))
    np.testing.assert_array_equal(one.losses("a"), plain.losses("a"))  # mean squared errors, as DAS takes them
    rs.build_index(one, rs.DTRAK(pairing="matched"))


def test_labels_and_images_of_an_item_reach_the_model() -> None:
    task = rs.DiffusionTask(tiny_dit(), ddpm())
    image, given = task.check_item(0, (IMAGES[0], 3))
    assert torch.equal(image, IMAGES[0])
    assert int(given["class_labels"]) == 3
    assert copy.deepcopy(rs.DiffusionTask(tiny_unet(), ddpm())).check_item(0, (IMAGES[0], 3))[1] == {}


class Labelled(Linear):
    """A model of one's own that takes labels, and none if it is given none."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        prediction = super().forward(sample, timestep)
        return prediction if class_labels is None else prediction + class_labels[:, None, None, None]


def test_labels_reach_models_that_are_not_of_diffusers() -> None:
    labels = torch.arange(N)
    task = rs.DiffusionTask(Labelled(), ddpm())
    given = [task.check_item(row, (IMAGES[row], row))[1] for row in range(N)]
    assert [int(conditioning["class_labels"]) for conditioning in given] == labels.tolist()
    assert rs.DiffusionTask(Linear(), ddpm()).check_item(0, (IMAGES[0], 3))[1] == {}
    called = rs.DiffusionTask(Linear(), ddpm(), call=lambda model, noisy, times, given: model(noisy, times))
    assert int(called.check_item(0, (IMAGES[0], 3))[1]["class_labels"]) == 3


def test_schedulers_with_other_noise_levels_are_told_apart() -> None:
    tables = [np.linspace(1e-4, high, 100).tolist() for high in (0.02, 0.1)]
    first, second = (scheduler_spec(DDPMScheduler(100, trained_betas=betas)) for betas in tables)
    assert first != second
    shifted, plain = (scheduler_spec(CogVideoXDDIMScheduler(snr_shift_scale=scale)) for scale in (3.0, 1.0))
    assert shifted != plain


def test_a_scheduler_given_its_length_by_position_is_the_one_given_it_by_name() -> None:
    by_position, by_name = (
        rs.DiffusionTask(tiny_unet(), one) for one in (DDPMScheduler(100), DDPMScheduler(num_train_timesteps=100))
    )
    assert by_position.forward == by_name.forward


def test_items_that_bring_no_numbers_or_not_all_the_same_are_named() -> None:
    task = rs.DiffusionTask(Labelled(), ddpm())
    for value in ("birds/1.png", None):
        with pytest.raises(ValueError, match=r"item 0 gives a .* for 'path', where the model takes numbers"):
            task.check_item(0, {"image": IMAGES[0], "path": value})
    items = [{"image": IMAGES[0]}, {"image": IMAGES[1], "label": 1}]
    options: Any = {"checkpoints": {"last": dict(task.model.state_dict())}, "timesteps": rs.Explicit([5])}
    with pytest.raises(FailedTasksError, match=r"sample 1 brings \['class_labels'\] and sample 0 \[\]"):
        rs.sketch(task, items, None, projection=rs.Identity(), batch_size=2, progress=False, **options)


def test_a_schedulers_betas_may_be_an_array() -> None:
    betas = np.linspace(1e-4, 0.02, 10)
    model, images = tiny_unet(), random_images(2)
    stores = [
        rs.sketch(
            rs.DiffusionTask(model, DDPMScheduler(10, trained_betas=given)),
            images,
            None,
            checkpoints={"last": dict(model.state_dict())},
            timesteps=rs.Explicit([3]),
            projection=rs.CountSketch(8),
            batch_size=2,
            progress=False,
        )
        for given in (betas, betas.tolist())
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].fingerprint["scheduler"]["trained_betas"] == betas.tolist()
