"""Tiny pipelines of every kind, trained a few steps on generated data and queried."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import retrac_scale as rs
from retrac_scale.task.encoding import Encoder
from tests.conftest import tiny_unet

SAMPLES, STEPS = 5, 2
PROMPTS = ["a cat", "two dogs", "the sea", "a dark wood", "snow"]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def pixels(*shape: int) -> Tensor:
    """One smooth image or video for each sample, in -1 .. 1."""
    values = np.random.default_rng(0).standard_normal((SAMPLES, *shape), dtype=np.float32)
    return torch.from_numpy(values).tanh()


def vae(channels: int = 4) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.1,
    )


def tokenizer() -> Any:
    letters = [chr(code) for code in range(97, 123)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: number for number, token in enumerate(tokens)}, [], model_max_length=8)


def text_encoder(kind: Any = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=8,
        bos_token_id=52,
        eos_token_id=53,
    )
    return kind(config)


def unet(**options: Any) -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        **options,
    )


BETAS: dict[str, Any] = {"num_train_timesteps": 100, "beta_schedule": "scaled_linear", "beta_end": 0.1}


def stable_diffusion(folder: Path, **extra: Any) -> None:
    kind = StableDiffusionControlNetPipeline if extra else StableDiffusionPipeline
    kind(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(),
        scheduler=EulerDiscreteScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **extra,
    ).save_pretrained(folder)


def train(task: rs.DiffusionTask, dataset: Any) -> dict[str, Mapping[str, Tensor]]:
    """A few steps of Adam on all trainable parameters; their values after the first and the last."""
    items = [task.check_item(row, dataset[row]) for row in range(len(dataset))]
    samples = torch.stack([sample for sample, _ in items])
    conditioning = {name: torch.stack([given[name] for _, given in items]) for name in items[0][1]}
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    states: dict[str, Mapping[str, Tensor]] = {}
    for step in range(1, STEPS + 1):
        timesteps = torch.randint(task.num_train_timesteps, (len(samples),), generator=generator)
        noise = torch.randn(samples.shape, generator=generator)
        optimizer.zero_grad()
        task.losses(samples, timesteps, noise, conditioning).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        states[f"step-{step}"] = {name: value.clone() for name, value in task.model.state_dict().items()}
    return states


def trained_and_asked(task: rs.DiffusionTask, dataset: Any, checkpoints: Any = None) -> rs.SketchStore:
    """Train, check every gradient, sketch and query: each sample's own gradient points the most its own way."""
    states = train(task, dataset)
    check = rs.check_model(task, [dataset[0], dataset[1]])
    assert check.exact, str(check)
    # the same noise on both sides, so that a query and its training sample have one gradient
    options: Any = {"checkpoints": checkpoints or states, "timesteps": rs.Explicit([50], seed=0), "progress": False}
    store = rs.sketch(task, dataset, None, projection=rs.Identity(), dtype="float32", **options)
    queries = rs.sketch(task, dataset, None, like=store, dtype="float32", **options)
    answer = rs.build_index(store, rs.ReTrac(), None).query(queries, k=2)
    assert answer.ids[:, 0].tolist() == list(range(SAMPLES))
    np.testing.assert_allclose(answer.scores[:, 0], len(options["checkpoints"]), rtol=5e-3)  # rows of int8
    assert (answer.scores[:, 1] < answer.scores[:, 0]).all()
    return store


class Items(list[Any]):
    """A list of dataset items."""


def captioned(images: Tensor) -> Items:
    return Items({"pixel_values": image, "text": prompt} for image, prompt in zip(images, PROMPTS, strict=True))


def test_an_unconditional_unet(tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet(), DDPMScheduler(**BETAS)).save_pretrained(tmp_path)
    trained_and_asked(rs.DiffusionTask.from_pretrained(tmp_path, measure="l1"), pixels(1, 8, 8))


