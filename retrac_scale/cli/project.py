"""The configuration file that the verbs share."""

from __future__ import annotations

import argparse
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrac_scale.projections import Projection

FILE = "retrac-scale.toml"
DENOISERS = ("unet", "transformer")
RECORDED = "recorded"
"""In place of a number of timesteps."""
NO_CAPTIONS = "none"
"""In place of where captions are."""


def _entry(default: Any, told: str, **option: Any) -> Any:
    """An entry of the file: its default, what it is for, and what else argparse is to know of its option."""
    return field(default=default, metadata={"told": told, "option": option})


def timesteps_of(given: str) -> int | str:
    """What --timesteps says."""
    if given == RECORDED or given.removeprefix("-").isdecimal():
        return given if given == RECORDED else int(given)
    raise argparse.ArgumentTypeError(f"give a number or {RECORDED}, not {given!r}")


def colour(given: str) -> str:
    """What --background says; empty for none."""
    if given:
        from PIL import ImageColor

        try:
            ImageColor.getrgb(given)
        except ValueError:
            raise argparse.ArgumentTypeError(f"give a colour such as white or #808080, not {given!r}") from None
    return given


def named(given: str) -> str:
    """What --measure says."""
    if "" in (each := parted(given)) or len(set(each)) < len(each):
        raise argparse.ArgumentTypeError(f"give each measure once, with commas between them, not {given!r}")
    return given


def parted(told: str) -> tuple[str, ...]:
    """Names of measures with commas between them; a comma within parentheses parts none."""
    return tuple(one.strip() for one in re.split(r",(?![^(]*\))", told))


