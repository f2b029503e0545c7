"""The configuration file that the verbs share."""

from __future__ import annotations

import argparse
import json
import os
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
ESTIMATORS = (
    "which indexes are built, in upper or lower case: ReTracRidge (recommended); TracIn and ReTrac, the inner products "
    "of arXiv 2401.09031; GradDot, GradCos, RelatIF, RenormIF, TRAK; DTRAK and DAS, for each of which `sketch` "
    "measures another function of the model; several stand beside each other on the page"
)


@dataclass(frozen=True)
class Project:
    """Model, data and places; paths are relative to the file's folder.

    Attributes:
        model: diffusers folder or hub name: a pipeline, or the denoiser itself.
        images: folder of training images.
        query_images: folder of images to ask about.
        out: folder for stores, indexes and the report.
        checkpoints: {name: weights}; default: the model's own.
        timesteps: at how many evenly spaced timesteps each image is measured; "recorded" for where it was trained.
        noise: "common" to all images and queries at a timestep, or each image's "own".
        rank: of the projection; -1 chooses it, 0 keeps the full gradient (CountSketch).
        dim: entries of a sketch.
        measure: "mse" or "l1".
        record: folder of a training record, which "recorded" timesteps and the checkpoints' weights come from.
        background: what transparent pictures are put onto, such as "white"; empty drops their transparency.
        device: where to compute.
        estimators: which indexes are built.
        folder: of the file.
        stated: entries that the file or an option gives; of a store that is there the others are what it has.
    """

    model: str = ""
    images: str = ""
    query_images: str = ""
    out: str = "attribution"
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    timesteps: int | str = 4
    noise: str = "common"
    rank: int = -1
    dim: int = 512
    measure: str = "mse"
    record: str = ""
    background: str = ""
    device: str = "cpu"
    estimators: tuple[str, ...] = ("ReTracRidge",)
    folder: str = ""
    stated: frozenset[str] = field(default=frozenset(), compare=False)

    def path(self, name: str) -> str:
        """A path of the file, as it is from here; a hub's name stays."""
        joined = os.path.join(self.folder, name)
        return joined if "://" not in name and os.path.exists(joined) else name

    def own_name(self, file: str) -> str:
        """A file as a command that is run in the project's folder names it."""
        return file.removeprefix(os.path.join(self.folder, "")) if self.folder else file

    def place(self, name: str) -> str:
        """Where something stands in the output folder."""
        out = self.out if "://" in self.out else os.path.join(self.folder, self.out)
        return os.path.join(out, name)

    @property
    def store(self) -> str:
        """The store of training sketches."""
        return self.place("sketches.zarr")

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
        often = self.timesteps if self.timesteps == RECORDED else f"{self.timesteps} x {self.dim}"
        size = "" if often == RECORDED else f": {often} bytes of an image"
        lines = [
            "# Written by `retrac-scale init`. Options of a command come first; paths are relative to this file.",
            f"model = {_toml(self.model)}  # diffusers folder or hub name",
            f"images = {_toml(self.images)}  # folder of training images",
            f"query_images = {_toml(self.query_images)}  # folder of images to ask about",
            f"out = {_toml(self.out)}  # folder for stores, indexes and the report",
            f"timesteps = {_toml(self.timesteps)}  # evenly spaced, at each of which every image is measured; or"
            f' "{RECORDED}": where it was trained, by the record',
            f"record = {_toml(self.record)}  # folder that a TrainingRecorder wrote, if there is one",
            f'noise = {_toml(self.noise)}  # of a timestep: the same for all images and queries, or "own" for each',
            f"rank = {self.rank}  # of the projection; -1 chooses it, 0 keeps the full gradient",
            f"dim = {self.dim}  # numbers kept of each gradient{size}",
            f"measure = {_toml(self.measure)}  # the training loss: mse or l1",
            f'background = {_toml(self.background)}  # under transparent pictures, such as "white" or "#808080"; '
            "empty drops transparency",
            f"device = {_toml(self.device)}",
            *textwrap.wrap(ESTIMATORS, 118, initial_indent="# ", subsequent_indent="# "),
            f"estimators = {_toml(list(self.estimators))}",
            "",
            "[checkpoints]  # name = weights, whose scores are added up; with none, the model's own",
            *(f"{_toml(name)} = {_toml(path)}" for name, path in self.checkpoints.items()),
            *(f"# {_toml(name)} = {_toml(path)}" for name, path in (beside or {}).items()),
        ]
        return "\n".join(lines) + "\n"


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that stand for entries of the file."""
    parser.add_argument("--model", help="diffusers folder or hub name: a pipeline, or the denoiser itself")
    parser.add_argument("--images", help="folder of training images")
    parser.add_argument("--query-images", help="folder of images to ask about")
    parser.add_argument("--out", help="folder for stores, indexes and the report (default: attribution)")
    parser.add_argument("--checkpoint", action="append", help="NAME=weights, for each (default: the model's own)")
    parser.add_argument(
        "--timesteps",
        type=timesteps_of,
        metavar="N|recorded",
        help="evenly spaced, at which each image is measured (default: 4), or recorded: where each was trained",
    )
    parser.add_argument("--record", help="folder of the training record, for recorded timesteps")
    parser.add_argument(
        "--noise",
        choices=("common", "own"),
        help="of a timestep: the same for all images and queries (the default), or every image's own",
    )
    parser.add_argument(
        "--rank", type=int, help="of the projection; 0 keeps the full gradient (default: -1, chosen for dim)"
    )
    parser.add_argument("--dim", type=int, help="numbers kept of each gradient at a timestep (default: 512)")
    parser.add_argument("--measure", choices=("mse", "l1"), help="the training loss (default: mse)")
    parser.add_argument(
        "--background",
        help="what transparent pictures are put onto, such as white, black, #808080 (default: their transparency is "
        "dropped, as diffusers' training examples do)",
    )
    parser.add_argument("--device", help="where to compute (default: cpu)")


def overruled(project: Project, arguments: argparse.Namespace) -> Project:
    """The project with what the options of `add_options` say."""
    names = {one.name for one in fields(Project)} - {"checkpoints", "estimators", "folder", "stated"}
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    checkpoints = parse_checkpoints(arguments.checkpoint) if arguments.checkpoint else project.checkpoints
    return replace(project, **given, checkpoints=checkpoints, stated=project.stated | given.keys())


def timesteps_of(given: str) -> int | str:
    """What --timesteps says."""
    if given == RECORDED or given.removeprefix("-").isdecimal():
        return given if given == RECORDED else int(given)
    raise argparse.ArgumentTypeError(f"give a number or {RECORDED}, not {given!r}")


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
    default, known = Project(), {one.name for one in fields(Project)} - {"folder", "stated"}
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"{file} has an unknown entry {name!r}; known are {', '.join(sorted(known))}.")
        kind = list if name == "estimators" else dict if name == "checkpoints" else type(getattr(default, name))
        if name == "timesteps" and value == RECORDED:
            continue
        inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        if type(value) is not kind or not all(isinstance(one, str) for one in inner):
            raise ValueError(f"{file}: {name} must be like {getattr(default, name)!r}, got {value!r}.")


def _toml(value: str | int | list[str]) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings and arrays are JSON's
