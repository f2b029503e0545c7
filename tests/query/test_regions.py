"""Queries about a part of their picture: gradients against autograd in float64, partitions, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.utils.data import Subset

import retrac_scale as rs
from retrac_scale.task.encoding import Encoder
from tests.conftest import CONDITIONAL, Labelled, random_images, tiny_dit, tiny_unet
from tests.oracle import gradient

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
STEPS = [30, 80]
DDPM: Any = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2")
MASKS = np.random.default_rng(3).random((2, 8, 8)) * (np.random.default_rng(4).random((2, 8, 8)) < 0.6)


def gradients(task: rs.DiffusionTask, dataset: Any) -> Any:
    """What `sketch` keeps of whole gradients, float64 `[n, t, P]`."""
    state = {name: value.clone() for name, value in task.model.state_dict().items()}
    options: dict[str, Any] = {"checkpoints": {"c": state}, "timesteps": rs.Explicit(STEPS), "dtype": "float32"}
    store = rs.sketch(task, dataset, None, projection=rs.Identity(), progress=False, **options)
    return store.sketches("c").astype(np.float64)


def by_hand(model: nn.Module, scheduler: Any, clean: Tensor, weights: Any, **given: Tensor) -> Any:
    """Autograd in float64 of the mean over all entries of their squared errors times weights, `[n, t, P]`."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    for row, sample in enumerate(clean):
        for step in STEPS:
            noise = rs.draw_noise(sample.shape, None, [step], 0).double()
            x, told = sample[None].double(), {name: value[row : row + 1] for name, value in given.items()}
            if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
                level = (step + 1) / 100
                noisy, time, target = (1 - level) * x + level * noise, torch.tensor([100 * level]), noise - x
            else:
                signal = scheduler.alphas_cumprod[step].double()
                noisy, time, target = signal.sqrt() * x + (1 - signal).sqrt() * noise, torch.tensor([step]), noise
            error = model(noisy, timestep=time, **told, return_dict=False)[0] - target
            rows.append(gradient(model, (error**2 * torch.as_tensor(weights[row])).mean()).numpy())
    return np.stack(rows).reshape(len(clean), len(STEPS), -1)


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    lengths = np.linalg.norm(expected, axis=2, keepdims=True)
    assert lengths.min() > 0
    np.testing.assert_array_less(np.linalg.norm(found - expected, axis=2, keepdims=True) / lengths, tolerance)


