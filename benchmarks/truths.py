"""Ground truths: what is asked of a setting's model, and what retrained models say.

    python -m benchmarks.truths --setting digits8 --kind lds --subsets 64
    python -m benchmarks.truths --setting emoji16 --kind groups --folder FOLDER    # of the emoji tarballs
    python -m benchmarks.truths --setting digits8 --kind seeds
    python -m benchmarks.truths --setting digits8 --check

trains what is missing, one model after the other on one thread, and writes retrac_scale/evaluate/truths/NAME.npz.
Stopped, it goes on where it was; two processes with different kinds may share a work folder. `--check` trains the first
subset of the LDS anew and compares its losses with those in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrac_scale import evaluate
from retrac_scale.evaluate.judging.base import write_truth
from retrac_scale.evaluate.originals import ALTERED, alter
from retrac_scale.evaluate.settings import SETTINGS, Images, Setting, joined
from retrac_scale.evaluate.settings import images as images_module
from retrac_scale.evaluate.settings import losses as losses_module
from retrac_scale.evaluate.settings import trainer as trainer_module
from retrac_scale.evaluate.settings import training as training_module
from retrac_scale.evaluate.settings.data import COPIES
from retrac_scale.evaluate.settings.generating import generate
from retrac_scale.evaluate.settings.losses import Losses

HERE = Path(__file__).parent
QUERIES = 64
"""Of each kind."""
KINDS_OF_LDS = ("held out", "training", "generated")
AGAIN, MORE_SEEDS, GROUP_SEEDS = 8, (1, 2), (0, 1)
"""Subsets that are trained again, the seeds then, and those of models without a group."""
LONGEST_GAP = 600
"""Seconds between two results beyond which nobody was training."""
TOLERANCE = 1e-4
"""Of a retrained subset's losses."""


def common_queries(setting: Setting) -> dict[str, Images]:
    """64 of each kind: held out, trained on, generated."""
    asked = setting.pictures.held_out
    last = list(setting.checkpoints.values())[-1]
    return {
        "held out": asked,
        "training": setting.train.some(slice(QUERIES)),
        "generated": generate(setting.training, setting.build(), last, asked, setting.work / "generated.pt"),
    }


def altered_queries(setting: Setting) -> dict[str, Images]:
    """The 64 training images in each way altered, in 256 levels."""
    images = setting.images[:QUERIES]
    pixels = {how: ((alter(images, how) + 1) * 127.5).round().clamp(0, 255) for how in ALTERED}
    return {how: Images(values / 127.5 - 1) for how, values in pixels.items()}


def planted_queries(setting: Setting) -> dict[str, Images]:
    """Each planted picture, by how often it was planted, as it is and shifted by a pixel."""
    planted = setting.columns["planted"]
    found: dict[str, Images] = {}
    for copies in COPIES:
        names, firsts, counts = np.unique(planted, return_index=True, return_counts=True)
        images = setting.train.some(firsts[(counts == copies) & (names != "")])
        shifted = replace(images, images=alter(images.images, "shifted"))
        found |= {f"planted {copies} x": images, f"planted {copies} x, shifted": shifted}
    return found


def generated_queries(setting: Setting) -> dict[str, Images]:
    """64 images that the model generates."""
    return {"generated": common_queries(setting)["generated"]}


def common_and_altered(setting: Setting) -> dict[str, Images]:
    """Both."""
    return common_queries(setting) | altered_queries(setting)


QUERIES_OF: dict[str, Callable[[Setting], dict[str, Images]]] = {
    "digits8": common_and_altered,
    "emoji16": common_and_altered,
    "planted16": planted_queries,
    "exemplars16": generated_queries,
    "adapters16": generated_queries,
    "tones16": lambda setting: {"held out": setting.pictures.held_out},
}
"""What each setting is asked about, by kind; others `common_queries`."""


def write_queries(setting: Setting) -> None:
    """Into the setting's file of queries."""
    packed: dict[str, Any] = {"data": np.array(setting.pictures.digest)}
    for kind, images in QUERIES_OF.get(setting.name, common_queries)(setting).items():
        packed[kind] = images.images.numpy()
        packed |= {f"{kind}/{name}": values.numpy() for name, values in images.given.items()}
    np.savez_compressed(setting.queries_file, **packed)


