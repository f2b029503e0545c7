"""Whatever a gradient depends on is changed: no store goes on with it, takes queries of it, or reranks by it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.report import Pictures
from retrac_scale.serve.library import Library
from retrac_scale.serve.uploads import Upload
from retrac_scale.store import create_store, write_block
from retrac_scale.store.compatibility import FIELDS, warn_of_versions
from retrac_scale.task.identity import code_of, known_by
from retrac_scale.task.state import state_of
from tests.conftest import CONDITIONAL, random_images

N = 4
BETAS: dict[str, Any] = {"num_train_timesteps": 100, "beta_start": 0.00085, "beta_end": 0.012}
BETAS |= {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


def euler(**changed: Any) -> Any:
    return EulerDiscreteScheduler(**BETAS | changed)


def denoiser_of(gain: float) -> Any:
    """A class of the same name and the same weights, whatever its forward does."""

    class Denoiser(nn.Module):
        offset: Tensor

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.config = {"heads": 2}
            self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            self.register_buffer("offset", torch.zeros(8))
            self.power, self.calls = 1, 0

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            self.calls += 1
            hidden = torch.tanh(self.norm(self.first(sample + self.offset))) ** self.power
            return self.last(hidden * (gain + timestep.to(sample)[:, None, None, None] / 100))  # type: ignore[no-any-return]

    return Denoiser()


def adapted(gain: float = 1.0, rank: int = 2) -> Any:
    """Two LoRA adapters, the first of them active."""
    torch.manual_seed(1)
    config = LoraConfig(r=rank, target_modules=["first", "last"], init_lora_weights=False)
    model: Any = get_peft_model(denoiser_of(gain), config)
    model.add_adapter("other", config)
    return only_adapters(model)


def only_adapters(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


class Images:
    """Some images that a VAE was given to, as an encoded dataset says."""

    def __init__(self, vae: str = "one") -> None:
        self.frozen = {"vae": vae}
        self.images = random_images(N)

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Tensor:
        return self.images[row]


def scaled(model: nn.Module, noisy: Tensor, times: Tensor, given: Any, *, scale: float = 1.0) -> Tensor:
    return model(noisy, times) * scale  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Flat:
    """A weighting of one's own."""

    height: float = 2.0

    def __call__(self, noising: Any, timesteps: Tensor) -> Tensor:
        return torch.full((len(timesteps),), self.height)


@dataclass(frozen=True)
class Run:
    """All that is given to one call of `sketch`."""

    model: Any = field(default_factory=adapted)
    scheduler: Any = field(default_factory=euler)
    options: Mapping[str, Any] = field(default_factory=lambda: {"call": partial(scaled, scale=1.0)})
    weights: Callable[[Tensor], Tensor] = lambda value: value
    timesteps: Any = field(default_factory=lambda: rs.Explicit([20, 70], draws=2))
    projection: Any = field(default_factory=lambda: rs.CountSketch(32))
    parameters: Any = None
    precondition: float | None = None
    data: Any = field(default_factory=Images)

    def sketch(self, out: Path | None, **more: Any) -> rs.SketchStore:
        samples = self.samples()
        names = list(samples.task.model.named_parameters())
        divisors = {
            name: torch.full_like(value, self.precondition or 1) for name, value in names if value.requires_grad
        }
        return rs.sketch(
            samples.task,
            samples.dataset,
            out,
            checkpoints=samples.checkpoints,
            timesteps=self.timesteps,
            parameters=self.parameters,
            precondition=None if self.precondition is None else {"a": divisors},
            dtype="float32",
            batch_size=4,
            progress=False,
            **{"projection": self.projection, **more},
        )

    def samples(self) -> rs.Samples:
        task = rs.DiffusionTask(self.model, self.scheduler, **self.options)
        checkpoint = {name: self.weights(value.clone()) for name, value in task.model.state_dict().items()}
        return rs.Samples(self.data, task, {"a": checkpoint}, self.timesteps)


def other_adapter() -> Any:
    model = adapted()
    model.set_adapter("other")
    return only_adapters(model)


def both_adapters() -> Any:
    model = adapted()
    model.base_model.set_adapter(["default", "other"])
    return only_adapters(model)


def no_adapter() -> Any:
    model = adapted()
    model.base_model.disable_adapter_layers()
    return only_adapters(model)


