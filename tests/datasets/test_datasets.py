"""Datasets: the same images from every source, ids and columns into the store, corrupt images never by surprise."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image

import retrac_scale as rs
from retrac_scale.columns import check_columns
from retrac_scale.datasets import Arrays, CorruptImageError, HuggingFace, ImageFiles, Parquet, TarShards
from retrac_scale.datasets.base import pixels
from tests.conftest import tiny_unet
from tests.small_denoiser import SCHEDULER

N = 5
RAW = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
NAMES = [f"image-{row}" for row in range(N)]
LABELS = [row % 2 for row in range(N)]
CAPTIONS = [f"picture {row}" for row in range(N)]


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RAW[row]).save(buffer, "PNG")
    return buffer.getvalue()


def contents(broken: int | None) -> list[bytes]:
    """The files; one cut off in the middle."""
    return [png(row)[: 100 if row == broken else None] for row in range(N)]


def as_files(folder: Path, broken: int | None, **options: Any) -> Any:
    (folder / "birds").mkdir()
    for name, content in zip(NAMES, contents(broken), strict=True):
        (folder / "birds" / f"{name}.png").write_bytes(content)
    return ImageFiles([str(folder)], **options)


def as_hugging_face(folder: Path, broken: int | None, **options: Any) -> Any:
    hf = pytest.importorskip("datasets")
    columns = {"image": contents(broken), "name": NAMES, "label": LABELS, "caption": CAPTIONS}
    dataset = hf.Dataset.from_dict(columns).cast_column("image", hf.Image())
    given = {"label": "label", "prompt": "caption"}
    return HuggingFace(dataset, id="name", columns=["label", "caption"], given=given, **options)


def as_shards(folder: Path, broken: int | None, **options: Any) -> Any:
    files = contents(broken)
    for shard, rows in (("0.tar", [0, 1, 2]), ("1.tar", [3, 4])):
        with tarfile.open(folder / shard, "w") as tar:
            for row in rows:
                fields = {"png": files[row], "cls": str(LABELS[row]).encode()}
                fields["json"] = json.dumps({"caption": CAPTIONS[row]}).encode()
                for extension, content in fields.items():
                    member = tarfile.TarInfo(f"{NAMES[row]}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    origins = {"label": "cls", "caption": "json.caption"}
    given = {"label": "cls", "prompt": "json.caption"}
    return TarShards([str(folder / "0.tar"), str(folder / "1.tar")], columns=origins, given=given, **options)


def as_parquet(folder: Path, broken: int | None, **options: Any) -> Any:
    for file, rows in (("0.parquet", slice(0, 3)), ("1.parquet", slice(3, N))):
        images = [{"bytes": content, "path": None} for content in contents(broken)[rows]]
        columns = {"image": images, "name": NAMES[rows], "label": LABELS[rows], "caption": CAPTIONS[rows]}
        pq.write_table(pa.table(columns), folder / file, row_group_size=2)
    paths = [str(folder / "0.parquet"), str(folder / "1.parquet")]
    given = {"label": "label", "prompt": "caption"}
    return Parquet(paths, id="name", columns=["label", "caption"], given=given, **options)


SOURCES: dict[str, Callable[..., Any]] = {
    "files": as_files,
    "hugging face": as_hugging_face,
    "tar shards": as_shards,
    "parquet": as_parquet,
}


def image(item: Any) -> Any:
    return (item["image"] if isinstance(item, dict) else item).numpy()


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_images_with_ids_and_columns(tmp_path: Path, source: str) -> None:
    dataset = SOURCES[source](tmp_path, None)
    assert len(dataset) == N
    expected = RAW.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    for row in (4, 0, 2, 1, 3):  # in any order
        np.testing.assert_allclose(image(dataset[row]), expected[row], atol=1e-6)
    if source == "files":
        assert [Path(name).stem for name in dataset.ids] == NAMES
        assert dataset.columns["folder"].tolist() == ["birds"] * N
    else:
        assert dataset.ids.tolist() == NAMES
        assert dataset.columns["label"].tolist() == LABELS
        assert dataset.columns["caption"].tolist() == CAPTIONS
        assert {key: dataset[3][key] for key in ("label", "prompt")} == {"label": 1, "prompt": "picture 3"}
    assert (image(pickle.loads(pickle.dumps(dataset))[1]) == image(dataset[1])).all()  # as workers get it


@pytest.mark.parametrize("source", SOURCES)
def test_a_corrupt_image_is_named_or_left_out_by_choice(
    tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    dataset = SOURCES[source](tmp_path / "a", 3)
    image(dataset[2])
    with pytest.raises(CorruptImageError, match=r"image .*image-3.* of .* cannot be read: .*corrupt='skip'"):
        dataset[3]
    (tmp_path / "b").mkdir()
    dataset = SOURCES[source](tmp_path / "b", 3, corrupt="skip")
    assert [Path(name).stem for name in dataset.ids] == ["image-0", "image-1", "image-2", "image-4"]
    assert len(dataset) == len(next(iter(dataset.columns.values()))) == 4
    assert ["image-3" in str(name) for name in dataset.skipped] == [True]
    assert "left out 1 corrupt images" in caplog.text
    np.testing.assert_allclose(image(dataset[3]), RAW[4].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_images_are_resized_and_cut_and_turned_grey_when_asked(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    dataset = ImageFiles([str(tmp_path)], 1, size=8)
    assert image(dataset[0]).shape == (1, 8, 8)
    assert (image(dataset[0]) == 1).all()


def test_images_are_resized_and_cut_as_by_torchvisions_resize_and_center_crop(tmp_path: Path) -> None:
    """Its sizes written out: the longer side is int(32 * 100 / 67) = 47, the cut begins at round(15 / 2) = 8."""
    whole = Image.fromarray(np.random.default_rng(1).integers(0, 256, (67, 100, 3), dtype=np.uint8))
    whole.save(tmp_path / "wide.png")
    expected = np.asarray(whole.resize((47, 32), Image.Resampling.BILINEAR), dtype=np.float32)[:, 8:40] / 127.5 - 1
    np.testing.assert_array_equal(image(ImageFiles([str(tmp_path)], size=32)[0]).transpose(1, 2, 0), expected)


def test_photographs_stand_upright_as_hugging_face_decodes_them(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(RAW[0][:, :5]).save(tmp_path / "photograph.png", exif=turned)
    dataset = hf.Dataset.from_dict({"image": [str(tmp_path / "photograph.png")]}).cast_column("image", hf.Image())
    expected = np.asarray(dataset[0]["image"], dtype=np.float32) / 127.5 - 1
    assert expected.shape == (5, 8, 3)
    for found in (HuggingFace(dataset)[0], ImageFiles([str(tmp_path)])[0]):
        np.testing.assert_array_equal(image(found).transpose(1, 2, 0), expected)


def test_a_training_loops_transform_does_not_reach_the_images(tmp_path: Path) -> None:
    plain = as_hugging_face(tmp_path, None)
    hf = pytest.importorskip("datasets")
    dataset = hf.Dataset.from_dict({"image": contents(None)}).cast_column("image", hf.Image())
    transformed = HuggingFace(dataset.with_transform(lambda batch: {"pixel_values": batch["image"]}))
    np.testing.assert_array_equal(image(transformed[1]), image(plain[1]))


def test_pixels_of_more_than_8_bits_are_not_cut_off_but_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(CorruptImageError, match=r"deep\.png.*more than 8 bits"):
        ImageFiles([str(tmp_path)], 1)[0]


@pytest.mark.parametrize("kind", ["numpy", "npy", "zarr"])
def test_arrays_of_any_layout_give_images(tmp_path: Path, kind: str) -> None:
    expected = RAW.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    layouts = {"last": RAW, "first": RAW.transpose(0, 3, 1, 2), "grey": RAW[..., 0], "latents": expected}
    for name, values in layouts.items():
        source: Any = values
        if kind == "npy":
            source = tmp_path / f"{name}.npy"
            np.save(source, values)
        elif kind == "zarr":
            source = tmp_path / f"{name}.zarr"
            zarr.create_array(source, data=np.ascontiguousarray(values))
        dataset = Arrays(source, ids=NAMES, columns={"label": LABELS}, given={"label": LABELS})
        found = np.stack([image(dataset[row]) for row in range(N)])
        np.testing.assert_allclose(found, expected[:, :1] if name == "grey" else expected, atol=1e-6)
        assert dataset.ids.tolist() == NAMES
        item: Any = dataset[1]
        assert item["label"] == 1


def test_arrays_with_values_that_are_not_finite_are_named_or_left_out() -> None:
    values = np.zeros((3, 1, 4, 4), np.float32)
    values[1, 0, 0, 0] = np.nan
    with pytest.raises(CorruptImageError, match="image 1 of the array cannot be read: it has NaN or infinite entries"):
        Arrays(values)[1]
    assert Arrays(values, corrupt="skip").ids.tolist() == [0, 2]
    with pytest.raises(ValueError, match="dtype int64; give uint8, or floats"):
        Arrays(np.zeros((3, 4, 4), np.int64))
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4, 4\); give images"):
        Arrays(np.zeros((3, 4, 4, 4), np.uint8))


def test_ids_and_columns_reach_the_store_of_the_images_that_are_left(tmp_path: Path) -> None:
    dataset = as_shards(tmp_path, 3, channels=1, corrupt="skip")
    model = tiny_unet()
    task = rs.DiffusionTask(model, SCHEDULER)
    dataset._given.clear()
    store = rs.sketch(
        task,
        dataset,
        None,
        checkpoints={"last": {name: value.clone() for name, value in model.state_dict().items()}},
        timesteps=rs.EvenlySpaced(1),
        projection=rs.CountSketch(32),
        batch_size=4,
        progress=False,
    )
    assert store.ids.tolist() == ["image-0", "image-1", "image-2", "image-4"]
    assert store.columns["caption"].tolist() == ["picture 0", "picture 1", "picture 2", "picture 4"]


def test_bad_sources_are_refused_with_their_names(tmp_path: Path) -> None:
    as_shards(tmp_path, None)
    as_parquet(tmp_path, None)
    shard, table = str(tmp_path / "0.tar"), str(tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="id 'image-0' is given twice"):
        TarShards([shard, shard])
    with pytest.raises(ValueError, match=r"sample 'image-0' has no file \.txt, only \['cls', 'json', 'png'\]"):
        TarShards([shard], columns={"caption": "txt"})
    with pytest.raises(ValueError, match=r"0\.parquet is no whole uncompressed tar file"):
        TarShards([table])
    with pytest.raises(ValueError, match=r"0\.tar is no whole Parquet file"):
        Parquet([shard])
    with pytest.raises(ValueError, match=r"0\.parquet has no column 'picture'; it has \['image', 'name'"):
        Parquet([table], "picture")
    with pytest.raises(ValueError, match="Parquet got no files"):
        Parquet([])
    with pytest.raises(ValueError, match="TarShards got no shards"):
        TarShards([])
    hf = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="the dataset is streamed"):
        HuggingFace(hf.Dataset.from_dict({"image": [1]}).to_iterable_dataset())
    with pytest.raises(ValueError, match="no column 'image'; it has"):
        HuggingFace(hf.Dataset.from_dict({"other": [1]}))


def test_torch_datasets_and_tensors_go_in_as_they_are() -> None:
    model = tiny_unet()
    data = torch.utils.data.TensorDataset(torch.zeros(2, 1, 8, 8))
    store = rs.sketch(
        rs.DiffusionTask(model, SCHEDULER),
        data,
        None,
        checkpoints={"last": dict(model.state_dict())},
        timesteps=rs.EvenlySpaced(1),
        projection=rs.CountSketch(8),
        batch_size=2,
        progress=False,
    )
    assert store.ids.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_refused_not_cut_to_white(dtype: Any) -> None:
    with pytest.raises(ValueError, match="the image has more than 8 bits per channel"):
        pixels(Image.fromarray(np.full((4, 4), 1000).astype(dtype)), 1, None)


def test_a_file_whose_name_is_not_utf_8_is_named(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (tmp_path / "plain").mkdir()
    (folder / "0.png").write_bytes(png(0))
    latin = tmp_path / "plain" / os.fsdecode(b"caf\xe9.png")
    latin.write_bytes(png(0))
    with pytest.raises(ValueError, match=r"sample id '.*caf\\udce9.png' has no UTF-8"):
        ImageFiles([str(tmp_path / "plain")])
    with pytest.raises(ValueError, match=r"column 'folder': value 'caf\\udce9' has no UTF-8"):
        check_columns({"folder": [folder.name]}, 1)


def pictures(folder: Path, names: list[str]) -> None:
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / name)


def test_of_a_folder_count_the_files_that_imagefolder_takes(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    taken = ["a.png", "b.JPG", "c.tif", "d.gif", "e.tiff", "sub/f.webp", "sub/g.jfif"]
    hidden = [".trash/h.png", ".i.png", "__MACOSX/j.png", "sub/.ipynb_checkpoints/f-checkpoint.png"]
    pictures(tmp_path / "own", taken + hidden)
    (tmp_path / "own/._a.png").write_bytes(b"\0\5\26\7")  # macOS' AppleDouble
    (tmp_path / "own/metadata.txt").write_text("of no interest")
    theirs = hf.load_dataset("imagefolder", data_dir=tmp_path / "own", split="train", cache_dir=tmp_path / "cache")
    found = ImageFiles([str(tmp_path / "own")])
    assert [str(Path(name).relative_to(tmp_path / "own")) for name in found.ids] == sorted(taken)
    expected = theirs.cast_column("image", hf.Image(decode=False))["image"]
    assert sorted(found.ids) == sorted(one["path"] for one in expected)
    assert len(ImageFiles([tmp_path / "own/.i.png"])) == 1  # asked for by its name


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    pictures(tmp_path, ["elsewhere/a.png", "own/b.png"])
    (tmp_path / "own/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own/again").symlink_to(tmp_path / "own")
    found = ImageFiles(tmp_path / "own")
    assert sorted(Path(name).name for name in found.ids) == ["a.png", "b.png"]


def test_one_path_is_a_list_of_one(tmp_path: Path) -> None:
    as_shards(tmp_path, None)
    as_parquet(tmp_path, None)
    pictures(tmp_path, ["t.png"])
    assert len(ImageFiles(str(tmp_path / "t.png"))) == len(ImageFiles(tmp_path)) == 1
    assert len(TarShards(str(tmp_path / "0.tar"))) == len(Parquet(tmp_path / "0.parquet", columns="name")) == 3
    with pytest.raises(ValueError, match="there is no file or folder photos"):
        ImageFiles("photos")
    with pytest.raises(ValueError, match="a path must be a string or a Path, got 7"):
        ImageFiles([7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="has no column 'names'"):
        Parquet(tmp_path / "0.parquet", columns="names")


def test_images_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a Dask worker runs, say; ids stay as they were given."""
    hf = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    as_shards(tmp_path, None)
    as_parquet(tmp_path, None)
    np.save("images.npy", RAW)
    (tmp_path / "plain.png").write_bytes(png(0))
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "plain.png"}]}), "paths.parquet")
    paths = hf.Dataset.from_dict({"image": ["plain.png"]}).cast_column("image", hf.Image())
    given = [
        ImageFiles("plain.png"),
        TarShards("0.tar"),
        Parquet("0.parquet"),
        Parquet("paths.parquet"),
        HuggingFace(paths),
        Arrays("images.npy"),
    ]
    assert given[0].ids.tolist() == ["plain.png"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for dataset in map(pickle.loads, map(pickle.dumps, given)):
        np.testing.assert_allclose(image(dataset[0]), RAW[0].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_images_are_in_the_mode_in_which_the_data_set_gives_them() -> None:
    hf = pytest.importorskip("datasets")
    for mode in ("L", "RGB", "1", "CMYK"):
        dataset = hf.Dataset.from_dict({"image": contents(None)}).cast_column("image", hf.Image(mode=mode))
        expected = np.asarray(dataset[1]["image"].convert("RGB"), dtype=np.float32) / 127.5 - 1
        for given in (dataset, dataset.cast_column("image", hf.Image(mode=mode, decode=False))):
            np.testing.assert_array_equal(image(HuggingFace(given)[1]).transpose(1, 2, 0), expected)


def test_images_in_archives_and_in_arrays_are_read_as_hugging_face_reads_them(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("0.png", png(0))
    place = f"zip://0.png::{tmp_path}/images.zip"
    pq.write_table(pa.table({"image": [{"bytes": None, "path": place}]}), tmp_path / "paths.parquet")
    features = hf.Features({"image": hf.Array3D((8, 8, 3), "uint8")})
    for dataset in (
        HuggingFace(hf.Dataset.from_dict({"image": [place]}).cast_column("image", hf.Image())),
        HuggingFace(hf.Dataset.from_dict({"image": [RAW[0].tolist()]}, features=features)),
        Parquet(tmp_path / "paths.parquet"),
    ):
        np.testing.assert_allclose(image(dataset[0]), RAW[0].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    upright = hf.Features({"image": hf.Array3D((5, 8, 8), "uint8")})
    wrong = HuggingFace(hf.Dataset.from_dict({"image": [np.zeros((5, 8, 8), int).tolist()]}, features=upright))
    with pytest.raises(CorruptImageError, match=r"shape \(5, 8, 8\)"):
        wrong[0]


def test_columns_that_cannot_be_kept_are_named_with_their_rows(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    columns = {"text": ["a", None, "c"], "tags": [["a"], ["a", "b"], []], "class": [2, 0, 1]}
    dataset = hf.Dataset.from_dict({"image": contents(None)[:3], **columns}).cast_column("image", hf.Image())
    for given, message in {
        "text": r"no value of 'text' in row 1; fill it in",
        "tags": r"a list as 'tags' in row 0, \['a'\]; give one value",
    }.items():
        with pytest.raises(ValueError, match=message):
            HuggingFace(dataset, columns=given)
        with pytest.raises(ValueError, match=message.replace(given, "prompt", 1)):
            HuggingFace(dataset, given={"prompt": given})
    with pytest.raises(ValueError, match="no value of 'id' in row 1"):
        HuggingFace(dataset, id="text")
    assert HuggingFace(dataset, columns={"kind": "class"}).columns["kind"].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match=r"give one of them, dataset\['train'\]"):
        HuggingFace(hf.DatasetDict({"train": dataset}))


def test_a_sample_of_a_shard_with_two_images_says_which_is_meant(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, row in (("a.png", 0), ("a.webp", 1)):
            member = tarfile.TarInfo(name)
            member.size = len(png(row))
            tar.addfile(member, io.BytesIO(png(row)))
    with pytest.raises(ValueError, match=r"'a' of .* has images png, webp; say which"):
        TarShards(tmp_path / "0.tar")
    np.testing.assert_array_equal(
        image(TarShards(tmp_path / "0.tar", image="webp")[0]), pixels(png(1), 3, None).numpy()
    )


def test_a_folder_says_more_of_its_images_as_imagefolder_has_it(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [
        {"file_name": "b/2.png", "artist": "Bo", "year": 1999, "boxes": [1, 2]},
        {"file_name": "a/1.png", "artist": "Al", "year": 2001, "boxes": []},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for file in ("jsonl", "csv", "parquet"):
        if file == "csv":
            (tmp_path / "metadata.jsonl").unlink()
            (tmp_path / "metadata.csv").write_text("file_name,artist,year\nb/2.png,Bo,1999\na/1.png,Al,2001\n")
        elif file == "parquet":
            (tmp_path / "metadata.csv").unlink()
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
        columns = ImageFiles([tmp_path]).columns
        assert {name: values.tolist() for name, values in columns.items()} == {
            "folder": ["a", "b"],
            "artist": ["Al", "Bo"],
            "year": [2001, 1999],
        }
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "3.png")
    with pytest.raises(ValueError, match=r"metadata.parquet says nothing of a/3.png"):
        ImageFiles([tmp_path])


@pytest.mark.parametrize("file", ["metadata.jsonl", "metadata.csv"])
def test_a_column_of_the_metadata_that_lacks_a_value_is_left_out_and_named(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    rows = [("0.png", "a", 1999), ("1.png", "", None), ("2.png", "b", 2001)]
    if file.endswith("csv"):
        (tmp_path / file).write_text("file_name,kind,year\n0.png,a,1999\n1.png,,\n2.png,b,2001\n")
    else:
        named = [dict(zip(("file_name", "kind", "year"), row, strict=True)) for row in rows]
        (tmp_path / file).write_text("\n".join(map(json.dumps, named)))
    columns = ImageFiles(tmp_path).columns
    assert {name: values.tolist() for name, values in columns.items() if name != "folder"} == {"kind": ["a", "", "b"]}
    (record,) = caplog.records
    assert "column 'year' is left out, as 1 of 3 images have no text, number" in record.getMessage()
    assert "1.png; fill it in" in record.getMessage()


def test_a_folder_gives_images_their_captions_by_a_column_or_by_texts_beside_them(tmp_path: Path) -> None:
    for name in ("1", "2"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f" beside {name}\n" if name == "1" else "")
    rows = [{"file_name": "1.png", "text": "a cat", "kind": 3}, {"file_name": "2.png", "text": "a dog", "kind": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for origin, expected in (("text", ["a cat", "a dog"]), (".txt", ["beside 1", ""])):
        dataset = ImageFiles(tmp_path, given={"prompt": origin})
        items: list[Any] = [dataset[row] for row in range(2)]
        assert [item["prompt"] for item in items] == expected
    assert set(dataset.columns) == {"folder", "text"}  # of kind one is missing
    stamps = dataset.stamps
    (tmp_path / "2.txt").write_text("late")
    assert stamps is not None
    later = ImageFiles(tmp_path, given={"prompt": ".txt"}).stamps
    assert later is not None
    assert (later == stamps).tolist() == [True, False]  # a caption changes without its image
    with pytest.raises(ValueError, match=r"1 of 2 images of .*, such as 2.png, which has no 'kind' in the metadata"):
        ImageFiles(tmp_path, given={"label": "kind"})
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"1.txt is no text in UTF-8"):
        ImageFiles(tmp_path, given={"prompt": ".txt"})


def test_transparent_pictures_stand_on_the_ground_that_is_named(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    half.putpixel((1, 0), (255, 0, 0, 0))
    half.save(tmp_path / "p.png")
    files = ImageFiles([tmp_path])
    dropped = ((files.read(0) + 1) * 127.5).round()
    files.background = "#0000ff"
    put = ((files.read(0) + 1) * 127.5).round()
    assert dropped.permute(1, 2, 0).tolist() == [[[10, 20, 30], [255, 0, 0]]]  # as convert("RGB") does
    assert put.permute(1, 2, 0).tolist() == [[[10, 20, 30], [0, 0, 255]]]
    files.background = "blau"
    with pytest.raises(ValueError, match="background must be a colour such as white"):
        files[0]