@dataclass(frozen=True)
class Project:
    """Model, data and places: what the file, options and help say of each stands here alone.

    Paths are relative to the file's folder. Of a store that is there, entries that are not stated are what it has.
    """

    model: str = _entry("", "diffusers folder or hub name: a pipeline, or the denoiser itself")
    images: str = _entry("", "folder of training images")
    query_images: str = _entry("", "folder of images to ask about")
    out: str = _entry("attribution", "folder for stores, indexes and the report")
    checkpoints: Mapping[str, str] = field(default_factory=dict)  # {name: weights}; with none, the model's own
    timesteps: int | str = _entry(
        4,
        f"evenly spaced, at each of which every image is measured; or {RECORDED}: where it was trained, by the record",
        type=timesteps_of,
        metavar=f"N|{RECORDED}",
    )
    noise: str = _entry(
        "common",
        "of a timestep: common to all images and queries, or every image's own",
        choices=("common", "own"),
    )
    rank: int = _entry(-1, "of the projection; -1 chooses it, 0 keeps the full gradient (CountSketch)", type=int)
    dim: int = _entry(512, "numbers kept of each gradient, a byte each", type=int)
    measure: str = _entry(
        "mse,mean_squared_output",
        "what is differentiated: the training loss, mse or l1, and the mean square of the model's output beside it, "
        "which estimators that compare the same timesteps, such as ReTracRidge, add up; mse alone is half of the bytes "
        "and two thirds of the time, and further from what retraining says",
        type=named,
        metavar="MEASURE[,MEASURE]",
    )
    record: str = _entry(
        "", f"folder that a TrainingRecorder wrote, for {RECORDED} timesteps and the checkpoints' weights"
    )
    background: str = _entry(
        "",
        "what transparent pictures are put onto, such as white or #808080; with none their transparency is dropped, as "
        "diffusers' training examples do",
        type=colour,
    )
    captions: str = _entry(
        "",
        "where a model that is told prompts has those of images: a column of their metadata.jsonl, .csv or .parquet, "
        f"a suffix of files beside them such as .txt, or {NO_CAPTIONS} for the empty prompt of all; left out, a column "
        "text, caption or prompt, else .txt files",
    )
    size: int = _entry(
        0,
        "of the square that images are resized and cut to, as --resolution of diffusers' training examples; left "
        "out, what a model of latents takes, and images for a model of pixels stay as they are",
        type=int,
        metavar="PIXELS",
    )
    device: str = _entry("cpu", "where to compute")
    estimators: tuple[str, ...] = _entry(
        ("ReTracRidge",),
        "which indexes are built, in upper or lower case: ReTracRidge (recommended); TracIn and ReTrac, the inner "
        "products of arXiv 2401.09031; GradDot, GradCos, RelatIF, RenormIF, TRAK; DTRAK and DAS, for each of which "
        "`sketch` measures another function of the model; several stand beside each other on the page",
    )
    folder: str = ""  # of the file
    stated: frozenset[str] = field(default=frozenset(), compare=False)  # entries that the file or an option gives

    def path(self, name: str) -> str:
        """A path of the file, as it is from here; a hub's name stays."""
        joined = os.path.join(self.folder, name)
        return joined if "://" not in name and os.path.exists(joined) else name

    def own_name(self, file: str) -> str:
        """A file as a command that is run in the project's folder names it."""
        return os.path.relpath(file, self.folder or os.curdir)

    def place(self, name: str) -> str:
        """Where something stands in the output folder."""
        out = self.out if "://" in self.out else os.path.join(self.folder, self.out)
        return os.path.join(out, name)

    @property
    def measures(self) -> tuple[str, ...]:
        """The entry `measure`, apart."""
        return parted(self.measure)

    @property
    def store(self) -> str:
        """The store of training sketches."""
        return self.place("sketches.zarr")

    @property
    def encoded(self) -> str:
        """The training images' latents and embeddings."""
        return self.place("encoded.zarr")

    @property
    def queries(self) -> str:
        """The store of query sketches."""
        return self.place("queries.zarr")

    @property
    def checked(self) -> str:
        """The store of training images that are asked about as a check."""
        return self.place("check.zarr")

    def missing(self, url: str) -> str:
        """A sentence on a store that is not there: which command to run first."""
        if not self.stated:
            return (
                f"there is no {FILE} here and no store at {url}; run `retrac-scale init`, then `retrac-scale sketch`."
            )
        return f"there is no store at {url} yet; run `retrac-scale sketch` first."

    @property
    def denoiser(self) -> str:
        """The folder or hub name that the denoiser is loaded from."""
        path = self.path(self.model)
        return next((f"{path}/{name}" for name in DENOISERS if os.path.isdir(f"{path}/{name}")), path)

    @property
    def weights(self) -> dict[str, str]:
        """{checkpoint: weights}, the model's own under the name "final" where none is given."""
        return {name: self.path(path) for name, path in self.checkpoints.items()} or {"final": self.denoiser}

    @property
    def scheduler(self) -> str:
        """The folder or hub name that the noise scheduler is loaded from."""
        path = self.path(self.model)
        places = (f"{path}/scheduler", path, f"{os.path.dirname(path.rstrip('/'))}/scheduler")
        return next((one for one in places if os.path.isfile(f"{one}/scheduler_config.json")), path)

    def dumps(self, beside: Mapping[str, str] | None = None) -> str:
        """The file's text.

        Args:
            beside: {name: weights} of checkpoints that were found and are not used; they are written as comments.
        """
        lines = ["# Written by `retrac-scale init`. Options of a command come first; paths are relative to this file."]
        for name, told in told_entries().items():
            comment = textwrap.wrap(told, 118, initial_indent="# ", subsequent_indent="# ")
            line = f"{name} = {_toml(getattr(self, name))}"
            lines += [f"{line}  {comment[0]}"] if len(line) + len(told) < 116 else [*comment, line]
        lines += [
            "",
            "[checkpoints]  # name = weights, whose scores are added up; with none, the model's own",
            *(f"{_toml(name)} = {_toml(path)}" for name, path in self.checkpoints.items()),
            *(f"# {_toml(name)} = {_toml(path)}" for name, path in (beside or {}).items()),
        ]
        return "\n".join(lines) + "\n"