def merged() -> Any:
    model = adapted()
    model.merge_adapter(["default"])
    return only_adapters(model)


def stronger() -> Any:
    model = adapted()
    model.base_model.model.first.scaling["default"] *= 2
    return model


def hooked() -> Any:
    model = adapted()
    model.base_model.model.first.register_forward_hook(lambda module, given, output: output * 2)
    return model


def heads() -> Any:
    model = adapted()
    model.base_model.model.config = {"heads": 4}
    return model


def own_table() -> Any:
    scheduler = euler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    return scheduler


def call(scale: float) -> dict[str, Any]:
    return {"call": partial(scaled, scale=scale)}


def changed_model(change: Callable[[Any], Any]) -> Any:
    """The default one, of which something is changed that PEFT leaves alone."""
    model = adapted()
    change(model.base_model.model)
    return model


def patched(model: Any) -> None:
    plain = model.forward

    def forward(sample: Tensor, timestep: Tensor) -> Tensor:
        return 2 * plain(sample, timestep)  # type: ignore[no-any-return]

    model.forward = forward


class Doubled:
    """A processor, as attention layers hold them."""

    def __call__(self, values: Tensor) -> Tensor:
        return 2 * values


def frozen_layer() -> Any:
    model = adapted()
    model.base_model.model.first.requires_grad_(False)
    return model


CHANGES: dict[str, tuple[str, Callable[[], Run]]] = {
    "weights": ("checkpoints.a", lambda: Run(weights=lambda value: value + 0.01)),
    "an adapter's scale": ("checkpoints.a", lambda: Run(model=stronger())),
    "merged adapters": ("forward.adapters.merged default", lambda: Run(model=merged())),
    "the active adapter": ("forward.adapters.default", lambda: Run(model=other_adapter())),
    "two active adapters": ("forward.adapters.other", lambda: Run(model=both_adapters())),
    "no active adapter": ("forward.adapters.default", lambda: Run(model=no_adapter())),
    "the model's own code": (r"forward.code.denoiser_of.<locals>.Denoiser", lambda: Run(model=adapted(gain=1.5))),
    "a hook": ("forward.code.hook hooked", lambda: Run(model=hooked())),
    "the model's configuration": ("frozen.config.heads", lambda: Run(model=heads())),
    "the VAE": ("frozen.vae", lambda: Run(data=Images("two"))),
    "call=": ("forward.call", lambda: Run(options={})),
    "what call= holds": ("forward.call", lambda: Run(options=call(1.5))),
    "autocast": ("forward.autocast", lambda: Run(options=call(1.0) | {"autocast": "bfloat16"})),
    "measure": ("measure", lambda: Run(options=call(1.0) | {"measure": "l1"})),
    "a loss's constant": ("measure", lambda: Run(options=call(1.0) | {"measure": rs.Huber(0.5)})),
    "weighting": ("measure", lambda: Run(options=call(1.0) | {"weighting": rs.MinSNR()})),
    "a weighting of one's own": ("forward.code.Flat", lambda: Run(options=call(1.0) | {"weighting": Flat()})),
    "noise levels": ("scheduler.beta_end", lambda: Run(scheduler=euler(beta_end=0.02))),
    "the schedule": ("scheduler.beta_schedule", lambda: Run(scheduler=euler(beta_schedule="linear"))),
    "zero terminal SNR": (
        "scheduler.rescale_betas_zero_snr",
        lambda: Run(scheduler=euler(rescale_betas_zero_snr=True)),
    ),
    "the target": ("scheduler.prediction_type", lambda: Run(scheduler=euler(prediction_type="epsilon"))),
    "T": ("scheduler.num_train_timesteps", lambda: Run(scheduler=euler(num_train_timesteps=90))),
    "what it is told of time": ("scheduler.timestep_type", lambda: Run(scheduler=euler(timestep_type="continuous"))),
    "noise levels set by hand": ("forward.noising", lambda: Run(scheduler=own_table())),
    "the parameter filter": ("parameters.first", lambda: Run(parameters=["last*"])),
    "projection": ("projection.kind", lambda: Run(projection=rs.LowRank(4, 32))),
    "its seed": ("projection.seed", lambda: Run(projection=rs.CountSketch(32, seed=1))),
    "timesteps": ("timesteps", lambda: Run(timesteps=rs.Explicit([20, 71], draws=2))),
    "noise": ("timesteps", lambda: Run(timesteps=rs.Explicit([20, 70], draws=2, seed=3))),
    "draws": ("timesteps", lambda: Run(timesteps=rs.Explicit([20, 70], draws=1))),
    "a region": ("region", lambda: Run(data=rs.Regions(Images(), (0, 0, 4, 8)))),
    "a concept": (
        "concept",
        lambda: Run(data=rs.Concepts(Images(), rs.Concept({"tone": torch.ones(1)}, {"tone": torch.zeros(1)}))),
    ),
    "a preconditioner": ("precondition", lambda: Run(precondition=2.0)),
    "a buffer": (
        "checkpoints.a",
        lambda: Run(model=changed_model(lambda model: model.offset.fill_(0.5))),
    ),
    "a number in an attribute": (
        r"forward.state.denoiser_of.<locals>.Denoiser.power",
        lambda: Run(model=changed_model(lambda model: setattr(model, "power", 2))),
    ),
    "a layer's constant": (
        "forward.state.torch.eps",
        lambda: Run(model=changed_model(lambda model: setattr(model.norm, "eps", 0.1))),
    ),
    "a patched forward": ("forward.code.patched", lambda: Run(model=changed_model(patched))),
    "a processor": (
        "forward.code.Doubled",
        lambda: Run(model=changed_model(lambda model: setattr(model, "processor", Doubled()))),
    ),
    "the weights' type": ("checkpoints.a", lambda: Run(model=adapted().double())),
    "a frozen layer": ("parameters.first", lambda: Run(model=frozen_layer())),
    "the adapters' rank": ("parameters.first", lambda: Run(model=adapted(rank=3))),
    "the scheduler's class": ("scheduler.class", lambda: Run(scheduler=DDIMScheduler(**BETAS))),
    "flow matching": ("scheduler.class", lambda: Run(scheduler=FlowMatchEulerDiscreteScheduler(100))),
}
TABLE = (Path(__file__).parents[2] / "docs" / "fingerprint.md").read_text()
OUTCOMES = {
    row[0]: dict(zip(("store", "query", "rerank", "report", "grow"), row[2:], strict=True))
    for line in TABLE.splitlines()
    if len(row := [cell.strip() for cell in line.strip("|").split("|")]) == 7 and row[0] in CHANGES
}
"""What the documentation says becomes of each change: "refused", or why it is not."""
WITHOUT_GRADIENT = ("merged adapters", "no active adapter")
PICTURES = Pictures(np.zeros((N, 8, 8), np.uint8), np.arange(N), np.zeros((N, 8, 8), np.uint8))