def latent_pipeline(blocks: int = 4) -> Any:
    """A Stable Diffusion without text, whose VAE makes one latent of 2 ** (blocks - 1) pixels in each direction."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=1,
        norm_num_groups=2,
        layers_per_block=1,
    )
    unet = UNet2DConditionModel(**CONDITIONAL)
    parts: Any = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(vae=vae, unet=unet, scheduler=DDPM, **parts, requires_safety_checker=False)


def latent_task() -> rs.DiffusionTask:
    pipeline = latent_pipeline()
    pipeline.vae.requires_grad_(False)
    return rs.DiffusionTask(pipeline.unet, DDPM, encoder=Encoder(pipeline))


class Told(list[Any]):
    """A list of dataset items."""


def pictures_with_embeddings(*shape: int) -> Told:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((2, *shape), dtype=np.float32), rng.standard_normal((2, 3, 8), dtype=np.float32)
    images, told = (torch.from_numpy(x) for x in values)
    return Told({"image": x.tanh(), "encoder_hidden_states": y} for x, y in zip(images, told, strict=True))


def test_masks_of_a_pixel_unet_weigh_every_entrys_loss() -> None:
    task, images = rs.DiffusionTask(tiny_unet(), DDPM), random_images(2)
    close(gradients(task, rs.Regions(images, MASKS)), by_hand(task.model, DDPM, images, MASKS))
    close(
        gradients(task, rs.Regions(images, torch.from_numpy(MASKS[0]))),
        by_hand(task.model, DDPM, images, MASKS[[0, 0]]),
    )


def test_boxes_of_a_transformer_on_patches_are_pixels_from_the_first_to_before_the_last() -> None:
    task, dataset = rs.DiffusionTask(tiny_dit(), DDPM), Labelled(random_images(2))
    inside = np.zeros((2, 8, 8))
    inside[0, 1:4, 2:7] = inside[1, 5:8, 0:3] = 1
    boxes = [(2, 1, 7, 4), (0, 5, 3, 8)]
    told = {"class_labels": torch.arange(2)}
    close(gradients(task, rs.Regions(dataset, boxes)), by_hand(task.model, DDPM, dataset.images, inside, **told))
    rest = rs.Regions(dataset, rs.AllBut(boxes))
    close(gradients(task, rest), by_hand(task.model, DDPM, dataset.images, 1 - inside, **told))


def test_a_latent_counts_by_the_share_of_its_64_pixels() -> None:
    task, dataset = latent_task(), pictures_with_embeddings(3, 64, 64)
    mask = np.zeros((64, 64))
    mask[5:30, 11:50] = 1
    mask[40:, 3:] = 0.5
    shares = mask.reshape(8, 8, 8, 8).mean((1, 3))
    with torch.no_grad():
        latents = torch.cat([task.encoder.vae.encode(x["image"][None]).latent_dist.mode() for x in dataset])  # type: ignore[union-attr]
    told = {"encoder_hidden_states": torch.stack([x["encoder_hidden_states"] for x in dataset]).double()}
    expected = by_hand(task.model, DDPM, latents * task.encoder.vae.config.scaling_factor, [shares] * 2, **told)  # type: ignore[union-attr]
    close(gradients(task, rs.Regions(dataset, mask)), expected)
    encoded = rs.encode(task, dataset, None, progress=False)
    close(gradients(task, rs.Regions(encoded, mask)), expected)


def wan_task() -> tuple[rs.DiffusionTask, Told, Any]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "text_dim": 8}
    sizes |= {"in_channels": 2, "out_channels": 2, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 16}
    vae = AutoencoderKLWan(
        base_dim=2, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 2, latents_std=[1.0] * 2
    )
    scheduler = FlowMatchEulerDiscreteScheduler(100)
    pipeline = WanPipeline(None, None, vae.requires_grad_(False), scheduler, WanTransformer3DModel(**sizes))
    return (
        rs.DiffusionTask(pipeline.transformer, scheduler, encoder=Encoder(pipeline)),
        pictures_with_embeddings(3, 9, 32, 32),
        scheduler,
    )


def test_frames_of_a_video_count_in_the_latents_that_a_causal_vae_makes_of_them() -> None:
    task, dataset, scheduler = wan_task()
    latents = torch.stack([task.check_item(row, item)[0] for row, item in enumerate(dataset)])
    assert latents.shape == (2, 2, 3, 4, 4)  # of frames 0, 1 to 4, and 5 to 8
    told = {"encoder_hidden_states": torch.stack([x["encoder_hidden_states"] for x in dataset]).double()}
    shares = np.zeros((3, 4, 4))
    shares[0, :2, 1:4] = 1
    shares[1, :2, 1:4] = 3 / 4
    box = (8, 0, 32, 16, 0, 4)
    close(gradients(task, rs.Regions(dataset, box)), by_hand(task.model, scheduler, latents, [shares] * 2, **told))
    whole = np.broadcast_to(shares[0], (3, 4, 4))
    close(gradients(task, rs.Regions(dataset, box[:4])), by_hand(task.model, scheduler, latents, [whole] * 2, **told))


def test_latents_with_frames_first_take_a_mask_of_their_frames() -> None:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        text_embed_dim=8,
        time_embed_dim=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=3,
    )
    task, dataset = rs.DiffusionTask(model, DDPM), pictures_with_embeddings(2, 2, 4, 4)
    latents = torch.stack([item["image"] for item in dataset])
    told = {"encoder_hidden_states": torch.stack([x["encoder_hidden_states"] for x in dataset]).double()}
    mask = np.random.default_rng(0).random((2, 2, 4, 4))
    close(gradients(task, rs.Regions(dataset, mask)), by_hand(model, DDPM, latents, mask[:, :, None], **told))


PARTS: dict[str, Callable[[], tuple[rs.DiffusionTask, Any, dict[str, Any]]]] = {
    "pixels": lambda: (
        rs.DiffusionTask(tiny_unet(), DDPM, measure="l1", weighting=rs.MinSNR()),
        random_images(2),
        {"a": MASKS, "b": rs.AllBut(MASKS)},
    ),
    "patches": lambda: (
        rs.DiffusionTask(tiny_dit(), DDPM, measure="mean_squared_output"),
        Labelled(random_images(2)),
        {"left": (0, 0, 3, 8), "top": (3, 0, 8, 5), "rest": (3, 5, 8, 8)},
    ),
    "latents": lambda: (
        latent_task(),
        pictures_with_embeddings(3, 64, 64),
        {"hat": (13, 3, 41, 37), "the rest": rs.AllBut((13, 3, 41, 37))},
    ),
    "video": lambda: (
        wan_task()[0],
        wan_task()[1],
        {"first": (0, 0, 32, 32, 0, 4), "hat": (5, 0, 20, 20, 4, 9), "rest": rs.AllBut((5, 0, 20, 20, 4, 9))},
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_regions_that_make_up_a_picture_add_up_to_it(kind: str) -> None:
    task, dataset, parts = PARTS[kind]()
    if kind == "video":  # the rest without the first frames, so that nothing counts twice
        mask = np.ones((9, 32, 32))
        mask[:4] = mask[4:, :20, 5:20] = 0
        parts["rest"] = np.stack([mask, mask])
    found = gradients(task, rs.Regions(dataset, parts)).reshape(2, len(parts), len(STEPS), -1)
    close(found.sum(1), gradients(task, dataset))


def test_a_whole_picture_as_a_region_is_the_picture_to_the_last_bit() -> None:
    task, images = rs.DiffusionTask(tiny_unet(), DDPM), random_images(2)
    np.testing.assert_array_equal(gradients(task, rs.Regions(images, (0, 0, 8, 8))), gradients(task, images))


def pixel_samples(region: Any = None, dataset: Any = None) -> rs.Samples:
    task = rs.DiffusionTask(tiny_unet(), DDPM)
    state = {name: value.clone() for name, value in task.model.state_dict().items()}
    return rs.Samples(random_images(2, seed=9) if dataset is None else dataset, task, {"c": state}, region=region)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> rs.SketchStore:
    train = pixel_samples(dataset=random_images(12))
    return rs.sketch(
        train.task,
        train.dataset,
        tmp_path_factory.mktemp("regions") / "store.zarr",
        checkpoints=train.checkpoints,
        timesteps=rs.Explicit(STEPS),
        projection=rs.Identity(),
        dtype="float32",
        progress=False,
    )


def test_a_region_is_asked_about_reranked_and_explained_over_the_store_as_it_is(store: rs.SketchStore) -> None:
    train = pixel_samples(dataset=random_images(12))
    asked = pixel_samples({"left": (0, 0, 4, 8), "right": rs.AllBut((0, 0, 4, 8))})
    index = rs.build_index(store, rs.TracIn(pairing="matched"), None, dtype="float32")
    answer = index.query(asked, k=12)
    assert answer.query_ids.tolist() == ["0: left", "0: right", "1: left", "1: right"]
    whole = gradients(train.task, train.dataset)
    left, right = (
        by_hand(train.task.model, DDPM, random_images(2, seed=9), [weights] * 2)
        for weights in (np.arange(8) < 4, np.arange(8) >= 4)
    )
    expected = np.einsum("qtk,ntk->qn", np.stack([left, right], 1).reshape(4, 2, -1), whole)
    ranked = np.argsort(-expected, axis=1)
    np.testing.assert_array_equal(answer.ids, ranked)
    np.testing.assert_allclose(answer.scores, np.take_along_axis(expected, ranked, 1), rtol=1e-4, atol=1e-9)
    exact = index.query(asked, k=3, rerank=12, train=replace(train, timesteps=rs.Explicit(STEPS)))
    np.testing.assert_array_equal(exact.ids, ranked[:, :3])
    sketches = asked.sketch(like=store)
    parts = index.explain(rs.take(sketches, ["1: right"]), ranked[3, 0])
    assert parts.score == pytest.approx(expected[3].max(), rel=1e-4)


def test_the_sketches_say_that_they_are_of_a_region_and_go_on_with_no_other(
    store: rs.SketchStore, tmp_path: Path
) -> None:
    samples = pixel_samples((1, 2, 5, 6))
    assert samples.sketch(like=store).fingerprint["region"] == "box 1,2,5,6"
    assert "region" not in store.fingerprint
    options: dict[str, Any] = {"checkpoints": samples.checkpoints, "like": store, "progress": False}

    def sketched(region: Any) -> rs.SketchStore:
        return rs.sketch(samples.task, rs.Regions(random_images(2, seed=9), region), tmp_path / "q", **options)

    assert sketched(MASKS).revision == sketched(MASKS).revision
    with pytest.raises(rs.ChangedItemsError, match="differ, 1;"):
        sketched(np.stack([MASKS[0], MASKS[1].T]))
    with pytest.raises(ValueError, match="region is 'one for each sample' there and 'box 1,2,5,6' here"):
        sketched((1, 2, 5, 6))
    with pytest.raises(ValueError, match="region is 'one for each sample' there and None here"):
        rs.sketch(samples.task, random_images(2, seed=9), tmp_path / "q", **options)


def test_regions_keep_ids_columns_and_rows_of_their_dataset() -> None:
    dataset: Any = Labelled(random_images(3), ids=["a", "b", "c"])
    dataset.columns = {"artist": ["x", "y", "z"]}
    parts = rs.Regions(Subset(dataset, [2, 0]), {"left": (0, 0, 4, 8), "all": np.ones((8, 8))})
    assert parts.ids == ["c: left", "c: all", "a: left", "a: all"]
    assert parts.columns["artist"].tolist() == ["z", "z", "x", "x"]
    some: Any = Subset(parts, [1, 3])  # type: ignore[arg-type]
    assert [some[row].item[1] for row in range(2)] == [2, 0]
    one = rs.Regions(dataset, np.ones((3, 8, 8)))
    assert (one.ids, len(one)) == (["a", "b", "c"], 3)


@pytest.mark.parametrize(
    ("region", "why"),
    [
        (np.zeros((8, 8)), "region is empty: its mask is zero everywhere"),
        ((3, 2, 3, 6), "region is the box 3,2,3,6, which is empty"),
        ((-1, 0, 4, 4), "region is the box -1,0,4,4, which reaches outside; pixels begin at 0"),
        ((0, 0, 9, 8), "the box 0,0,9,8 reaches outside of dataset item 0, which has 8 x 8 pixels"),
        ([(0, 0, 8, 8), (0, 0, 4, 9)], "the box 0,0,4,9 reaches outside of dataset item 1"),
        (np.ones((16, 16)), r"the mask of dataset item 0 has shape \(16, 16\), and the picture \(8, 8\)"),
        (np.full((8, 8), 255), "region has entries outside of 0 .. 1; divide a picture of 8 bits by 255"),
        (np.full((8, 8), np.nan), "region has entries outside of 0 .. 1"),
        (np.ones((3, 8, 8)), "region has 3 masks for 2 samples"),
        ([(0, 0, 8, 8)], "region has 1 entries for 2 samples"),
        ([(0, 0, 8, 8), (0, 0, 8)], r"region, entry 1, is \(0, 0, 8\); give a box as"),
        ({"hat": (0, 0)}, r"region 'hat' is \(0, 0\); give a box as"),
        ({}, "names no region"),
        ("left", "region is 'left'; give a mask"),
        (np.eye(8) * 0.1, "the region of dataset item 0 covers 0.8 of a pixel; make it larger"),
        (rs.AllBut((0, 0, 8, 8)), "the region of dataset item 0 covers 0 of a pixel"),
    ],
)
def test_what_is_no_region_of_the_pictures_is_told_before_any_gradient(
    store: rs.SketchStore, region: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(rs.DiffusionTask, "measured", measured)
    with pytest.raises(ValueError, match=why):
        pixel_samples(region).sketch(like=store)


def test_a_region_smaller_than_a_latent_and_samples_that_are_no_pictures_are_told(tmp_path: Path) -> None:
    task, dataset = latent_task(), pictures_with_embeddings(3, 64, 64)
    small = rs.Regions(dataset, (3, 3, 9, 9))
    with pytest.raises(ValueError, match=r"item 0 covers 0.56 of one of the model's cells of 8 x 8 pixels"):
        gradients(task, small)
    sounds = rs.DiffusionTask(nn.Linear(8, 8), DDPM, call=lambda model, noisy, times, told: model(noisy))
    with pytest.raises(ValueError, match=r"item 1 has shape \(1, 8\); regions are of pictures"):
        sounds.read_item(1, rs.Regions([torch.zeros(1, 8)], (0, 0, 8, 8))[0])
    with pytest.raises(ValueError, match="encode takes plain samples"):
        rs.encode(task, rs.Regions(dataset, (0, 0, 32, 32)), tmp_path / "e", progress=False)
