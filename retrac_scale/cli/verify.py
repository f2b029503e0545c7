"""The verb verify."""

from __future__ import annotations

import argparse
from typing import Any

from retrac_scale.cli.project import find
from retrac_scale.cli.verb import Answer, Verb


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", help="path or fsspec URL of a store or an index")
    parser.add_argument("--repair", action="store_true", help="drop what is damaged; no process may be writing")


def _run(arguments: argparse.Namespace) -> Answer:
    from retrac_scale.store import repair_store, verify_store

    url = arguments.url or find(arguments.config).store
    if _is_index(url):
        return _index(url)
    verdict = verify_store(url)
    damaged, unwritten = len(verdict.of("metadata", "damaged")), len(verdict.of("unwritten"))
    lines = [str(finding) for finding in verdict.findings]
    lines.append(f"{verdict.blocks} blocks: {damaged} damaged objects, {unwritten} blocks not written")
    data = {"findings": lines[:-1], "blocks": verdict.blocks, "damaged": damaged, "unwritten": unwritten}
    if arguments.repair and verdict.findings:
        beyond = [str(finding) for finding in repair_store(url)]
        lines += [f"beyond repair, restore it from a backup: {finding}" for finding in beyond]
        if beyond:
            return Answer("\n".join(lines), data | {"beyond_repair": beyond}, 1)
        verdict = verify_store(url)
        again = "the `write_store(...)` that made it" if _is_given(url) else "the next `retrac-scale sketch`"
        lines.append(f"repaired; {len(verdict.of('unwritten'))} blocks to be written by {again}")
        data |= {"repaired": True, "unwritten": len(verdict.of("unwritten"))}
    return Answer("\n".join(lines), data, 0 if verdict.is_whole else 3 if verdict.is_sound else 1)


def _is_given(url: Any) -> bool:
    """Whether a store was made of arrays."""
    from retrac_scale.store import open_store

    return bool(open_store(url).fingerprint["projection"]["kind"] == "given")


def _is_index(url: Any) -> bool:
    from retrac_scale.store.opening import open_root

    try:
        open_root(url, "index")
    except (ValueError, FileNotFoundError):  # what is wrong with it is told as of a store
        return False
    return True


def _index(url: Any) -> Answer:
    from retrac_scale.index.seals import verify_index

    found = verify_index(url)
    lines = [*found, f"an index: {len(found)} objects are not what was written"]
    if found:
        lines.append("run `retrac-scale index` again: it replaces an index that is damaged")
    return Answer("\n".join(lines), {"findings": found, "damaged": len(found)}, 1 if found else 0)


VERB = Verb(
    "verify",
    "Check every byte of a store or an index against what was committed.",
    """  retrac-scale verify demo/sketches.zarr            exit status 0: whole, 1: damaged, 3: sound but not complete
  retrac-scale verify demo/sketches.zarr --repair   drops what is damaged, for the next sketch to compute""",
    _options,
    _run,
)