def test_the_documentation_has_a_row_for_each_of_forty_changes() -> None:
    assert OUTCOMES.keys() == CHANGES.keys()
    assert len(CHANGES) >= 40


def test_every_field_is_changed() -> None:
    changed = {name.partition(".")[0] for name, _ in CHANGES.values()}
    assert changed == FIELDS.keys() - {"autocast"}  # which stands in forward too
    assert Run(precondition=2.0).sketch(None).fingerprint.keys() <= FIELDS.keys()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> rs.SketchStore:
    return Run().sketch(tmp_path_factory.mktemp("fingerprint") / "store.zarr")


@pytest.fixture(scope="module")
def index(store: rs.SketchStore) -> rs.Index:
    return rs.build_index(store, rs.TracIn(), None)


def test_the_same_run_in_other_objects_goes_on_asks_and_reranks(store: rs.SketchStore, index: rs.Index) -> None:
    assert Run().sketch(Path(str(store.url))).revision == store.revision
    found = index.query(Run().samples(), k=2, rerank=N, train=Run().samples())
    assert found.ids.shape == (N, 2)


def refused(outcome: str, message: str) -> Any:
    """What the documentation says: an error with this message, or none."""
    return pytest.raises(ValueError, match=message) if outcome == "refused" else nullcontext()


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_change_is_refused_where_the_documentation_says_so(
    what: str, store: rs.SketchStore, index: rs.Index, tmp_path: Path
) -> None:
    (name, changed), says = CHANGES[what], OUTCOMES[what]
    with refused(says["store"], f"already holds a different store.*{name}"):
        changed().sketch(Path(str(store.url)))
    own: dict[str, Any] = {} if name.startswith("projection") else {"projection": None}
    with refused(says["query"], f"do not fit the training sketches.*{name}|under common noise of seed"):
        changed().sketch(None, like=store, **own)
    with refused(says["rerank"], rf"({name}|forward.state)\S* (is|are)|other weights"):
        index.query(Run().samples(), k=2, rerank=N, train=changed().samples())
    if says["grow"] == "refused":  # what is not makes a part of its own, see test_store_growth
        with pytest.raises(ValueError, match=f"cannot grow by this.*{name}|of other items under the same ids"):
            changed().sketch(Path(str(store.url)), grow=True)
    if what in WITHOUT_GRADIENT:
        with pytest.raises(rs.FailedTasksError, match="losses do not depend on any captured layer"):
            changed().sketch(None)
        return
    asked = changed().sketch(None)  # a store of queries that was made by itself
    for answer in (
        lambda: index.query(asked, k=2).report(
            tmp_path / "r.html", np.zeros((N, 8, 8)), np.zeros((N, 8, 8)), ids=range(N)
        ),
        lambda: Library({"TracIn": index}, PICTURES, queries=asked),
    ):
        with refused(says["report"], f"do not fit the training sketches.*{name}|under common noise of seed"):
            answer()


