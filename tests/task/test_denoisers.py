"""Wrapped, subclassed and home-made denoisers: told what their training tells them, by float64 autograd, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import (
    AuraFlowTransformer2DModel,
    ConfigMixin,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeliosScheduler,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import retrac_scale as rs
from retrac_scale.task.calling import call_model
from retrac_scale.task.denoisers import unwrapped
from tests.conftest import CONDITIONAL, random_images, tiny_dit, tiny_unet
from tests.oracle import gradient

N, STEP = 3, 40
IMAGES = random_images(N)
SCHEDULER: Any = DDPMScheduler(num_train_timesteps=100)


class Net(nn.Module):
    """A classifier-free labelled denoiser of one's own: without a label it takes the last one."""

    def __init__(self, classes: int = N) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.table = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(classes + 1, 1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        labels = torch.full((len(x),), len(self.table.weight) - 1) if class_labels is None else class_labels
        return self.conv(x) * (1 + self.table(labels) + t[:, None].to(x.dtype) / 100)[..., None, None]


class Own(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """In diffusers' manner, with a configuration whose keys are its author's."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_classes: int = N, in_channels: int = 7, sample_size: int = 5) -> None:
        super().__init__()
        self.net = Net(num_classes)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> tuple[Tensor]:
        return (self.net(sample, timestep, class_labels),)


class LabelledUNet(UNet2DModel):  # type: ignore[misc]
    """A subclass whose own forward does with labels what the configuration of its base knows nothing of."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
        return super().forward(sample * (1 + class_labels[:, None, None, None]), timestep, return_dict=return_dict)


def labelled_unet() -> nn.Module:
    base: Any = tiny_unet()
    model: nn.Module = LabelledUNet.from_config(base.config)
    model.load_state_dict(base.state_dict())
    return model


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def with_lora(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = get_peft_model(model, LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False))
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda model: model,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile in place": in_place,
    "average": AveragedModel,
    "PEFT": with_lora,
    "compiled DDP with PEFT": lambda model: torch.compile(DistributedDataParallel(with_lora(model)), backend="eager"),
}


def norms(model: nn.Module, data: Any, scheduler: Any = SCHEDULER, step: int = STEP, **options: Any) -> Any:
    task = rs.DiffusionTask(model, scheduler, **options)
    store = rs.sketch(
        task,
        data,
        None,
        checkpoints={"a": dict(task.model.state_dict())},
        timesteps=rs.Explicit([step]),
        projection=rs.CountSketch(64),
        dtype="float32",
        progress=False,
    )
    return store.norms("a").ravel()


def labelled_norms(model: nn.Module, step: int = STEP) -> list[float]:
    """By the wrapper's own forward, float64, one image at a time; of its trainable parameters."""
    model, found = copy.deepcopy(model).double(), []
    for i, image in enumerate(IMAGES.double()):
        a = SCHEDULER.alphas_cumprod[step].double()
        noise = rs.draw_noise(image.shape, None, [step], 0).double()
        out = model(a.sqrt() * image[None] + (1 - a).sqrt() * noise, torch.tensor([step]), torch.tensor([i]))
        out = out if isinstance(out, Tensor) else out[0]
        found.append(float(gradient(model, (out - noise).square().mean()).norm()))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", list(WRAPPERS))
@pytest.mark.parametrize("make", [Net, Own, pytest.param(labelled_unet, marks=pytest.mark.slow)])
def test_labels_reach_every_model_that_takes_them_whatever_is_wrapped_around_it(make: Any, wrapper: str) -> None:
    if "PEFT" in wrapper and make is labelled_unet:
        pytest.skip("no layer of it is called conv")
    plain = make()
    expected = labelled_norms(with_lora(plain) if "PEFT" in wrapper else plain)
    wrapped = WRAPPERS[wrapper](make())
    data = [{"image": image, "label": i} for i, image in enumerate(IMAGES)]
    if "PEFT" in wrapper:  # whose adapters are drawn anew
        named = {key.removeprefix("base_model.model."): value for key, value in with_lora(make()).state_dict().items()}
        unwrapped(wrapped).load_state_dict(named)
        again = with_lora(make())
        again.load_state_dict({f"base_model.model.{key}": value for key, value in named.items()})
        expected = labelled_norms(again)
    np.testing.assert_allclose(norms(wrapped, data), expected, rtol=2e-4)


def test_wrappers_that_cannot_be_taken_off_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # others of this process may have made theirs
    adaptive: Any = get_peft_model(tiny_dit(), AdaLoraConfig(target_modules=["to_q"], total_step=10))
    with pytest.raises(ValueError, match=r"PEFT's AdaLoraModel, whose own forward does more.*get_base_model"):
        rs.DiffusionTask(adaptive, SCHEDULER)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(Net())
    with pytest.raises(ValueError, match=r"mixed precision around the model's forward.*keep_fp32_wrapper=False"):
        rs.DiffusionTask(prepared, SCHEDULER)
    rs.DiffusionTask(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), SCHEDULER, autocast="bfloat16")