def test_a_class_conditional_dit_that_predicts_variances_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    DiTPipeline(model, vae(), DDIMScheduler(**BETAS), {0: "x"}).save_pretrained(tmp_path)
    dataset = Items((image, label) for label, image in enumerate(pixels(3, 16, 16)))
    trained_and_asked(rs.DiffusionTask.from_pretrained(tmp_path, weighting=rs.MinSNR()), dataset)


def test_a_stable_diffusion_with_prompts_encoded_on_the_fly_and_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "model")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model")
    dataset = captioned(pixels(3, 16, 16))
    store = trained_and_asked(task, dataset)
    encoded = rs.encode(task, dataset, tmp_path / "encoded.zarr", progress=False)
    assert set(encoded[0]) == {"latents", "encoder_hidden_states"}
    options: Any = {"checkpoints": train(task, encoded), "timesteps": rs.Explicit([50]), "progress": False}
    again = rs.sketch(task, encoded, None, projection=rs.Identity(), dtype="float32", **options)
    direct = rs.sketch(task, dataset, None, projection=rs.Identity(), dtype="float32", **options)
    assert store.shape == again.shape
    np.testing.assert_array_equal(again.sketches("step-1"), direct.sketches("step-1"))


def test_a_corrected_caption_never_gives_the_embeddings_or_the_sketches_of_the_old_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "model")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model")
    before = [(image, prompt) for image, prompt in zip(pixels(3, 16, 16), PROMPTS, strict=True)]
    after = [*before[:3], (before[3][0], "a light wood"), before[4]]
    rs.encode(task, before, tmp_path / "encoded.zarr", progress=False)
    weights = {name: value.clone() for name, value in task.model.state_dict().items()}
    options: Any = {"checkpoints": {"a": weights}, "timesteps": rs.Explicit([50]), "progress": False}
    rs.sketch(task, before, tmp_path / "store", **options)
    with pytest.raises(rs.ChangedItemsError, match="differ, 3; encode them anew"):
        rs.encode(task, after, tmp_path / "encoded.zarr", progress=False)
    with pytest.raises(rs.ChangedItemsError, match="differ, 3; sketch them anew"):
        rs.sketch(task, after, tmp_path / "store", **options)
    encoded = rs.encode(task, after, tmp_path / "encoded.zarr", replace=True, progress=False)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    for row, (_, prompt) in enumerate(after):
        options_of_tokens = {"max_length": 8, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        with torch.no_grad():
            tokens = pipeline.tokenizer(prompt, **options_of_tokens)
            embeddings = pipeline.text_encoder(tokens.input_ids, return_dict=False)[0]
        torch.testing.assert_close(encoded[row]["encoder_hidden_states"], embeddings[0])


def test_latents_and_embeddings_are_those_of_diffusers_training_example(tmp_path: Path) -> None:
    """examples/text_to_image/train_text_to_image.py, but for the draw from the VAE's posterior."""
    torch.manual_seed(0)
    stable_diffusion(tmp_path)
    task = rs.DiffusionTask.from_pretrained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    image = pixels(3, 16, 16)[0]
    sample, given = task.check_item(0, (image, "a cat"))
    with torch.no_grad():
        posterior = pipeline.vae.encode(image[None]).latent_dist
        tokens = pipeline.tokenizer("a cat", max_length=8, padding="max_length", truncation=True, return_tensors="pt")
        embeddings = pipeline.text_encoder(tokens.input_ids, return_dict=False)[0]
    torch.testing.assert_close(sample, (posterior.mode()[0] - 0.1) * 0.5)
    torch.testing.assert_close(given["encoder_hidden_states"], embeddings[0])


def test_encoding_goes_on_where_it_was_stopped_and_refuses_other_samples(tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet(), DDPMScheduler(**BETAS)).save_pretrained(tmp_path / "model")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model")
    images = pixels(1, 8, 8).repeat(20, 1, 1, 1)

    class Stops(Items):
        def __getitem__(self, row: Any) -> Any:
            if row == 70:
                raise KeyboardInterrupt
            return super().__getitem__(row)

    out = tmp_path / "encoded.zarr"
    with pytest.raises(KeyboardInterrupt):
        rs.encode(task, Stops(images), out, progress=False)
    asked: list[int] = []

    class Counts(Items):
        def __getitem__(self, row: Any) -> Any:
            asked.append(row)
            return super().__getitem__(row)

    encoded = rs.encode(task, Counts(images), out, progress=False)
    assert asked == list(range(100))  # those that were encoded are compared
    assert all(torch.equal(encoded[row]["latents"], images[row]) for row in range(100))
    with pytest.raises(ValueError, match="encoded from other samples"):
        rs.encode(task, Items(images[:50]), out, progress=False)


def test_a_chunk_of_encoded_samples_is_read_once_when_they_are_asked_for_in_order() -> None:
    chunks: list[str] = []

    class Counting(zarr.storage.MemoryStore):
        async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
            chunks.extend([key] if "/c/" in key else [])
            return await super().get(key, *arguments, **options)

    task = rs.DiffusionTask(tiny_unet(), DDPMScheduler(**BETAS))
    images = pixels(1, 8, 8).repeat(20, 1, 1, 1)
    encoded = rs.encode(task, Items(images), Counting(), progress=False)  # type: ignore[arg-type]
    chunks.clear()
    assert all(torch.equal(encoded[row]["latents"], images[row]) for row in range(100))
    assert len(chunks) == 2
    encoded[0]["latents"].zero_()  # an item belongs to whoever asked for it
    assert torch.equal(encoded[0]["latents"], images[0])
    assert torch.equal(encoded[-1]["latents"], images[-1])


def test_a_stable_diffusion_with_lora_adapters_whose_checkpoints_are_adapter_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "model")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "model/unet")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))

    def save(folder: Path) -> None:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(model),
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )

    save(tmp_path / "run/checkpoint-2")
    dataset = captioned(pixels(3, 16, 16))
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model", lora=tmp_path / "run/checkpoint-2")
    for _, parameter in (pair for pair in model.named_parameters() if "lora_" in pair[0]):
        nn.init.normal_(parameter, std=0.1)
    save(tmp_path / "run/checkpoint-10")
    checkpoints = rs.find_checkpoints(tmp_path / "run")
    assert list(checkpoints) == ["checkpoint-2", "checkpoint-10"]
    store = trained_and_asked(task, dataset, checkpoints)
    assert all("lora_" in name for name in store.fingerprint["parameters"])
    assert len(set(store.fingerprint["checkpoints"].values())) == 2
    task.load("last", tmp_path / "run/checkpoint-10")
    sample, timestep, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 8, 8)
    torch.testing.assert_close(task.model(sample, timestep, text).sample, model.eval()(sample, timestep, text).sample)