def test_a_store_of_an_earlier_release_goes_on_and_what_it_cannot_tell_is_not_compared(tmp_path: Path) -> None:
    now, place = Run().sketch(None), tmp_path / "store.zarr"
    told = {key: value for key, value in now.fingerprint.items() if key != "forward"}
    described: dict[str, Any] = {"ids": now.ids, "weights": now.weights, "dtype": "float32", "plan": now.plan}
    earlier = create_store(place, shape=now.shape, fingerprint=told, **described)
    for number in range(len(now.blocks)):
        planes: dict[str, Any] = {"losses": now.losses("a"), "timesteps": now.timesteps("a")}
        write_block(earlier, "a", number, now.sketches("a"), now.norms("a"), **planes)
    revision = rs.open_store(place).revision
    for run in (Run(), Run(options={})):  # whose call= it does not tell
        assert run.sketch(place).revision == revision
        assert run.sketch(place, grow=True).revision == revision
        index = rs.build_index(rs.open_store(place), rs.TracIn(), None)
        assert index.query(run.samples(), k=1, rerank=2, train=run.samples()).ids.shape == (N, 1)
    halved = Run(options=call(1.0) | {"autocast": "bfloat16"})
    with pytest.raises(ValueError, match="autocast is None there and 'bfloat16' here"):
        halved.sketch(place)
    with pytest.raises(ValueError, match=r"forward.autocast is None there and 'bfloat16' here"):
        halved.sketch(None, like=rs.open_store(place))


def made(gain: float) -> Any:
    def call(model: Any, noisy: Any, times: Any, given: Any, *, power: int = 1) -> Any:
        return model(noisy, times) * gain**power

    return call


class Scaled:
    def __init__(self, gain: Any) -> None:
        self.gain = gain

    def __call__(self, model: Any, noisy: Any, times: Any, given: Any) -> Any:
        return model(noisy, times) * self.gain

    def method(self, model: Any, noisy: Any, times: Any, given: Any) -> Any:
        return self(model, noisy, times, given)


def test_a_callable_is_known_by_its_source_and_what_it_holds() -> None:
    pair = [lambda model, noisy, times, given: noisy, lambda model, noisy, times, given: 2 * noisy]
    several = [
        *pair,
        made(1.0),
        made(2.0),
        partial(made(1.0), power=2),
        Scaled(1.0),
        Scaled({"a", "b"}),
        Scaled(torch.ones(2)),
        Scaled(torch.zeros(2)),
        Scaled(np.float32(2)),
        Scaled(np.float32(3)),
        Scaled(nn.Linear(1, 1)),
        Scaled(1.0).method,
        Scaled(2.0).method,
    ]
    known = [known_by(one) for one in several]
    assert len(set(known)) == len(several)
    assert known[2:4] == [known_by(made(1.0)), known_by(made(2.0))]
    assert known_by(Scaled(torch.ones(2))) == known[7]
    assert known_by(torch.nn.functional.mse_loss) == "mse_loss"  # installed