class Through(nn.Module):
    """A wrapper that nobody knows, and whose signature tells nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_a_wrapper_whose_signature_tells_nothing_passes_on_what_the_items_bring() -> None:
    data = [(image, i) for i, image in enumerate(IMAGES)]
    np.testing.assert_allclose(norms(Through(Net()), data), labelled_norms(Net()), rtol=1e-4)
    with pytest.raises(ValueError, match=r"item 0 brings a prompt, but the task has no text encoder"):
        norms(Through(Net()), [(IMAGES[0], "a cat")])


class OtherLabels(nn.Module):
    """Takes labels, and a time, by names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None = None) -> Any:
        return self.net(x, sigma, y)


@pytest.mark.parametrize(
    ("make", "item", "message"),
    [
        (OtherLabels, (IMAGES[0], 1), r"item 0 brings a label, and 'class_labels' is none of .*\(y\)"),
        (OtherLabels, {"image": IMAGES[0], "class_labels": 1}, r"brings 'class_labels', which is none of .*\(y\)"),
        (OtherLabels, {"image": IMAGES[0], "sigma": 1.0}, "brings 'sigma'"),
        (OtherLabels, {"image": IMAGES[0], "x": 1.0}, "brings 'x'"),
        (OtherLabels, {"image": IMAGES[0], "text": "a cat"}, "brings a prompt, but the task has no text encoder"),
        (Net, {"image": IMAGES[0], "t": 7}, "brings 't'"),
        (Net, {"image": IMAGES[0], "label": 1, "weight": 2.0}, r"brings 'weight', which is none .*\(class_labels\)"),
        (tiny_unet, {"image": IMAGES[0], "timestep": 7}, "brings 'timestep'"),
        (tiny_unet, {"image": IMAGES[0], "return_dict": 1}, "brings 'return_dict'"),
        (tiny_unet, {"image": IMAGES[0], "pooled.text_embeds": 1.0}, "brings 'pooled.text_embeds'"),
        (Through, {"image": IMAGES[0], "return_dict": 1}, "brings 'return_dict'"),
        (Net, (IMAGES[0], 1, 2), r"item 0 is a tuple of 3; give \(image, label\)"),
        (Net, {"image": IMAGES[0], "label": 1, "labels": 2}, "brings both 'label' and 'labels'"),
        (Net, {"image": IMAGES[0], "label": 1, "class_labels": 2}, "brings both a label and 'class_labels'"),
        (Net, {"image": IMAGES[0], "label": None}, "gives None for 'label'"),
        (Net, {"image": IMAGES[0], "text": ["a", "b"]}, "gives a list for its prompt; give one string"),
    ],
)
def test_what_no_argument_takes_is_an_error_that_names_it(make: Any, item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norms(make(Net()) if make is Through else make(), [item])


def test_a_label_can_be_given_by_the_name_that_the_model_has_for_it() -> None:
    data = [{"image": image, "y": i} for i, image in enumerate(IMAGES)]
    np.testing.assert_allclose(norms(OtherLabels(), data), labelled_norms(OtherLabels()), rtol=1e-4)


def test_labels_and_prompts_are_left_aside_where_a_model_surely_takes_none() -> None:
    plain = norms(tiny_unet(), list(IMAGES))
    for data in ([(image, 3) for image in IMAGES], [{"image": image, "label": 3, "text": "a"} for image in IMAGES]):
        np.testing.assert_array_equal(norms(tiny_unet(), data), plain)


def test_time_is_not_the_conditionings_to_give() -> None:
    with pytest.raises(ValueError, match="argument 't' is not the items' to give"):
        call_model(Net(), IMAGES, torch.full((N,), STEP), {"t": torch.zeros(N)})


def test_a_prediction_of_another_shape_is_not_broadcast() -> None:
    task = rs.DiffusionTask(Net(), SCHEDULER, call=lambda model, noisy, times, given: model(noisy, times)[..., :1])
    with pytest.raises(ValueError, match=r"predicts \(3, 1, 8, 1\) where \(3, 1, 8, 8\) is expected"):
        task.losses(IMAGES, torch.full((N,), STEP), IMAGES, {})


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1.0, "label 1.0; give the number of a class"),
        (torch.tensor([1]), r"item 0 has label \[1\]; give the number of a class, one integer"),
        (4, "knows 4 classes"),
    ],
)
def test_labels_that_are_no_class_are_named(label: Any, message: str) -> None:
    model = UNet2DModel.from_config(tiny_unet().config, num_class_embeds=4)
    with pytest.raises(ValueError, match=message):
        norms(model, [(IMAGES[0], label)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_items_are_widened_to_the_weights_type_before_anything_is_computed(dtype: torch.dtype) -> None:
    class Shifted(Net):
        def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Any:  # type: ignore[override]
            assert x.dtype == shift.dtype == torch.float32
            return super().forward(x + shift[:, None, None, None], t)

    values, shifts = IMAGES.to(dtype), torch.tensor([0.1, 0.2, 0.3]).to(dtype)
    pairs = zip(values, shifts, strict=True)
    wide = [{"image": value.float(), "shift": shift.float()} for value, shift in pairs]
    given = [{"image": value, "shift": shift} for value, shift in zip(values, shifts, strict=True)]
    np.testing.assert_array_equal(norms(Shifted(), given), norms(Shifted(), wide))


AURA: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "caption_projection_dim": 16,
    "out_channels": 4,
    "pos_embed_max_size": 64,
}


class Finetuned(AuraFlowTransformer2DModel):  # type: ignore[misc]
    """A user's subclass."""


def aura(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(**AURA)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
@pytest.mark.parametrize("kind", [AuraFlowTransformer2DModel, Finetuned])
def test_a_subclass_is_told_time_as_its_base_is(kind: Any, wrap: Any) -> None:
    """AuraFlowPipeline: timestep / 1000."""
    torch.manual_seed(5)
    latents, text = torch.randn(4, 8, 8), torch.randn(5, 8)
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=1.73)
    found = norms(wrap(aura(kind)), [{"latents": latents, "encoder_hidden_states": text}], scheduler, 500)
    model, s = aura(kind).double(), float(scheduler.timesteps[999 - 500]) / 1000
    noise = rs.draw_noise((4, 8, 8), None, [500], 0).double()
    noisy, level = (1 - s) * latents.double() + s * noise, torch.tensor([s], dtype=torch.float64)
    out = model(noisy, encoder_hidden_states=text[None].double(), timestep=level, return_dict=False)[0]
    expected = gradient(model, (out - (noise - latents)).square().mean()).norm()
    np.testing.assert_allclose(found, [float(expected)], rtol=1e-4)


def test_a_class_that_is_not_known_and_holds_or_imitates_one_that_is_told_otherwise_is_refused() -> None:
    flow = FlowMatchEulerDiscreteScheduler(1000)

    class FluxTransformer2DModel(Net):  # a copy of a file of diffusers, say
        pass

    with pytest.raises(ValueError, match=r"Through, holds a Finetuned, so how it takes images and time"):
        rs.DiffusionTask(Through(aura(Finetuned)), flow)
    with pytest.raises(ValueError, match=r"is called FluxTransformer2DModel but is not the one of diffusers"):
        rs.DiffusionTask(FluxTransformer2DModel(), flow)
    task = rs.DiffusionTask(
        Through(aura(Finetuned)), flow, call=lambda model, noisy, times, given: model(noisy, times, **given)
    )
    assert task.forward["noising"] == "T s -> e - x"


def test_a_subclass_of_flux_gets_tokens() -> None:
    class Mine(FluxTransformer2DModel):  # type: ignore[misc]
        pass

    config: dict[str, Any] = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**config, axes_dims_rope=(2, 2, 4)).eval()
    mine = Mine.from_config(model.config).eval()
    mine.load_state_dict(model.state_dict())
    given = {"encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8)}
    noisy, times = torch.randn(2, 2, 8, 4), torch.tensor([0.5, 0.25])
    assert torch.equal(call_model(model, noisy, times, given), call_model(mine, noisy, times, given))


def continuous(prediction_type: str) -> Any:
    """As stabilityai/stable-video-diffusion-img2vid configures it."""
    return EulerDiscreteScheduler(
        num_train_timesteps=100,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )


def test_continuous_timesteps_are_those_of_karras_et_al() -> None:
    """x + s e scaled by 1 / sqrt(s^2 + 1), told log(s) / 4, towards v: written out with s, in float64."""
    scheduler = continuous("v_prediction")
    told = rs.DiffusionTask(tiny_unet(), scheduler).noising.times(torch.arange(100))
    torch.testing.assert_close(told, scheduler.timesteps.flip(0).float(), rtol=1e-5, atol=1e-6)
    found, expected = norms(tiny_unet(), list(IMAGES), scheduler), []
    for image in IMAGES.double():
        model, a = tiny_unet().double(), scheduler.alphas_cumprod[STEP].double()
        s, noise = ((1 - a) / a).sqrt(), rs.draw_noise(image.shape, None, [STEP], 0).double()
        out = model((image + s * noise) / (s**2 + 1).sqrt(), (s.log() / 4)[None], return_dict=False)[0]
        loss = (out - (noise - s * image) / (s**2 + 1).sqrt()).square().mean()
        expected.append(float(gradient(model, loss).norm()))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    discrete = rs.DiffusionTask(tiny_unet(), continuous("epsilon"))  # EulerDiscreteScheduler tells integers then
    assert discrete.noising.times(torch.tensor([STEP])).tolist() == [STEP]


def shifted() -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(5.0)
    return scheduler


class OtherNoise(DDPMScheduler):  # type: ignore[misc]
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Any:
        return original_samples + noise * self.alphas_cumprod[timesteps, None]


class SameNoise(DDPMScheduler):  # type: ignore[misc]
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Any:
        return super().add_noise(original_samples, noise, timesteps)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (shifted(), r"shift was set to 5.0, its configuration says 1.0.*from_config"),
        (OtherNoise(), r"OtherNoise.add_noise does something else than sqrt\(a\) x"),
        (UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True), "prediction_type 'sample'; only"),
        (HeliosScheduler(), "HeliosScheduler noises in 3 stages"),
    ],
)
def test_schedulers_that_tell_two_things_of_the_training_are_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rs.DiffusionTask(tiny_unet(), scheduler)


