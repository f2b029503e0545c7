"""retrac-scale: the command line."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrac_scale.index import Index
    from retrac_scale.samples import Samples
    from retrac_scale.store import SketchStore

INFO_BLOCKS = 32
"""About how many blocks of each checkpoint `info` reads for its norms."""

EXAMPLES = {
    "": """examples:
  retrac-scale demo                             train, sketch, index, query, report: the whole street on real digits
  retrac-scale info demo/sketches.zarr          what is in a store or an index
  retrac-scale index demo/sketches.zarr demo/retrac.zarr --estimator ReTrac
  retrac-scale query demo/retrac.zarr demo/queries.zarr
  retrac-scale report demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy --out report.html""",
    "demo": """examples:
  retrac-scale demo                             into ./demo
  retrac-scale demo --out /tmp/digits           elsewhere; run it again to continue or to see the result again""",
    "info": """examples:
  retrac-scale info demo/sketches.zarr          a store: checkpoints, samples, timesteps, what is committed
  retrac-scale info demo/retrac.zarr            an index: its estimator and size
  retrac-scale info s3://bucket/sketches.zarr   any fsspec URL""",
    "verify": """examples:
  retrac-scale verify demo/sketches.zarr            reads everything; 0: whole, 1: damaged, 3: sound but not complete
  retrac-scale verify demo/sketches.zarr --repair   drops damaged blocks, so that the next sketch(...) computes them""",
    "plan": """examples:
  retrac-scale plan --samples 1000000 --timesteps 1 --checkpoints 4 --dim 4096
  retrac-scale plan --samples 1833 --timesteps 1 --checkpoints 4 --dim 4096 --model demo
  retrac-scale plan --samples 50000 --timesteps 10 --checkpoints 4 --dim 2048 --rank 16 \\
      --model google/ddpm-cifar10-32 --device cuda --hours 12""",
    "index": """examples:
  retrac-scale index demo/sketches.zarr demo/retrac.zarr --estimator ReTrac
  retrac-scale index sketches.zarr matched.zarr --estimator ReTrac --pairing matched --dtype float16""",
    "query": """examples:
  retrac-scale query demo/retrac.zarr demo/queries.zarr           a table of the top 10 of every query
  retrac-scale query demo/retrac.zarr demo/queries.zarr -k 3 --side both --where "id < 1000"
  retrac-scale query demo/retrac.zarr --ids 3 1800                training samples as queries, themselves left out
  retrac-scale query retrac.zarr a.png folder/ --model google/ddpm-cifar10-32 --timesteps 20 \\
      --checkpoint final=google/ddpm-cifar10-32                   image files, sketched here
  retrac-scale query demo/retrac.zarr demo/queries.zarr --group-by artist --reduce mean
  retrac-scale query demo/retrac.zarr demo/queries.zarr --out answers.parquet    or .json, or --json to print it""",
    "report": """examples:
  retrac-scale report demo/retrac.zarr --queries demo/queries.zarr \\
      --images demo/images.npy --query-images demo/generated.npy --out report.html
  several indexes stand beside each other on the page:
  retrac-scale report demo/tracin.zarr demo/retrac.zarr --queries demo/queries.zarr ...""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 on a failure that is told in one line, 2 on wrong usage, 3 see `verify --help`."""
    arguments = _parser().parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError, KeyError, RuntimeError) as error:
        print(f"retrac-scale: {error.args[0] if error.args else error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"retrac-scale: {error.strerror or error}", file=sys.stderr)
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrac-scale",
        description="Which training samples made a diffusion model produce this one?",
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="command")

    def verb(name: str, run: object, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=help,
            description=help,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    demo = verb("demo", _demo, "Train a small model on scanned digits and attribute what it draws.")
    demo.add_argument("--out", default="demo", help="folder for everything (default: demo)")
    info = verb("info", _info, "Say what is in a store or an index.")
    info.add_argument("url", help="path or fsspec URL")
    verify = verb("verify", _verify, "Check every byte of a store against what was committed.")
    verify.add_argument("url", help="path or fsspec URL of a store")
    verify.add_argument("--repair", action="store_true", help="drop what is damaged; no process may be writing")
    plan = verb("plan", _plan, "Predict bytes, time and workers of a run.")
    for name, what in (("samples", "N"), ("timesteps", "T per sample"), ("checkpoints", "C"), ("dim", "K per sketch")):
        plan.add_argument(f"--{name}", type=int, required=True, help=what)
    plan.add_argument("--dtype", default="int8", choices=("int8", "float16", "bfloat16", "float32"))
    plan.add_argument("--model", help="diffusers folder or hub name, or 'demo': times sketching it here")
    plan.add_argument("--rank", type=int, help="LowRank(rank, dim) instead of CountSketch(dim)")
    plan.add_argument("--device", default="cpu", help="where to time (default: cpu)")
    plan.add_argument("--hours", type=float, help="deadline: says how many such workers meet it")
    index = verb("index", _index, "Collapse a store for one estimator, ready for queries.")
    index.add_argument("store", help="path or URL of a complete store")
    index.add_argument("out", help="path or URL of the index to make")
    index.add_argument("--estimator", default="ReTrac", help="TracIn, TRAK, ... (default: ReTrac)")
    index.add_argument("--pairing", choices=("cross", "matched"), default="cross", help="of timesteps (default: cross)")
    index.add_argument("--dtype", choices=("int8", "float16", "float32"), default="int8", help="default: int8")
    query = verb("query", _query, "Print the training samples that influenced each query most.")
    query.add_argument("index", help="path or URL of an index")
    query.add_argument("queries", nargs="*", help="a store of query sketches, or image files and folders of them")
    query.add_argument("--ids", nargs="+", help="ids of training samples, to query with them")
    query.add_argument("--model", help="for images: diffusers folder or hub name")
    query.add_argument("--checkpoint", action="append", default=[], help="for images: NAME=weights, for each")
    query.add_argument("--timesteps", type=int, default=20, help="for images: evenly spaced timesteps (default: 20)")
    query.add_argument("--device", default="cpu", help="for images: where to sketch (default: cpu)")
    query.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    query.add_argument("--side", choices=("proponents", "opponents", "both"), default="proponents")
    query.add_argument("--where", help="which samples count: an expression over the columns and id")
    query.add_argument("--group-by", help="a column: answer with groups in place of samples")
    query.add_argument("--reduce", choices=("sum", "mean", "max"), default="sum", help="a group's score (default: sum)")
    query.add_argument("--json", action="store_true", help="JSON instead of a table")
    query.add_argument("--out", help="file to write in place of printing: .json or .parquet")
    report = verb("report", _report, "Write a self-contained HTML page of queries and their results.")
    report.add_argument("index", nargs="+", help="paths or URLs of indexes")
    report.add_argument("--queries", required=True, help="store of query sketches")
    report.add_argument("--images", required=True, help=".npy of training images [n, h, w(, 3)], in the index's order")
    report.add_argument("--query-images", required=True, help=".npy of query images, in the order of the queries")
    report.add_argument("--out", default="report.html", help="file to write (default: report.html)")
    report.add_argument("-k", type=int, default=10, help="results per query (default: 10)")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from retrac_scale import demo

    demo.run(arguments.out)


def _info(arguments: argparse.Namespace) -> None:
    import zarr

    from retrac_scale.index import open_index
    from retrac_scale.store import open_store
    from retrac_scale.store.schema import ATTRIBUTE

    try:
        meta = zarr.open_group(arguments.url, mode="r").attrs.get(ATTRIBUTE)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no store or index at {arguments.url}.") from None
    if isinstance(meta, dict) and meta.get("what") == "index":
        index = open_index(arguments.url)
        c, n, k = index.shape
        print(f"index of {index.estimator}\n{c} checkpoints x {n} samples x {k} entries, {index.meta['dtype']}")
        print(f"made from {index.meta['store']}")
        return
    for measure in open_store(arguments.url).measurements:
        _describe(open_store(arguments.url, measure=measure))


def _describe(store: SketchStore) -> None:
    import numpy as np

    n, t, k = store.shape
    print(f"sketch store, {n} samples x {t} timesteps x {k} entries, {store.meta['dtype']}")
    for key in ("projection", "measure", "timesteps"):
        print(f"{key}: {store.fingerprint.get(key, 'not stated')}")
    print(f"columns: {', '.join(store.columns) or 'none'}; deleted samples: {store.deleted.sum()}")
    layout = f"blocks of {store.meta['block_samples']} samples"
    print(f"{layout}, {len(store.parts)} part(s), revision {store.revision}")
    widths = np.array([block.stop - block.start for block in store.blocks])
    pairs = written = 0
    norms, steps = [], []
    for name, weight in store.weights.items():
        done = store.committed(name)
        print(f"checkpoint {name}: weight {weight:.4g}, {done.sum()} of {len(done)} blocks committed")
        written += t * int(widths[done].sum())
        pairs += n * t
        some = np.flatnonzero(done)[:: max(1, len(done) // INFO_BLOCKS)].tolist() if store.has("timestep") else []
        norms += [store.norms(name, store.blocks[block]).ravel() for block in some]
        steps += [store.timesteps(name, store.blocks[block]).ravel() for block in some]
    item = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}[store.meta["dtype"]]
    size = f"{written * k * item / 1e6:.1f} MB of sketches, {4 / item:.0f} times smaller than in float32"
    print(f"{written} of {pairs} pairs, {size}")
    if steps:
        every, norm = np.concatenate(steps), np.concatenate(norms)
        edges = np.unique(np.linspace(every.min(), every.max() + 1, 6).astype(int))
        for low, high in itertools.pairwise(edges):
            if ((every >= low) & (every < high)).any():
                mean = norm[(every >= low) & (every < high)].mean()
                print(f"mean gradient norm, timesteps {low} .. {high - 1}: {mean:.4g}")
    if store.is_complete:
        print("to query it: rs.build_index(rs.open_store(url), rs.ReTrac(), 'index.zarr').query(queries)")
    else:
        print("not complete: repeat the sketch(...) that began it, it computes only what is missing")


def _verify(arguments: argparse.Namespace) -> int:
    from retrac_scale.store import repair_store, verify_store

    verdict = verify_store(arguments.url)
    for finding in verdict.findings:
        print(finding)
    damaged, unwritten = len(verdict.of("metadata", "damaged")), len(verdict.of("unwritten"))
    print(f"{verdict.blocks} blocks: {damaged} damaged objects, {unwritten} blocks not written")
    if arguments.repair and verdict.findings:
        beyond = repair_store(arguments.url)
        for finding in beyond:
            print(f"beyond repair, restore it from a backup: {finding}")
        if beyond:
            return 1
        verdict = verify_store(arguments.url)
        print(f"repaired; {len(verdict.of('unwritten'))} blocks to be written by the next sketch(...)")
    return 0 if verdict.is_whole else 3 if verdict.is_sound else 1


def _plan(arguments: argparse.Namespace) -> None:
    from retrac_scale import planner
    from retrac_scale.projections import CountSketch, LowRank

    n, t, c, k = arguments.samples, arguments.timesteps, arguments.checkpoints, arguments.dim
    size = planner.store_size(n, t, c, k, dtype=arguments.dtype)
    index = planner.index_bytes(n, c, k)
    print(f"store: {size.array_bytes} bytes in {size.files} chunk files, {size.blocks} blocks")
    print(f"       and about {size.metadata_bytes} bytes of metadata (integer ids, no columns, unsharded)")
    print(f"index: {index} bytes (int8, cross pairing)")
    speed = planner.measure_scanning(k)
    print(f"scan:  {n * c * k / speed:.3g} s per query ({speed / 1e9:.2f} GB/s measured here, index in memory)")
    if arguments.model is None:
        print("time:  give --model to have it measured")
        return
    projection = LowRank(arguments.rank, k) if arguments.rank else CountSketch(k)
    task, item = planner.example_task(arguments.model, arguments.device)
    rate = planner.measure_sketching(task, item, projection)
    seconds = rate.seconds(n * t * c)
    print(f"time:  {seconds:.0f} s on one worker like this ({1 / rate.pair_s:.1f} pairs/s, 1 noise draw, {projection})")
    if arguments.hours:
        print(f"       {planner.workers_needed(seconds, arguments.hours * 3600)} such workers for {arguments.hours} h")


def _index(arguments: argparse.Namespace) -> None:
    from retrac_scale.estimators import Estimator, estimator_from_spec
    from retrac_scale.index import build_index
    from retrac_scale.store import open_store

    if arguments.estimator not in Estimator.kinds:
        raise ValueError(f"there is no estimator {arguments.estimator!r}; choose one of {', '.join(Estimator.kinds)}.")
    spec = {"kind": arguments.estimator} | ({"pairing": "matched"} if arguments.pairing == "matched" else {})
    try:
        estimator = estimator_from_spec(spec)
    except TypeError:
        raise ValueError(f"{arguments.estimator} has no matched pairing.") from None
    print(build_index(open_store(arguments.store), estimator, arguments.out, dtype=arguments.dtype))


def _query(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from retrac_scale.index import open_index

    index = open_index(arguments.index)
    answer = index.query(
        _queries(index, arguments),
        arguments.k,
        side=arguments.side,
        where=arguments.where,
        group_by=arguments.group_by,
        reduce=arguments.reduce,
        exclude_self=arguments.ids is not None,
    )
    if arguments.out is None:
        print(answer.to_json() if arguments.json else answer.to_frame().to_string(index=False))
    elif arguments.out.endswith(".parquet"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(answer.to_arrow(), arguments.out)
    elif arguments.out.endswith(".json"):
        Path(arguments.out).write_text(answer.to_json(), encoding="utf-8")
    else:
        raise ValueError(f"--out {arguments.out}: the name must end in .json or .parquet.")


def _queries(index: Index, arguments: argparse.Namespace) -> SketchStore | Samples:
    """What is asked: stored ids, a store of sketches, or images, measured as the index's store was."""
    import diffusers

    from retrac_scale.datasets import ImageFiles
    from retrac_scale.datasets.base import SUFFIXES
    from retrac_scale.samples import Samples, take
    from retrac_scale.store import open_store
    from retrac_scale.task import DiffusionTask
    from retrac_scale.timesteps import EvenlySpaced

    if (arguments.ids is None) == (not arguments.queries):
        raise ValueError("give either queries (a store, or images) or --ids of training samples.")
    if arguments.ids is not None:
        store = index.check_store()
        if store is None:
            raise ValueError("the store that the index was built from is needed for --ids; it was in memory.")
        return take(store, [int(name) if store.ids.dtype.kind in "iu" else name for name in arguments.ids])
    is_image = arguments.queries[0].lower().endswith(SUFFIXES)
    if len(arguments.queries) == 1 and arguments.model is None and not is_image:
        return open_store(arguments.queries[0])
    if arguments.model is None or not arguments.checkpoint:
        raise ValueError("to query with images give --model and a --checkpoint NAME=weights for each checkpoint.")
    store = index.check_store()
    if store is None or "scheduler" not in store.fingerprint:
        raise ValueError("images can only be sketched like a store that sketch(...) made and that is still there.")
    config = dict(store.fingerprint["scheduler"])
    scheduler = getattr(diffusers, config.pop("class"))(**config)
    model = diffusers.AutoModel.from_pretrained(arguments.model)
    task = DiffusionTask(
        model,
        scheduler,
        measure=store.fingerprint["measure"],
        device=arguments.device,
        autocast=store.fingerprint["autocast"],
    )
    checkpoints = dict(item.split("=", 1) for item in arguments.checkpoint)
    channels = int(model.config.in_channels)
    return Samples(ImageFiles(arguments.queries, channels), task, checkpoints, EvenlySpaced(arguments.timesteps))


def _report(arguments: argparse.Namespace) -> None:
    import numpy as np

    from retrac_scale.index import open_index
    from retrac_scale.report import Pictures, write_report
    from retrac_scale.store import open_store

    indexes = [open_index(url) for url in arguments.index]
    queries = open_store(arguments.queries)
    images, query_images = (np.load(file, allow_pickle=False) for file in (arguments.images, arguments.query_images))
    answers = {}
    for index, url in zip(indexes, arguments.index, strict=True):
        title = str(index.meta["estimator"]["kind"])
        answers[title if title not in answers else f"{title} ({url})"] = index.query(queries, arguments.k)
    print(write_report(arguments.out, answers, Pictures(images, indexes[0].ids, query_images)))


if __name__ == "__main__":
    sys.exit(main())