def test_what_a_callable_names_counts_and_comments_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(source: str, name: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        return known_by(importlib.import_module(name).call)

    source = (
        "def helper(x):\n    return x * FACTOR\n\n\nFACTOR = 2\n\n\ndef call(m, x, t, c):\n    return helper(m(x, t))\n"
    )
    first = known(source, "first_calling")
    assert known(source.replace("    return helper", "    # says nothing\n    return  helper"), "commented") == first
    assert known(source.replace("FACTOR = 2", "FACTOR = 3"), "other_factor") != first
    assert known(source.replace("x * FACTOR", "x + FACTOR"), "other_helper") != first


def test_a_hook_that_only_looks_on_changes_nothing() -> None:
    model, seen = denoiser_of(1.0), []

    def look(module: nn.Module, given: Any, output: Tensor) -> None:
        seen.append(output)

    plain = code_of(model)
    model.first.register_forward_hook(look)
    assert code_of(model) == plain != {}


def test_the_model_that_a_callable_holds_does_not_count_but_others_do() -> None:
    task_model, frozen = denoiser_of(1.0), nn.Linear(8, 8)

    def call(model: Any, noisy: Any, times: Any, given: Any) -> Any:
        return frozen(task_model(noisy, times))

    known = [known_by(call, without=[*task_model.modules()])]
    for module in (task_model.first, frozen):
        with torch.no_grad():
            module.weight += 1
        known.append(known_by(call, without=[*task_model.modules()]))
    assert known[0] == known[1] != known[2]


@pytest.mark.slow
def test_names_and_digests_are_the_same_in_another_process() -> None:
    """Whatever order its sets have."""
    source = (
        "from tests.sketching.test_fingerprint import *\n"
        "print(known_by(Scaled({'a', 'b', 'c'})), Run().samples().task.forward)"
    )
    found = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found == f"{known_by(Scaled({'a', 'b', 'c'}))} {Run().samples().task.forward}\n"


def test_a_service_refuses_uploads_that_are_measured_otherwise(index: rs.Index) -> None:
    for run, error in (
        (Run(), nullcontext()),
        (Run(options=call(1.5)), pytest.raises(ValueError, match=r"forward\.call")),
    ):
        model = run.model.base_model.model
        model.config = {**model.config, "in_channels": 1, "sample_size": 8}
        library = Library({"TracIn": index}, PICTURES, measured=replace(run.samples(), timesteps=None))
        with error:
            library.upload(Upload("u", np.arange(64, dtype=np.uint8).reshape(8, 8), ""), [])


def test_numbers_that_forward_sets_are_not_told() -> None:
    model = denoiser_of(1.0)
    plain = state_of(model)
    assert plain["denoiser_of.<locals>.Denoiser.power"] == "1 in 1"
    model.calls = 9
    assert state_of(model) == plain


def test_what_diffusers_keeps_in_attributes_is_told() -> None:
    """FreeU's factors and the scales of IP adapters, of which no state dict and no configuration knows."""
    model: Any = UNet2DConditionModel(**CONDITIONAL)
    plain = state_of(model)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert {name: value for name, value in state_of(model).items() if value != plain.get(name)} == {
        "freeu.b1": "1.2 in 2",
        "freeu.b2": "1.4 in 2",
        "freeu.s1": "0.9 in 2",
        "freeu.s2": "0.2 in 2",
    }
    model.disable_freeu()
    assert state_of(model) == plain
    attention = next(
        module for module in model.modules() if isinstance(module, Attention) and module.is_cross_attention
    )
    attention.set_processor(IPAdapterAttnProcessor2_0(8, 8, scale=0.5))
    half = state_of(model)
    attention.processor.scale = [1.0]
    assert (half["ip_adapter.scale"], state_of(model)["ip_adapter.scale"]) == ("[0.5] in 1", "[1.0] in 1")


def test_other_versions_of_libraries_are_named_in_a_warning(store: rs.SketchStore, monkeypatch: Any) -> None:
    assert set(store.meta["written_by"]) >= {"torch", "diffusers", "peft"}
    meta = {**store.meta, "written_by": {**store.meta["written_by"], "diffusers": "0.1.0"}}
    monkeypatch.setattr(type(store), "meta", meta)
    with pytest.warns(UserWarning, match="was written under diffusers 0.1.0, here is"):
        warn_of_versions(store)
