"""Latent, text-conditional models on the command line: what Python measures, with captions beside the images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn

import retrac_scale as rs
from retrac_scale import planner
from retrac_scale.cli import main
from retrac_scale.cli.told import look_beside
from retrac_scale.datasets import ImageFiles
from tests.task.test_pipelines import BETAS, PROMPTS, stable_diffusion, vae

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SIZES = [(16, 16), (24, 30), (40, 20), (16, 18), (20, 20)]
MEASURED = ["--timesteps", "2", "--dim", "64", "--rank", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a LoRA of it, and captioned images of several sizes."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    stable_diffusion(folder / "sd")
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "sd/unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        folder / "lora",
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    rng = np.random.default_rng(0)
    rows = []
    (folder / "images").mkdir()
    for number, (width, height) in enumerate(SIZES):
        values = rng.integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(values).resize((width, height)).save(folder / f"images/{number}.png")
        rows.append({"file_name": f"{number}.png", "text": PROMPTS[number], "label": number})
    (folder / "images/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SD = ["sketch", "--model", "sd", "--images", "images", *MEASURED]


def in_python(task: rs.DiffusionTask, dataset: Any, checkpoints: dict[str, str]) -> rs.SketchStore:
    """The same sketches, encoded on the fly."""
    options: dict[str, Any] = {"timesteps": rs.EvenlySpaced(2), "projection": rs.CountSketch(64), "progress": False}
    return rs.sketch(task, dataset, None, checkpoints=checkpoints, **options)


def captions_in_text_files(folder: Path) -> None:
    (folder / "images/metadata.jsonl").unlink()
    for number, prompt in enumerate(PROMPTS):
        (folder / f"images/{number}.txt").write_text(f"{prompt}\n")


@pytest.mark.parametrize("lora", ["", "lora/pytorch_lora_weights.safetensors"])
def test_a_latent_model_or_its_lora_is_sketched_and_asked_as_in_python(
    folder: Path, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, weights = ("lora", lora) if lora else ("final", "sd/unet")
    if lora:
        captions_in_text_files(folder)
    given, size = (["--checkpoint", f"lora={lora}", "--size", "24"], 24) if lora else ([], 16)
    assert main([*SD, *given]) == 0
    told = capsys.readouterr()
    assert f"images: captions are in {'.txt files' if lora else 'column text'}; 2 of 5 are cut to 8 tokens" in told.out
    assert "truncated" not in told.err
    assert "encoding 5 images into attribution/encoded.zarr, up to " in told.err
    both = ("mse", "mean_squared_output")
    task = rs.DiffusionTask.from_pretrained("sd", lora=lora or None, measure=both)
    dataset = ImageFiles("images", given={"prompt": ".txt" if lora else "text"}, size=size)
    expected = in_python(task, dataset, {name: weights}).under(*both)
    store = rs.open_store("attribution/sketches.zarr", measure=both)
    assert store.ids.tolist() == [f"images/{number}.png" for number in range(5)]
    np.testing.assert_array_equal(store.sketches(name), expected.sketches(name))
    assert store.fingerprint["checkpoints"] == expected.fingerprint["checkpoints"]
    assert store.fingerprint["frozen"] == expected.fingerprint["frozen"]
    assert all(("lora_" in one) == bool(lora) for one in store.fingerprint["parameters"])
    # a training image, asked about with its caption, has its own gradients
    assert main(["index"]) == 0
    capsys.readouterr()
    query = ["query", "attribution/retracridge.zarr", "images/1.png", "--model", "sd", "--json", "-k", "3"]
    assert main([*query, "--checkpoint", f"{name}={weights}", "--prompt", PROMPTS[1]]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["results"]
    assert answer["ids"][0] == "images/1.png"
    one = rs.Samples(Prompted(ImageFiles("images/1.png", size=size), PROMPTS[1]), task, {name: weights})
    asked = rs.open_index("attribution/retracridge.zarr").query(one, 3)
    np.testing.assert_allclose(answer["scores"], asked.scores[0][: len(answer["scores"])], rtol=1e-4)


class Prompted:
    """Images under one prompt."""

    def __init__(self, images: ImageFiles, prompt: str) -> None:
        self.images, self.prompt, self.ids = images, prompt, images.ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return {"image": self.images[row], "prompt": self.prompt}


def test_a_run_goes_on_with_what_is_encoded_and_tells_other_captions_and_another_vae(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SD) == 0
    written = {file: file.stat().st_mtime_ns for file in Path("attribution/encoded.zarr").rglob("c/*")}
    before = rs.open_store("attribution/sketches.zarr").sketches("final")
    assert main(SD) == 0
    assert {file: file.stat().st_mtime_ns for file in Path("attribution/encoded.zarr").rglob("c/*")} == written
    # an image that came since, in the middle of the others
    shutil.copy("images/4.png", "images/1b.png")
    rows = Path("images/metadata.jsonl").read_text()
    Path("images/metadata.jsonl").write_text(f'{rows}\n{{"file_name": "1b.png", "text": "a hill", "label": 5}}')
    capsys.readouterr()
    assert main(SD) == 0
    assert "1 of them, such as images/1b.png, came since" in capsys.readouterr().out
    store = rs.open_store("attribution/sketches.zarr")
    dataset = ImageFiles("images", given={"prompt": "text"}, size=16)
    expected = in_python(rs.DiffusionTask.from_pretrained("sd"), dataset, {"final": "sd/unet"})
    places = [dataset.ids.tolist().index(sample) for sample in store.ids.tolist()]
    np.testing.assert_allclose(store.sketches("final"), np.asarray(expected.sketches("final"))[places], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(store.sketches("final"))[:5], before)
    captions_in_text_files(folder)
    Path("images/1b.txt").write_text("a hill")
    Path("images/3.txt").write_text("a light wood")
    assert main(SD) == 1
    told = capsys.readouterr().err
    assert "encoded.zarr was made of other items under the same ids: 1 of 6" in told
    assert "'images/3.png'; encode them anew with --replace" in told
    AutoencoderKL.from_config(vae().config).save_pretrained("sd/vae")
    assert main(SD) == 1
    assert "encoded.zarr was encoded by another vae" in capsys.readouterr().err


def test_what_a_command_cannot_know_is_asked_for_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path("images/metadata.jsonl").read_text()

    def refused(why: str, *given: str) -> None:
        assert main([*SD, *given]) == 1
        assert why in capsys.readouterr().err
        assert not Path("attribution").exists()

    refused("has no column 'words' in its metadata.jsonl, .csv or .parquet: text, label", "--captions", "words")
    refused("--size 15: give a multiple of 2, the width of what becomes one latent", "--size", "15")
    refused("latents of a VAE that is not with it: give the --model of a whole pipeline", "--model", "sd/unet")
    UNet2DConditionModel.from_pretrained("sd/unet").save_pretrained("late")
    both = ["--checkpoint", "a=lora", "--checkpoint", "b=late"]
    refused("the checkpoints a are adapters, b all weights of the model", *both)
    Path("images/metadata.jsonl").write_text(lines.replace('"text"', '"caption"', 1))
    refused("has columns caption and text; say by --captions")
    Path("images/metadata.jsonl").write_text(lines.replace('"a cat"', "null"))
    refused("1 of 5 images of images are told nothing, such as 0.png, which has no 'text' in the metadata")
    captions_in_text_files(folder)
    Path("images/2.txt").unlink()
    refused("such as 2.png, which has no file 2.txt beside it")
    Path("images/2.txt").write_text("the sea\nthe sky")
    refused("2.txt has 2 lines; leave the one")
    for file in Path("images").glob("*.txt"):
        file.unlink()
    refused("the model is told prompts, and the images of images have no captions: give each a text")


def test_the_empty_prompt_is_said_where_it_stands_for_captions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path("images/metadata.jsonl").read_text()
    Path("images/metadata.jsonl").write_text(lines.replace('"a cat"', '""').replace('"snow"', '""'))
    init = ["init", "--model", "sd", "--images", "images", "--query-images", "asked", *MEASURED]
    (folder / "asked").mkdir()
    shutil.copy("images/0.png", "asked/a.png")
    assert main(init) == 0
    told = capsys.readouterr().out
    assert "takes latents of 8 x 8 in 4 channels, of the pipeline's VAE, and is told prompts" in told
    assert "images: 5 images of 16 x 16 and other sizes, cut to what the VAE takes" in told
    assert "captions are in column text; 2 of 5 are empty, such as that of images/0.png" in told
    assert "asked: the model is told the empty prompt of all" in told
    assert main(["sketch", "--captions", "none"]) == 0
    assert "images: the model is told the empty prompt of all" in capsys.readouterr().out
    queries, store = (rs.open_store(f"attribution/{name}.zarr") for name in ("queries", "sketches"))
    asked, same = (np.asarray(one.sketches("final"))[0] for one in (queries, store))
    np.testing.assert_allclose(asked, same, rtol=1e-5)
    for file, note in (
        ("asked/a.png", "the model is told the empty prompt of all"),
        ("images/0.png", "captions are in"),
    ):
        assert main(["query", "attribution/retracridge.zarr", file, "-k", "1"]) == 0
        assert f"note: {file}: {note}" in capsys.readouterr().out
    item = planner.example_item(rs.DiffusionTask.from_pretrained("sd"))
    assert {name: value.shape for name, value in item.items()} == {
        "latents": (4, 8, 8),
        "encoder_hidden_states": (8, 8),
    }


def ask(*given: str) -> int:
    return main(["query", "attribution/retracridge.zarr", *given, "-k", "1"])


def test_images_to_ask_about_are_told_what_the_entry_of_captions_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions_in_text_files(folder)
    for file in Path("images").glob("*.txt"):
        file.rename(file.with_suffix(".caption"))
    shutil.copytree("images", "asked")
    (folder / "asked/0.txt").write_text("no cat")
    init = ["init", "--model", "sd", "--images", "images", "--query-images", "asked", *MEASURED]
    assert main([*init, "--captions", ".caption"]) == 0
    assert "asked: captions are in .caption files" in capsys.readouterr().out
    assert main(["sketch"]) == 0
    assert "asked: captions are in .caption files" in capsys.readouterr().out
    queries, store = (rs.open_store(f"attribution/{name}.zarr").sketches("final") for name in ("queries", "sketches"))
    np.testing.assert_allclose(np.asarray(queries), np.asarray(store), rtol=1e-5)
    assert ask("asked/1.png") == 0
    assert "note: asked/1.png: captions are in .caption files" in capsys.readouterr().out
    for captions, note in (("none", "the model is told the empty prompt of all"), (".txt", "captions are in .txt")):
        assert ask("asked/0.png", "--captions", captions) == 0
        assert f"note: asked/0.png: {note}" in capsys.readouterr().out
    toml = Path("retrac-scale.toml")
    toml.write_text(toml.read_text().replace('captions = ".caption"', 'captions = "none"'))
    assert ask("asked/0.png") == 0
    assert "asked/0.png: the model is told the empty prompt of all" in capsys.readouterr().out
    assert ask("asked/0.png", "--captions", ".txt", "--prompt", "a cat") == 1
    assert "--prompt is told of all images, whatever their captions" in capsys.readouterr().err


def test_of_images_to_ask_about_some_may_lack_a_caption(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "asked").mkdir()
    for name in "ab":
        shutil.copy("images/0.png", f"asked/{name}.png")
    (folder / "asked/a.txt").write_text(PROMPTS[0])
    assert main([*SD, "--query-images", "asked"]) == 0
    some = "1 of 2 are empty or missing, such as that of asked/b.png"
    assert f"asked: captions are in .txt files; {some}" in capsys.readouterr().out
    asked = np.asarray(rs.open_store("attribution/queries.zarr").sketches("final"))
    same = np.asarray(rs.open_store("attribution/sketches.zarr").sketches("final"))[0]
    np.testing.assert_allclose(asked[0], same, rtol=1e-5)
    assert not np.allclose(asked[1], same)
    assert main(["index"]) == 0
    model = ["--model", "sd", "--checkpoint", "final=sd/unet"]
    assert ask("asked/a.png", "asked/b.png", *model) == 0
    assert some in capsys.readouterr().out
    (folder / "asked/a.txt").unlink()
    (folder / "asked/metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}')
    assert ask("asked/a.png", "asked/b.png", *model) == 0
    assert f"captions are in column text; {some}" in capsys.readouterr().out


def test_a_file_that_is_named_by_itself_is_described_by_the_nearest_metadata_above_it(folder: Path) -> None:
    (folder / "asked/cats/far").mkdir(parents=True)
    files = ["asked/cats/a.png", "asked/cats/b.png", "asked/cats/far/c.png"]
    for file in files:
        shutil.copy("images/0.png", file)
    (folder / "asked/metadata.jsonl").write_text('{"file_name": "cats/a.png", "text": "a cat"}')
    (folder / "metadata.jsonl").write_text('{"file_name": "asked/cats/b.png", "text": "too far away"}')
    images = ImageFiles(files)
    look_beside(images, files)
    assert images.described == {"text": ["a cat", None, None]}
    (folder / "asked/cats/far/metadata.jsonl").write_text('{"file_name": "c.png", "title": "it"}')
    for named in (files, [str(folder / file) for file in files]):
        images = ImageFiles(named)
        look_beside(images, named)
        assert images.described == {"text": ["a cat", None, None], "title": [None, None, "it"]}


def test_a_model_of_classes_is_told_those_of_the_metadata(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
    model = DiTTransformer2DModel(num_embeds_ada_norm=10, **options, **heads)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    DiTPipeline(model, vae(), DDIMScheduler(**BETAS), {0: "x"}).save_pretrained("dit")
    dit = ["sketch", "--model", "dit", "--images", "images", *MEASURED]
    assert main(dit) == 0
    dataset = ImageFiles("images", given={"label": "label"}, size=16)
    expected = in_python(rs.DiffusionTask.from_pretrained("dit"), dataset, {"final": "dit/transformer"})
    store = rs.open_store("attribution/sketches.zarr")
    np.testing.assert_array_equal(store.sketches("final"), expected.sketches("final"))
    capsys.readouterr()
    captions_in_text_files(folder)
    assert main(dit) == 1
    assert "nothing says those of images: give each image's number in a column label" in capsys.readouterr().err