def told_entries() -> dict[str, str]:
    """What each entry of the file is for, but the table of checkpoints."""
    return {one.name: one.metadata["told"] for one in fields(Project) if one.metadata}


def find(config: str | None) -> Project:
    """The project in a file, by default that in the working directory; an empty one when there is none.

    Raises:
        ValueError: the file is damaged, or says something that nobody knows; names it.
    """
    file = Path(config or FILE)
    if not file.exists():
        if config:
            raise FileNotFoundError(f"there is no {file}; `retrac-scale init` writes one.")
        return Project()
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no TOML: {error}.") from None
    _check(found, file)
    stated = frozenset(found)
    if found.get("estimators") == []:
        raise ValueError(f"{file} names no estimator; leave the entry out, or name one such as 'ReTrac'.")
    estimators = tuple(found.pop("estimators", Project.estimators))
    folder = str(file.parent) if file.parent != Path() else ""
    return Project(**found, estimators=estimators, folder=folder, stated=stated)


def owner(store: str | None, here: Project) -> Project:
    """The project that a store belongs to: the one here, or that of a file in a folder above it; else the one here."""
    if store is None or os.path.abspath(here.store) == store:
        return here
    above = [find(str(folder / FILE)) for folder in Path(store).parents if (folder / FILE).is_file()]
    return next((one for one in above if os.path.abspath(one.store) == store), here)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that stand for entries of the file."""
    for one in fields(Project):
        if one.name == "checkpoints":
            parser.add_argument(
                "--checkpoint", action="append", help="NAME=weights, for each (default: the model's own)"
            )
        elif one.metadata and one.name != "estimators":
            default = f" (default: {one.default})" if one.default else ""
            parser.add_argument(
                f"--{one.name.replace('_', '-')}", help=one.metadata["told"] + default, **one.metadata["option"]
            )


def overruled(project: Project, arguments: argparse.Namespace) -> Project:
    """The project with what the options of `add_options` say."""
    names = told_entries().keys() - {"estimators"}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    checkpoints = parse_checkpoints(arguments.checkpoint) if arguments.checkpoint else project.checkpoints
    return replace(project, **given, checkpoints=checkpoints, stated=project.stated | given.keys())


def parse_checkpoints(items: list[str]) -> dict[str, str]:
    """NAME=weights pairs.

    Raises:
        ValueError: an item lacks its "=".
    """
    for item in items:
        if "=" not in item:
            raise ValueError(f"--checkpoint {item}: write NAME=weights.")
    return dict(item.split("=", 1) for item in items)


def projection_of(rank: int, dim: int) -> Projection:
    """What the file's rank and dim stand for."""
    from retrac_scale.projections import CountSketch, LowRank

    return LowRank(rank if rank > 0 else None, dim) if rank else CountSketch(dim)


def need(value: Any, what: str) -> Any:
    """A value that a command cannot do without.

    Raises:
        ValueError: it is missing; says how to give it.
    """
    if not value:
        raise ValueError(f"give {what}, or run `retrac-scale init` first, which writes it into {FILE}.")
    return value


def _check(found: Mapping[str, Any], file: Path) -> None:
    default, known = Project(), {*told_entries(), "checkpoints"}
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"{file} has an unknown entry {name!r}; known are {', '.join(sorted(known))}.")
        kind = list if name == "estimators" else dict if name == "checkpoints" else type(getattr(default, name))
        if name == "timesteps" and value == RECORDED:
            continue
        inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        if type(value) is not kind or not all(isinstance(one, str) for one in inner):
            raise ValueError(f"{file}: {name} must be like {getattr(default, name)!r}, got {value!r}.")
    for name, told in (("background", colour), ("measure", named)):
        try:
            told(found.get(name, getattr(default, name)))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{file}: {name}: {error}.") from None


def _toml(value: str | int | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings and arrays are JSON's