def test_lora_adapters_in_a_folder_that_peft_wrote(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stable_diffusion(tmp_path / "model")
    base = UNet2DConditionModel.from_pretrained(tmp_path / "model/unet")
    adapted = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model", lora=tmp_path / "adapter")
    trained = [name for name, parameter in task.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    sample, timestep, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 8, 8)
    expected = adapted.eval()(sample, timestep, text).sample
    torch.testing.assert_close(task.model(sample, timestep, text).sample, expected)
    task.load("again", tmp_path / "adapter")
    torch.testing.assert_close(task.model(sample, timestep, text).sample, expected)


def test_a_controlnet_beside_a_frozen_unet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(8, 8))
    stable_diffusion(tmp_path, controlnet=controlnet)
    task = rs.DiffusionTask.from_pretrained(tmp_path, component="controlnet")
    images = pixels(3, 16, 16)
    dataset = Items(
        item | {"controlnet_cond": image.flip(-1)} for item, image in zip(captioned(images), images, strict=True)
    )
    store = trained_and_asked(task, dataset)
    assert all(
        name.startswith(("controlnet", "conv_in", "down", "mid", "time")) for name in store.fingerprint["parameters"]
    )


def test_a_flow_matching_transformer_of_stable_diffusion_3(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(100, shift=3.0),
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(tmp_path)
    weighting = rs.SD3Weighting("logit_normal", precondition_outputs=True)
    task = rs.DiffusionTask.from_pretrained(tmp_path, weighting=weighting)
    encoded = rs.encode(task, captioned(pixels(3, 16, 16)), tmp_path / "encoded.zarr", progress=False)
    assert encoded[0]["pooled_projections"].shape == (16,)
    trained_and_asked(task, encoded)


def test_a_flow_matching_video_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        rope_max_seq_len=16,
    )
    video_vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=video_vae,
        scheduler=UniPCMultistepScheduler(100, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    ).save_pretrained(tmp_path)
    task = rs.DiffusionTask.from_pretrained(tmp_path)
    texts = torch.from_numpy(np.random.default_rng(1).standard_normal((SAMPLES, 6, 8), dtype=np.float32))
    dataset = Items(
        {"video": video, "encoder_hidden_states": text} for video, text in zip(pixels(3, 5, 16, 16), texts, strict=True)
    )
    assert task.check_item(0, dataset[0])[0].shape == (4, 2, 2, 2)
    trained_and_asked(task, dataset)