def lds(setting: Setting, subsets: int) -> evaluate.Subsets:
    """Losses of every query under models of random halves, and of some of these halves with other seeds."""
    kinds = {kind: len(setting.queries[kind]) for kind in KINDS_OF_LDS}
    members = evaluate.random_subsets(len(setting.ids), subsets, seed=setting.seed)
    name = f"{setting.name}-lds"
    file = evaluate.truth(name) if name in evaluate.truths() else None
    known = file if isinstance(file, evaluate.Subsets) and same_protocol(setting, file) else None
    there = known.losses[:subsets] if known else np.zeros((0, sum(kinds.values())))
    losses = retrained(setting, KINDS_OF_LDS, members, "subsets", setting.seed, there)
    again = known.again if known else np.zeros((0, 0, losses.shape[1]))
    spent = hours(setting.work / "subsets") + (known.about.get("hours", 0) if known else 0)
    about = protocol(setting, kinds, seeds=[setting.seed, *MORE_SEEDS[: len(again)]], hours=round(spent, 2))
    return evaluate.Subsets(name, kinds, len(setting.ids), about, members, losses, again)


def same_protocol(setting: Setting, known: evaluate.Truth) -> bool:
    """Whether a truth's models were trained on the same data in the same way, and asked about the same queries."""
    now = protocol(setting, known.kinds)
    return all(known.about[key] == now[key] for key in ("training", "data", "queries"))


def seeds(setting: Setting, _: int) -> evaluate.Subsets:
    """The LDS with the first subsets trained again under more seeds."""
    members = evaluate.random_subsets(len(setting.ids), AGAIN, seed=setting.seed)
    again = [retrained(setting, KINDS_OF_LDS, members, "again", seed) for seed in MORE_SEEDS]
    known = evaluate.truth(f"{setting.name}-lds")  # read late: it may have grown meanwhile
    assert isinstance(known, evaluate.Subsets)
    assert (known.members[:AGAIN] == members).all()
    about = dict(known.about) | {"seeds": [setting.seed, *MORE_SEEDS], "hours of seeds": hours(setting.work / "again")}
    return replace(known, again=np.stack(again), about=about)


GROUPED = {"digits8": ("digit",), "shapes16": ("shape", "colour")}
"""Columns by which a setting's groups are left out; others designer and category."""


def groups(setting: Setting, _: int) -> evaluate.Groups:
    """Losses of models without one digit, designer, category."""
    kinds = {kind: len(setting.queries[kind]) for kind in KINDS_OF_LDS}
    columns = GROUPED.get(setting.name, ("designer", "category"))
    labels = {column: np.asarray(setting.columns[column]).astype(str) for column in columns}
    names = {column: np.unique(values) for column, values in labels.items()}
    left = np.concatenate([labels[column][None] != names[column][:, None] for column in labels])
    members = np.concatenate([np.ones((1, left.shape[1]), bool), left])
    found = np.stack([retrained(setting, KINDS_OF_LDS, members, "groups", seed) for seed in GROUP_SEEDS])
    ends = np.cumsum([len(values) for values in names.values()])[:-1]
    without = dict(zip(labels, np.split(found[:, 1:], ends, axis=1), strict=True))
    about = protocol(setting, kinds, seeds=list(GROUP_SEEDS), hours=hours(setting.work / "groups"))
    name = f"{setting.name}-groups"
    return evaluate.Groups(name, kinds, len(setting.ids), about, labels, names, without, found[:, 0])


def altered(setting: Setting, _: int) -> evaluate.Wanted:
    """Of an altered training image, the original."""
    return wanted(setting, "altered", {how: np.eye(QUERIES, len(setting.ids)) for how in ALTERED}, "first", "MRR")


def names(setting: Setting, _: int) -> evaluate.Wanted:
    """Of a held-out emoji, the picture of the same name by the other designer."""
    same = setting.pictures.held_out_columns["name"][:, None] == setting.columns["name"]
    return wanted(setting, "names", {"held out": same}, "first", "in top 10", "MRR")


def siblings(setting: Setting, _: int) -> evaluate.Wanted:
    """Of a held-out skin tone of an emoji, its other tones."""
    same = setting.pictures.held_out_columns["name"][:, None] == setting.columns["name"]
    return wanted(setting, "siblings", {"held out": same}, "first", "recall at count", "MRR")


def copies(setting: Setting, _: int) -> evaluate.Wanted:
    """Of a planted picture, all its copies."""
    planted = setting.columns["planted"]
    parts = {}
    for kind, images in setting.queries.items():
        if "shifted" not in kind:
            same = (images.images[:, None] == setting.images[None]).flatten(2).all(2).numpy()
            parts[kind] = parts[f"{kind}, shifted"] = same & (planted != "")
    return wanted(setting, "copies", parts, "first", "recall at count", "MRR")


def parents(setting: Setting, _: int) -> evaluate.Wanted:
    """Of a combination not seen in training, pictures of the same shape (part 1) and of the same colour (part 2)."""
    known, asked = setting.columns, setting.pictures.held_out_columns
    shape, colour = (asked[name][:, None] == known[name] for name in ("shape", "colour"))
    return wanted(setting, "parents", {"held out": shape + 2 * colour}, "precision@10", "in top 10")


