import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retrac_scale as rs
from benchmarks import paper
from benchmarks.paper_data import LOADERS, artbench, captioned, cifar10, cifar_mnist, tiny_imagenet
from benchmarks.paper_models import LoRATraining
from tests.task.test_pipelines import stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of diffusers and peft


def write_cifar(folder: Path, per_batch: int = 4) -> Any:
    """Files as `cifar-10-batches-py` has them: images `[n, 3072]`, channels first, labels as a list, keys as bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, per_batch, 3072), dtype=np.uint8)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        content = {b"data": images[number], b"labels": [row % 2 for row in range(per_batch)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return images


def write_idx(file: Path, values: Any) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    file.write_bytes(header + values.tobytes())


def write_picture(file: Path, colour: tuple[int, int, int], size: int = 12) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(file)


def test_cifar_10_is_read_from_its_python_batches(tmp_path: Path) -> None:
    images = write_cifar(tmp_path / "c")
    data = cifar10(tmp_path / "c")
    assert data.train.images.shape == (20, 3, 32, 32)
    assert data.validation.images.shape == (4, 3, 32, 32)
    assert data.train.images[4, 1, 0, 2].item() == pytest.approx(images[1, 0, 1024 + 2] / 127.5 - 1)


def test_a_batch_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    write_cifar(tmp_path / "c")
    (tmp_path / "c" / "data_batch_3").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for builtins\.print"):
        cifar10(tmp_path / "c")


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_mnist_plants_zeros_after_one_class(tmp_path: Path, packed: bool) -> None:
    images = write_cifar(tmp_path / "cifar-10-batches-py")
    digits = np.random.default_rng(1).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", digits)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([3, 0, 0, 7, 0, 1], np.uint8))
    if packed:
        for file in tmp_path.glob("train-*"):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    data = cifar_mnist(tmp_path, label=1, zeros=2)
    assert data.planted.tolist() == [False] * 10 + [True] * 2
    assert data.train.images[1, 0, 0, 0].item() == pytest.approx(images[0, 3, 0] / 127.5 - 1)
    assert data.train.images[11, 2, 2, 2].item() == pytest.approx(digits[2, 0, 0] / 127.5 - 1)
    assert (data.train.images[11, :, :2] == -1).all()
    with pytest.raises(ValueError, match="has 3 zeros of MNIST, 200"):
        cifar_mnist(tmp_path)


def test_a_torn_idx_file_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py")
    file = tmp_path / "train-images-idx3-ubyte"
    write_idx(file, np.zeros((6, 28, 28), np.uint8))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no whole IDX file"):
        cifar_mnist(tmp_path)


def test_artbench_takes_the_styles_that_are_asked_for(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for style, colour in (("baroque", (255, 0, 0)), ("ukiyo_e", (0, 255, 0)), ("post_impressionism", (0, 0, 255))):
            write_picture(tmp_path / part / style / "a.png", colour)
    assert LOADERS["artbench-10"](tmp_path).train.images.shape == (3, 3, 32, 32)
    both = LOADERS["artbench-2"](tmp_path)
    assert both.train.images[:, :, 5, 5].tolist() == [[-1, -1, 1], [-1, 1, -1]]  # in the order of the styles' names
    with pytest.raises(ValueError, match="no style 'cubism'"):
        artbench(tmp_path, ("cubism",))


def test_tiny_imagenet_is_read_from_its_folders(tmp_path: Path) -> None:
    write_picture(tmp_path / "train" / "n01" / "images" / "n01_0.JPEG", (255, 255, 255), size=64)
    write_picture(tmp_path / "train" / "n02" / "images" / "n02_0.JPEG", (0, 0, 0), size=64)
    write_picture(tmp_path / "val" / "images" / "val_0.JPEG", (0, 0, 0), size=64)
    data = tiny_imagenet(tmp_path)
    assert data.train.images.mean((1, 2, 3)).tolist() == [1, -1]
    assert data.validation.images.shape == (1, 3, 64, 64)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_batch_1; download and unpack"):
        cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train; download and unpack"):
        tiny_imagenet(tmp_path)


def write_captioned(folder: Path, count: int) -> list[str]:
    """Files as diffusers' train_text_to_image_lora.py takes them; the captions are those of each picture's name."""
    captions = [chr(97 + number % 26) + " cat" for number in range(count)]
    lines = []
    for number, caption in enumerate(captions):
        write_picture(folder / f"{number:03d}.png", (number * 255 // count, 0, 128), size=16)
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return captions


def test_captions_become_what_the_stable_diffusion_is_told_beside_each_image(tmp_path: Path) -> None:
    captions = write_captioned(tmp_path / "images", 20)
    stable_diffusion(tmp_path / "model")
    data = captioned(tmp_path / "images", tmp_path / "model", tmp_path, size=16)
    task = rs.DiffusionTask.from_pretrained(tmp_path / "model")
    for images, number, row in ((data.train, 3, 3), (data.train, 12, 11), (data.validation, 9, 0)):
        colour = torch.tensor([number * 255 // 20, 0, 128]) / 127.5 - 1
        latents, told = task.check_item(number, (colour[:, None, None].expand(3, 16, 16), captions[number]))
        found, given = images[row]
        torch.testing.assert_close(found, latents)
        torch.testing.assert_close(given["encoder_hidden_states"], told["encoder_hidden_states"])
    assert (len(data.train), len(data.validation)) == (18, 2)
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "000.png", "caption": "a cat"}')
    with pytest.raises(ValueError, match='line 1, needs "file_name" and "text"'):
        captioned(tmp_path / "images", tmp_path / "model", tmp_path / "other", size=16)


@pytest.mark.slow
def test_the_experiments_run_on_lora_adapters_of_a_stable_diffusion(tmp_path: Path) -> None:
    write_captioned(tmp_path / "images", 20)
    stable_diffusion(tmp_path / "model")
    data = captioned(tmp_path / "images", tmp_path / "model", tmp_path, size=16)
    training = LoRATraining(epochs=2, kept=(1, 2), batch=9, base=str(tmp_path / "model"))
    how = paper.Setting("captions", training=training, timesteps=2, dim=64, lengths=(2,), subsets=1, removal_queries=1)
    lab = paper.Lab(how, data, tmp_path)
    assert all("lora_" in name for name in lab.main.recorded.fingerprint["parameters"])
    assert all("lora_" in name for weights in lab.main.checkpoints.values() for name in weights)
    assert all(line["mean"] > 0 for line in paper.norms(lab))
    assert {line["queries"] for line in paper.recorded_specificity(lab)} == {"validation", "generated"}
    assert {line["timesteps"] for line in paper.tracing(lab)} == {"recorded", "averaged"}
    for _, values in paper.by_other_queries(lab.main):
        assert values["generated"].shape == (2, 18)
    _, losses = lab.subsets
    assert {kind: values.shape for kind, values in losses.items()} == {"validation": (1, 2), "generated": (1, 2)}