def test_stores_of_another_vae_text_encoder_or_frozen_unet_do_not_mix(tmp_path: Path) -> None:
    dataset = captioned(pixels(3, 16, 16))
    tasks = []
    for name in ("one", "other"):
        torch.manual_seed(0)
        stable_diffusion(tmp_path / name)
        tasks.append(rs.DiffusionTask.from_pretrained(tmp_path / name))
    one, other = tasks
    options: Any = {"timesteps": rs.Explicit([50]), "progress": False, "batch_size": 4}
    options["checkpoints"] = {"last": dict(one.model.state_dict())}
    path = tmp_path / "store.zarr"
    store = rs.sketch(one, dataset, path, projection=rs.CountSketch(8), **options)
    rs.sketch(other, dataset, None, like=store, **options)  # another folder, the same weights
    encoded = rs.encode(one, dataset, tmp_path / "encoded.zarr", progress=False)
    assert other.encoder is not None
    text_encoder = other.encoder.pipeline.text_encoder
    with torch.no_grad():
        next(text_encoder.parameters()).add_(1)
    other = rs.DiffusionTask(other.model, other.scheduler, encoder=Encoder(other.encoder.pipeline))
    with pytest.raises(ValueError, match=r"frozen\.text_encoder is"):
        rs.sketch(other, dataset, None, like=store, **options)
    with pytest.raises(ValueError, match=r"frozen\.text_encoder is"):
        rs.sketch(other, dataset, path, projection=rs.CountSketch(8), **options)
    with pytest.raises(ValueError, match="was encoded by another text_encoder"):
        rs.encode(other, dataset, tmp_path / "encoded.zarr", progress=False)
    rs.sketch(other, encoded, None, like=store, **options)  # latents and embeddings are those of the one
    rs.sketch(rs.DiffusionTask(other.model, other.scheduler), encoded, None, like=store, **options)


def test_the_scale_of_latents_and_of_adapters_is_part_of_what_was_measured() -> None:
    class Pipeline:
        def __init__(self, factor: float) -> None:
            torch.manual_seed(0)
            model = vae()
            model.register_to_config(scaling_factor=factor)
            self.vae, self.components = model, {"vae": model}

    assert Encoder(Pipeline(0.5)).digests == Encoder(Pipeline(0.5)).digests != Encoder(Pipeline(0.2)).digests

    def adapted(alpha: float) -> str:
        torch.manual_seed(0)
        model = unet()
        model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights=False))
        return rs.DiffusionTask(model, DDPMScheduler(**BETAS)).load("last", model.state_dict())

    assert adapted(2) == adapted(2) != adapted(8)


def test_a_frozen_unet_is_part_of_what_a_controlnet_was_measured_with() -> None:
    torch.manual_seed(0)
    beside, changed = unet(), unet()
    controlnet = ControlNetModel.from_unet(beside, conditioning_embedding_out_channels=(8, 8))
    tasks = [rs.DiffusionTask(controlnet, DDPMScheduler(**BETAS), call=rs.ThroughUNet(u)) for u in (beside, changed)]
    assert tasks[0].frozen != tasks[1].frozen


