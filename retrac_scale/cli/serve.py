"""The verb serve."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrac_scale.cli.indexes import open_indexes, picture_names
from retrac_scale.cli.measured import measured_like
from retrac_scale.cli.project import Project, find, parse_checkpoints
from retrac_scale.cli.report import add_sources, open_queries, project_queries, still_there
from retrac_scale.cli.verb import Answer, Verb

if TYPE_CHECKING:
    from retrac_scale.query.index import Index


def _options(parser: argparse.ArgumentParser) -> None:
    add_sources(parser)
    parser.add_argument("--model", help="for uploads: diffusers folder or hub name")
    parser.add_argument("--checkpoint", action="append", default=[], help="for uploads: NAME=weights, for each")
    parser.add_argument("--timesteps", type=int, help="for uploads: evenly spaced (default: those of the store)")
    parser.add_argument("--device", help="for uploads: where to sketch (default: the project's, or cpu)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: 8000)")
    parser.add_argument("--token-file", help="file with the token that clients must send; or in RETRAC_SCALE_TOKEN")
    parser.add_argument("--max-k", type=int, default=100, help="most results per side (default: 100)")
    parser.add_argument("--max-upload-mb", type=float, default=10, help="largest file (default: 10)")
    parser.add_argument("--max-megapixels", type=float, default=25, help="largest image (default: 25)")
    parser.add_argument("--max-concurrent", type=int, default=256, help="most requests at a time (default: 256)")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.query.index import open_index
    from retrac_scale.report import Pictures, read_images

    try:
        from retrac_scale import serve
        from retrac_scale.serve.library import Library
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}; install it with: pip install 'retrac_scale[serve]'.") from None
    project = find(arguments.config)
    indexes = open_indexes(arguments.index, project)
    first = next(iter(indexes.values()))
    own = not arguments.index and bool(project.model)
    model = arguments.model or (project.path(project.model) if own else None)
    weights = parse_checkpoints(arguments.checkpoint) or (project.weights if own else {})
    measured = None
    matched = [name for name, index in indexes.items() if index.estimator.pairing == "matched"]
    if arguments.timesteps is not None and matched:
        raise ValueError(f"{matched[0]} compares gradients at the timesteps of its store; leave --timesteps out.")
    if model is not None:
        measured = measured_like(first, model, weights, arguments.timesteps, arguments.device or project.device)
    token = os.environ.get("RETRAC_SCALE_TOKEN")
    if arguments.token_file is not None:
        token = Path(arguments.token_file).read_text(encoding="utf-8").strip()
    limits = serve.Limits(
        upload_bytes=int(arguments.max_upload_mb * 2**20),
        pixels=int(arguments.max_megapixels * 1e6),
        k=arguments.max_k,
        concurrent=arguments.max_concurrent,
    )
    more: dict[str, Any] = {"measured": measured, "kept_uploads": limits.kept_uploads, "background": project.background}

    def load(indexes: dict[str, Index]) -> Library:
        queries = open_queries(arguments.queries or _queries_of_project(project), indexes)
        if not arguments.queries:
            queries = {name: still_there(project, one)[0] for name, one in queries.items()}
        ids = next(iter(queries.values())).ids if queries else None
        places, first = (project.folder, project.background), next(iter(indexes.values()))
        shown = [] if ids is None else read_images(arguments.query_images, ids, *places)
        pictures = Pictures(read_images(arguments.images, picture_names(first), *places), first.places.ids, shown)
        return Library(indexes, pictures, queries=queries or None, **more)

    def renew() -> Library:
        return load({name: open_index(index.url) for name, index in indexes.items()})

    def announce(url: str) -> None:
        print(json.dumps({"url": url}) if arguments.json else f"serving at {url} ; Ctrl-C ends it", flush=True)

    place = {"host": arguments.host, "port": arguments.port}
    shown = {"limits": limits, "title": arguments.title, "announce": announce}
    serve.run(load(indexes), **place, token=token, renew=renew, **shown)
    return Answer("ended", {"ended": True})


def _queries_of_project(project: Project) -> list[str]:
    try:
        return [project_queries(project)]
    except FileNotFoundError:  # training samples and uploads can be asked about all the same
        return []


VERB = Verb(
    "serve",
    "Serve the page and a JSON API over HTTP, for this machine alone unless told otherwise.",
    """  retrac-scale serve                                  what retrac-scale.toml says, at http://127.0.0.1:8000/
  retrac-scale serve demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy
  retrac-scale serve retrac.zarr --model model/unet --checkpoint final=model/unet     uploads are sketched and asked
  retrac-scale serve retrac.zarr --host 0.0.0.0 --token-file token.txt                others come in with the token""",
    _options,
    _run,
)