def exemplars(setting: Setting, _: int) -> evaluate.Wanted:
    """Of an image generated after a fine-tune, the pictures of the fine-tune."""
    parts = np.tile(setting.columns["exemplar"], (QUERIES, 1))
    return wanted(setting, "exemplars", {"generated": parts}, "first", "precision@10", "recall at count")


MAKERS: dict[str, Callable[[Setting, int], evaluate.Truth]] = {
    "lds": lds,
    "seeds": seeds,
    "groups": groups,
    "altered": altered,
    "names": names,
    "siblings": siblings,
    "copies": copies,
    "parents": parents,
    "exemplars": exemplars,
}


def wanted(setting: Setting, what: str, parts: dict[str, Any], *metrics: str) -> evaluate.Wanted:
    """A truth that is known without retraining; parts `[q, n]` by kind of query."""
    kinds = {kind: len(setting.queries[kind]) for kind in parts}
    every = np.concatenate(list(parts.values())).astype(np.int8)
    name = f"{setting.name}-{what}"
    return evaluate.Wanted(name, kinds, len(setting.ids), protocol(setting, kinds), every, metrics)


def retrained(setting: Setting, kinds: Sequence[str], members: Any, folder: str, seed: int, known: Any = None) -> Any:
    """Losses `[m, q]` of the queries of these kinds under models trained on each row of `members`.

    `known` holds those of the first rows, which are not trained again.
    """
    done = 0 if known is None else len(known)
    if done == len(members):
        return known
    measure = Losses(joined([setting.queries[kind] for kind in kinds]), setting.build(), setting.scheduler)
    trainer = replace(setting.trainer, progress=False)
    chosen = [setting.ids[row] for row in members[done:]]
    found = evaluate.retrain(chosen, trainer, measure, setting.work / folder, seed=seed, key=measure.key)
    return np.concatenate([known, found]) if done else found


def protocol(setting: Setting, kinds: Iterable[str], **more: Any) -> dict[str, Any]:
    """What a truth depends on: digests of data, queries, code and, where it made some of them, the model; versions."""
    code = hashlib.blake2b(digest_size=12)
    for module in (images_module, training_module, trainer_module, losses_module):
        code.update(Path(str(module.__file__)).read_bytes())
    return {
        "training": repr(setting.training),
        "data": setting.pictures.digest,
        "queries": Losses(joined([setting.queries[kind] for kind in kinds]), None, None).key,
        "code": code.hexdigest(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        **({"model": digest_of(list(setting.checkpoints.values())[-1])} if "generated" in kinds else {}),
        **more,
    }


def digest_of(weights: Mapping[str, Any]) -> str:
    """Of a model's weights."""
    found = hashlib.blake2b(digest_size=12)
    for name in sorted(weights):
        found.update(weights[name].numpy().tobytes())
    return found.hexdigest()


def hours(folder: Path) -> float:
    """What the results in a folder took, by the times of its files."""
    gaps = np.diff(sorted(file.stat().st_mtime for file in folder.glob("*.npy")))
    return round(float(gaps[gaps < LONGEST_GAP].sum()) / 3600, 2)


def check(setting: Setting) -> float:
    """The largest difference of losses, of the first subset trained anew, from those in the file."""
    known = evaluate.truth(f"{setting.name}-lds")
    assert isinstance(known, evaluate.Subsets)
    with tempfile.TemporaryDirectory() as folder:
        anew = Setting(setting.name, setting.pictures, setting.training, Path(folder), setting.seed, setting.base)
        found = retrained(anew, tuple(known.kinds), known.members[:1], "subsets", setting.seed)
    return float(np.abs(found[0] - known.losses[0]).max())


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--kind", choices=MAKERS, nargs="+", default=["lds"], help="of truths (default: lds)")
    parser.add_argument("--check", action="store_true", help="train one subset anew and compare")
    parser.add_argument("--folder", type=Path, help="of the data, where they are not installed")
    parser.add_argument("--subsets", type=int, default=32, help="how many models are retrained (default: 32)")
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / ".cache" / "truths",
        help="folder for models (default: benchmarks/.cache/truths)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = evaluate.setting(arguments.setting, folder=arguments.folder, work=arguments.work)
    if arguments.check:
        difference = check(setting)
        print(f"{setting.name}: losses of the first subset, trained anew, differ by {difference:.1e} at most")
        raise SystemExit(difference > TOLERANCE)
    if not setting.queries_file.exists():
        write_queries(setting)
    for kind in arguments.kind:
        made = MAKERS[kind](setting, arguments.subsets)
        file = write_truth(made)
        print(f"{file}: {made.sentence}; {file.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