def test_subclasses_of_schedulers_are_what_their_bases_are() -> None:
    class Mine(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        pass

    told = rs.DiffusionTask(Net(), Mine(100, shift=3.0)).noising.described
    assert told == rs.DiffusionTask(Net(), FlowMatchEulerDiscreteScheduler(100, shift=3.0)).noising.described
    rs.DiffusionTask(Net(), SameNoise())


def test_a_forward_put_in_the_place_of_a_models_own_is_the_one_that_is_asked() -> None:
    model = tiny_unet()
    own = model.forward

    def forward(self: Any, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        return own(sample * (1 + class_labels[:, None, None, None]), timestep)

    model.forward = MethodType(forward, model)
    data = [(image, i) for i, image in enumerate(IMAGES)]
    np.testing.assert_allclose(norms(model, data), labelled_norms(labelled_unet()), rtol=1e-4)


def test_what_a_model_needs_and_an_item_does_not_bring_is_named() -> None:
    conditional = UNet2DConditionModel(**CONDITIONAL)
    for model, item, lacking in (
        (conditional, IMAGES[0], "encoder_hidden_states"),
        (UNet2DModel.from_config(tiny_unet().config, num_class_embeds=3), IMAGES[0], "class_labels"),
        (tiny_dit(), IMAGES[0], "class_labels"),
    ):
        with pytest.raises(ValueError, match=f"item 0 brings no '{lacking}', which the model's forward needs"):
            rs.DiffusionTask(model, SCHEDULER).read_item(0, item)
    whole = {"image": IMAGES[0], "encoder_hidden_states": torch.randn(3, 8)}
    assert rs.DiffusionTask(conditional, SCHEDULER).read_item(0, whole).label is None


def test_embeddings_are_converted_to_weights_of_16_bits() -> None:
    model, text = UNet2DConditionModel(**CONDITIONAL), torch.randn(N, 3, 8)
    data = [{"image": image, "encoder_hidden_states": words} for image, words in zip(IMAGES, text, strict=True)]
    full = norms(model, data)
    narrow = [{**item, "image": item["image"].bfloat16()} for item in data]
    np.testing.assert_allclose(norms(model.bfloat16(), narrow), full, rtol=0.02)
