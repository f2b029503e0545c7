"""The verb query."""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.indexes import open_asked, open_indexes
from retrac_scale.cli.measured import image_files, measured_like, region_told
from retrac_scale.cli.project import Project, colour, find, owner, parse_checkpoints, told_entries
from retrac_scale.cli.report import project_queries, still_there, unsketched
from retrac_scale.cli.told import tell
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.datasets import ImageFiles
    from retrac_scale.query.index import Index
    from retrac_scale.query.topk import TopK
    from retrac_scale.sketching.samples import Samples
    from retrac_scale.store import SketchStore
    from retrac_scale.task.diffusion import DiffusionTask

MEASURING = ("model", "checkpoint", "timesteps", "device", "size", "background", "captions")
"""Options that say how images are measured."""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", nargs="?", help="path or URL of an index (default: the project's)")
    parser.add_argument("queries", nargs="*", help="a store of query sketches, or image files and folders of them")
    parser.add_argument(
        "--ids", nargs="+", help="training samples to query with, by any short form: google/pear.png, pear"
    )
    parser.add_argument("--model", help="for images: diffusers folder or hub name (default: the project's)")
    parser.add_argument("--checkpoint", action="append", default=[], help="for images: NAME=weights, for each")
    parser.add_argument("--timesteps", type=int, help="for images: evenly spaced (default: those of the store)")
    parser.add_argument("--device", help="for images: where to sketch (default: the project's, or cpu)")
    entries = ("size", "background", "captions")
    told = {name: f"for images: {told_entries()[name]} (default: the project's)" for name in entries}
    parser.add_argument("--size", type=int, metavar="PIXELS", help=told["size"])
    parser.add_argument("--background", type=colour, help=told["background"])
    parser.add_argument("--captions", help=told["captions"])
    parser.add_argument(
        "--prompt",
        metavar="WORDS",
        help="of images: what the model is told of all of them (default: their captions, as `sketch` finds those of "
        "the project; else the empty prompt)",
    )
    parser.add_argument("--region", metavar="X0,Y0,X1,Y1", help="of images: ask about this box of pixels alone")
    parser.add_argument("--mask", help="of images: ask about what is white in this picture, of the images' size, alone")
    parser.add_argument("--all-but", action="store_true", help="ask about all but the --region or --mask")
    parser.add_argument(
        "--views",
        action="store_true",
        help="of images: ask about each as it is, moved, smaller, larger, lighter and darker, for the best scores: "
        "for what may lie elsewhere in a training image, or look otherwise",
    )
    parser.add_argument(
        "--concept",
        metavar="WORDS",
        help="of images: ask what the model makes of a prompt, or of a class by its number",
    )
    parser.add_argument(
        "--against", metavar="WORDS", help="what --concept is compared with (default: the empty prompt, or no class)"
    )
    parser.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    parser.add_argument("--side", choices=("proponents", "opponents", "both"), default="proponents")
    parser.add_argument("--where", help="which samples count: an expression over the columns and id")
    parser.add_argument("--group-by", help="a column: answer with groups in place of samples")
    parser.add_argument(
        "--reduce", choices=("sum", "mean", "max"), default="sum", help="a group's score (default: sum)"
    )
    parser.add_argument("--together", action="store_true", help="all queries as one question: means over them")
    parser.add_argument(
        "--fold-copies",
        nargs="?",
        const="fold",
        default="keep",
        metavar="LIKENESS",
        help="near-duplicates stand with the best of them, and count once in groups; LIKENESS, up to 1, says from when",
    )
    parser.add_argument("--out", help="file to write in place of printing: .json or .parquet")


def _run(arguments: argparse.Namespace) -> Answer:
    project = find(arguments.config)
    asked = [*filter(None, [arguments.index]), *arguments.queries]
    if project.stated and arguments.ids is None and all(map(_may_be_pictures, asked)):
        arguments.index, arguments.queries = None, asked
    queries_of_project = not arguments.queries and arguments.ids is None
    index = next(iter(open_indexes([arguments.index] if arguments.index else [], project).values()))
    if queries_of_project:
        arguments.queries = [project_queries(project, "query INDEX STORE, or query INDEX and image files")]
    notes: list[str] = []
    queries = _queries(index, arguments, project, notes)
    if queries_of_project:
        queries, notes = still_there(project, queries)  # type: ignore[arg-type]
        _check_pictures(queries, project)
        notes += unsketched(project, queries.ids)
    answer = index.query(
        queries,
        arguments.k,
        side=arguments.side,
        where=arguments.where,
        group_by=arguments.group_by,
        reduce=arguments.reduce,
        exclude_self=arguments.ids is not None,
        duplicates=_duplicates(arguments.fold_copies),
        together=arguments.together,
    )
    if arguments.out is None:
        return Answer(_text(answer, index, notes, arguments), json.loads(answer.to_json()))
    if arguments.out.endswith(".parquet"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(answer.to_arrow(), arguments.out)
    elif arguments.out.endswith(".json"):
        Path(arguments.out).write_text(answer.to_json(), encoding="utf-8")
    else:
        raise ValueError(f"--out {arguments.out}: the name must end in .json or .parquet.")
    return Answer(arguments.out, {"out": arguments.out})


def _duplicates(told: str) -> Any:
    try:
        return told if told in ("keep", "fold") else float(told)
    except ValueError:
        raise ValueError(f"--fold-copies {told}: give a likeness in 0 .. 1, or nothing behind it.") from None


def _text(answer: TopK, index: Index, notes: list[str], arguments: argparse.Namespace) -> str:
    from retrac_scale.query.table import common_folder, table

    what = f"{' and '.join(answer.sides)} among {index.shape[1]:,} samples"
    below = "" if arguments.group_by else common_folder(index.ids.tolist())
    what += f", all in {below}" if below else ""
    what += f", where {arguments.where}" if arguments.where else ""
    what += f", {arguments.reduce} by {arguments.group_by}" if arguments.group_by else ""
    head = f"{type(index.estimator).__name__}: {what}"
    return "\n\n".join([head, table(answer, below), *(f"note: {note}" for note in notes)])


def _check_pictures(store: SketchStore, project: Project) -> None:
    """Raise ChangedItemsError where the files that the ids of queries name are not those that were sketched."""
    from retrac_scale.report import read_images
    from retrac_scale.report.shown import check_shown

    try:
        images = read_images(None, store.ids, project.folder, project.background)
    except ValueError:  # the ids name no files
        return
    check_shown(store, store.ids.tolist(), images, exact=True)


def _queries(index: Index, arguments: argparse.Namespace, project: Project, notes: list[str]) -> SketchStore | Samples:
    """What is asked: stored ids, a store of sketches, or images, measured as the index's store was; notes are added."""
    from retrac_scale.query.table import in_full
    from retrac_scale.store.taking import take

    if (arguments.ids is None) == (not arguments.queries):
        raise ValueError("give either queries (a store, or images) or --ids of training samples.")
    region = region_told(arguments.region, arguments.mask, arguments.all_but)
    if arguments.against is not None and arguments.concept is None:
        raise ValueError("--against needs the --concept that is compared with it.")
    if arguments.ids is not None:
        _refuse_new(arguments, region, "--ids are answered from stored sketches")
        store = index.check_store()
        if store is None:
            raise ValueError("the store that the index was built from is needed for --ids; it was in memory.")
        return take(store, in_full(arguments.ids, store.ids.tolist()))
    first = arguments.queries[0]
    if len(arguments.queries) == 1 and not _may_be_pictures(first):
        _refuse_new(arguments, region, f"{first} holds sketches of whole images")
        return open_asked(first, index)
    whose = project if arguments.config else owner(index.meta["store"], project)
    return _pictures(index, arguments, whose, region, notes)


def _pictures(index: Index, arguments: argparse.Namespace, project: Project, region: Any, notes: list[str]) -> Samples:
    """Image files as queries, measured, cut and put onto a ground as the project's images were; notes are added."""
    model = arguments.model or (project.path(project.model) if project.model else None)
    checkpoints = parse_checkpoints(arguments.checkpoint) or (project.weights if project.model else {})
    if model is None or not checkpoints:
        raise ValueError("to query with images give --model and a --checkpoint NAME=weights for each checkpoint.")
    measured = measured_like(index, model, checkpoints, arguments.timesteps, arguments.device or project.device)
    task, store = measured.task, index.check_store()
    concept = task.told.concept(arguments.concept, arguments.against)
    shape = None if store is None else task.picture_of(store.plan.get("sample", ()))
    latent = task.encoder is not None and task.encoder.vae is not None  # whose store tells the size
    size = (0 if latent else project.size) if arguments.size is None else arguments.size
    files = image_files(arguments.queries, task, size, shape)
    files.background = project.background if arguments.background is None else arguments.background
    notes += filter(None, [_prompted(files, task, arguments, project), _dropped(files)])
    return replace(measured, dataset=files, region=region, concept=concept, views=arguments.views)


def _dropped(files: ImageFiles) -> str:
    """What is to be said of the transparency of images that are put onto no ground."""
    from PIL import Image

    from retrac_scale.datasets.base import UNREADABLE, is_transparent

    if files.background:
        return ""

    clear = []
    for sample, file in zip(files.ids.tolist(), files.files(), strict=True):
        with contextlib.suppress(*UNREADABLE), Image.open(file) as picture:  # reading it tells what is wrong with it
            clear += [sample] if is_transparent(picture) else []
    if not clear:
        return ""
    which = f"{clear[0]} is" if len(clear) == 1 else f"{len(clear)} of {len(files)} images, such as {clear[0]}, are"
    return f"{which} transparent, which is dropped; --background puts it onto a colour"


def _prompted(files: ImageFiles, task: DiffusionTask, arguments: argparse.Namespace, project: Project) -> str:
    """What is to be said of the prompts under which images are asked about, which are handed on with them."""
    given = [name for name in ("prompt", "captions") if getattr(arguments, name) is not None]
    if given and not task.told.prompts:
        raise ValueError(f"the model is told no prompts; leave --{given[0]} out.")
    if len(given) > 1:
        raise ValueError("--prompt is told of all images, whatever their captions; leave --captions out.")
    if arguments.prompt is None:
        told = tell(files, task, project.captions if arguments.captions is None else arguments.captions, needed=False)
    else:
        files.give("prompt", [arguments.prompt] * len(files))
        told = f"the model is told {arguments.prompt!r} of all images"
    return "" if arguments.concept is not None else told


def _may_be_pictures(place: str) -> bool:
    if "://" in place or Path(place, "zarr.json").exists():
        return False
    from retrac_scale.datasets.base import SUFFIXES  # needs torch

    return Path(place).is_dir() or place.lower().endswith(SUFFIXES)


def _refuse_new(arguments: argparse.Namespace, region: Any, why: str) -> None:
    """ValueError for a part, views or a concept, which have to be measured, and for how it would be done."""
    advice = "ask about image files, with --model where no project says it."
    if region is not None:
        raise ValueError(f"{why}, which have no parts; {advice}")
    if arguments.views:
        raise ValueError(f"{why}, which are seen in one way; {advice}")
    if arguments.concept is not None:
        raise ValueError(f"{why}, which were measured without a concept; {advice}")
    if arguments.prompt is not None:
        raise ValueError(f"{why}, which were measured under prompts of their own; {advice}")
    for name in MEASURING:
        if getattr(arguments, name) not in (None, []):
            raise ValueError(f"{why}, which were measured already, so that --{name} changes nothing; {advice}")


VERB = Verb(
    "query",
    "Print the training samples that influenced each query most.",
    """  retrac-scale query                                             the queries of retrac-scale.toml
  retrac-scale query --ids google/pear                           a training image of it as a query
  retrac-scale query a.png folder/                               image files, sketched here as its images were
  retrac-scale query demo/retrac.zarr demo/queries.zarr           the top 10 of every query
  retrac-scale query demo/retrac.zarr demo/queries.zarr -k 3 --side both --where "id < 1000"
  retrac-scale query demo/retrac.zarr --ids 3 1800                training samples as queries, themselves left out
  retrac-scale query retrac.zarr a.png folder/ --model google/ddpm-cifar10-32 \\
      --checkpoint final=google/ddpm-cifar10-32                   image files, sketched here as the store was
  retrac-scale query retrac.zarr a.png --background white --size 64       where no project says it
  retrac-scale query retrac.zarr a.png --region 0,0,16,8          a part of it: a box, or --mask white.png; --all-but
  retrac-scale query retrac.zarr a.png --region 0,0,16,8 --views  the same where it may have been moved or enlarged
  retrac-scale query retrac.zarr a.png --model sd/ --checkpoint final=sd/unet --concept "a red car" --against "a car"
  retrac-scale query retrac.zarr a.png --concept 3                what class 3 adds to it; --against 5 for another
  retrac-scale query demo/retrac.zarr demo/queries.zarr --group-by artist --reduce mean
  retrac-scale query demo/retracridge.zarr demo/queries.zarr --fold-copies      near-duplicates once
  retrac-scale query demo/retracridge.zarr demo/queries.zarr --group-by shows --together    what all of them owe to whom
  retrac-scale query demo/retrac.zarr demo/queries.zarr --out answers.parquet    or .json, or --json to print it""",
    _options,
    _run,
)