def test_encoding_leaves_alone_what_is_no_encoded_dataset(tmp_path: Path) -> None:
    store = rs.write_store(tmp_path / "store", {"last": np.ones((2, 1, 4), np.float32)})
    task = rs.DiffusionTask(tiny_unet(), DDPMScheduler(**BETAS))
    with pytest.raises(ValueError, match="no encoded dataset"):
        rs.encode(task, Items(pixels(1, 8, 8)), tmp_path / "store", progress=False)
    assert rs.open_store(tmp_path / "store").shape == store.shape


def test_sdxl_is_told_the_size_of_pixels_whether_they_come_encoded_or_not() -> None:
    denoiser = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=denoiser,
        scheduler=DDPMScheduler(**BETAS),
    )
    task = rs.DiffusionTask(denoiser, pipeline.scheduler, encoder=Encoder(pipeline))
    latents, told = task.check_item(0, {"pixel_values": pixels(3, 16, 16)[0], "text": "a cat"})
    _, again = task.check_item(0, {"latents": latents, "text": "a cat"})
    assert told["added_cond_kwargs.time_ids"].tolist() == [16, 16, 0, 0, 16, 16]
    assert torch.equal(again["added_cond_kwargs.time_ids"], told["added_cond_kwargs.time_ids"])


LAYOUTS: dict[str, Callable[[Any, Path], None]] = {
    "unet": lambda model, folder: model.save_pretrained(folder / "unet"),
    "safetensors": lambda model, folder: save_file(model.state_dict(), folder / "model.safetensors"),
    "shards": lambda model, folder: model.save_pretrained(folder / "unet", max_shard_size="50KB"),
    "torch": lambda model, folder: torch.save(model.state_dict(), folder / "pytorch_model.bin"),
    "wrapped": lambda model, folder: save_file(
        {f"module.{name}": value for name, value in model.state_dict().items()}, folder / "model.safetensors"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_are_found_in_the_layouts_that_training_examples_write(tmp_path: Path, layout: str) -> None:
    task = rs.DiffusionTask(tiny_unet(), DDPMScheduler(**BETAS))
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    LAYOUTS[layout](tiny_unet(1), folder)
    digest = task.load("found", rs.find_checkpoints(tmp_path)["checkpoint-500"])
    assert digest == task.load("given", tiny_unet(1).state_dict())


def test_averaged_weights_are_taken_when_asked_for_and_missed_by_name(tmp_path: Path) -> None:
    for number in (20, 100):
        for seed, subfolder in enumerate(["unet", "unet_ema"]):
            model: Any = tiny_unet(seed)
            model.save_pretrained(tmp_path / f"checkpoint-{number}" / subfolder)
    task = rs.DiffusionTask(tiny_unet(), DDPMScheduler(**BETAS))
    found = rs.find_checkpoints(tmp_path, ema=True)
    assert list(found) == ["checkpoint-20", "checkpoint-100"]
    assert task.load("ema", found["checkpoint-20"]) == task.load("given", tiny_unet(1).state_dict())
    shutil.rmtree(tmp_path / "checkpoint-100/unet_ema")
    with pytest.raises(ValueError, match=r"'checkpoint-100'.*unet_ema"):
        rs.find_checkpoints(tmp_path, ema=True)


def test_what_cannot_be_loaded_is_refused_with_what_to_do(tmp_path: Path) -> None:
    task = rs.DiffusionTask(tiny_unet(), DDPMScheduler(**BETAS))
    (tmp_path / "checkpoint-1/pytorch_model_fsdp_0").mkdir(parents=True)
    with pytest.raises(ValueError, match="accelerate merge-weights"):
        rs.find_checkpoints(tmp_path)
    (tmp_path / "epoch-1").mkdir()
    with pytest.raises(ValueError, match="holds both"):
        rs.find_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"from_pretrained\(\.\.\., lora=file\)"):
        task.load("lora", {"unet.mid_block.to_q.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="weights of a text encoder too"):
        task.load("lora", {"text_encoder.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        rs.DiffusionTask.from_pretrained(tmp_path)
