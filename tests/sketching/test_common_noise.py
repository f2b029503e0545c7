"""Common noise: gradients by plain autograd, one noise wherever two sides meet, and growing until answers repeat."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import retrac_scale as rs
from retrac_scale.estimators.self_influence import self_influence
from retrac_scale.store.part import plans_of
from retrac_scale.task.timesteps import further
from tests import oracle
from tests.conftest import MODELS, Labelled, random_images
from tests.small_denoiser import SCHEDULER, SmallDenoiser, images

BETAS = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_gradients(store: rs.SketchStore, expected: Any) -> None:
    """Of unprojected sketches and norms, `[n, t, P]` in float64."""
    (name,) = store.checkpoints
    lengths = np.linalg.norm(expected, axis=2)
    errors = np.linalg.norm(store.sketches(name) - expected, axis=2)
    assert (errors < 1e-4 * lengths).all()
    np.testing.assert_allclose(store.norms(name), lengths, rtol=1e-4)


WHOLE: dict[str, Any] = {"projection": rs.Identity(), "dtype": "float32", "batch_size": 4, "progress": False}


@pytest.mark.parametrize("kind", MODELS)
def test_sketches_of_pixel_models_and_of_a_class_conditional_one_equal_autograd(kind: str) -> None:
    model, dataset = MODELS[kind](0), Labelled(random_images(3), ids=["a", "b", "c"])
    plan = rs.EvenlySpaced(2, draws=2, seed=3)
    state = state_of(model)
    store = rs.sketch(rs.DiffusionTask(model, BETAS), dataset, None, checkpoints={"c": state}, timesteps=plan, **WHOLE)
    assert store.timesteps("c").tolist() == [[25, 75]] * 3

    def gradient(row: int, timestep: int) -> Any:
        labels = {"class_labels": torch.tensor(row)} if kind == "dit" else {}
        image = dataset.images[row]
        return oracle.pair_gradient(model, state, BETAS, image, None, timestep, seed=3, draws=2, conditioning=labels)

    assert_gradients(store, np.array([[gradient(row, t) for t in (25, 75)] for row in range(3)]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sketches_of_a_latent_model_equal_autograd_on_the_latents_of_its_vae(tmp_path: Path) -> None:
    from tests.task.test_pipelines import Items, pixels, vae

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    encoder = vae().eval()
    scheduler = DDIMScheduler(num_train_timesteps=100)
    DiTPipeline(model, encoder, scheduler, {0: "x"}).save_pretrained(tmp_path)
    task = rs.DiffusionTask.from_pretrained(tmp_path)
    shown = pixels(3, 16, 16)[:2]
    dataset = Items((image, label) for label, image in enumerate(shown))
    state = state_of(task.model)
    store = rs.sketch(task, dataset, None, checkpoints={"c": state}, timesteps=rs.EvenlySpaced(2), **WHOLE)
    with torch.no_grad():
        latents = (encoder.encode(shown).latent_dist.mode() - 0.1) * 0.5

    def gradient(row: int, timestep: int) -> Any:
        labels = {"class_labels": torch.tensor(row)}
        return oracle.pair_gradient(task.model, state, scheduler, latents[row], None, timestep, conditioning=labels)

    assert_gradients(store, np.array([[gradient(row, t) for t in (25, 75)] for row in range(2)]))


def test_sketches_of_a_flow_matching_transformer_equal_autograd() -> None:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()
    shift = 3.0
    task = rs.DiffusionTask(model, FlowMatchEulerDiscreteScheduler(100, shift=shift))
    rng = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(2, *shape, generator=rng) for shape in ((4, 8, 8), (3, 16), (16,)))
    given = [{"encoder_hidden_states": text[row], "pooled_projections": pooled[row]} for row in range(2)]
    dataset = [{"latents": latents[row], **given[row]} for row in range(2)]
    state = state_of(model)
    store = rs.sketch(task, dataset, None, checkpoints={"c": state}, timesteps=rs.Explicit([10, 80], seed=2), **WHOLE)
    reference = copy.deepcopy(model).double()

    def gradient(row: int, timestep: int) -> Any:
        noise = rs.draw_noise((4, 8, 8), None, [timestep], 2).double()
        u = (timestep + 1) / 100
        level = shift * u / (1 + (shift - 1) * u)
        clean = latents[row : row + 1].double()
        conditioning = {name: value[None].double() for name, value in given[row].items()}
        noisy, at = (1 - level) * clean + level * noise, torch.tensor([100 * level], dtype=torch.float64)
        predicted = reference(hidden_states=noisy, timestep=at, **conditioning).sample
        return oracle.gradient(reference, (predicted - (noise - clean)).square().mean()).numpy()

    assert_gradients(store, np.array([[gradient(row, t) for t in (10, 80)] for row in range(2)]))


MODEL = SmallDenoiser()
STATES = {"early": state_of(SmallDenoiser(1)), "late": state_of(SmallDenoiser(2))}
TASK = rs.DiffusionTask(MODEL, SCHEDULER)


def by_hand(image: torch.Tensor, checkpoint: str, timestep: int, seed: int) -> Any:
    """The gradient of the small denoiser for one image under common noise, float64 `[P]`."""
    reference = SmallDenoiser().double()
    reference.load_state_dict(STATES[checkpoint])
    noise = rs.draw_noise(image.shape, None, [timestep], seed).double()
    signal = SCHEDULER.alphas_cumprod[timestep].double()
    noisy = signal.sqrt() * image.double() + (1 - signal).sqrt() * noise
    return oracle.gradient(reference, (reference(noisy, torch.tensor([timestep]))[0] - noise).square().mean()).numpy()


def gradients(of: torch.Tensor, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Full gradients at (timestep, seed) pairs, `{c: [n, t, P]}`."""
    return {name: np.array([[by_hand(image, name, *pair) for pair in pairs] for image in of]) for name in STATES}


def sketched(of: Any, out: Any = None, **options: Any) -> rs.SketchStore:
    return rs.sketch(TASK, of, out, **{"checkpoints": STATES, **WHOLE, **options})


def test_what_is_sketched_without_a_plan_is_measured_at_four_timesteps_under_common_noise() -> None:
    store = rs.sketch(TASK, images(3), None, checkpoints=STATES, progress=False)
    assert plans_of(store.fingerprint) == [{"kind": "EvenlySpaced", "count": 4, "draws": 1, "noise": "common"}]
    assert store.timesteps("late").tolist() == [[12, 37, 62, 87]] * 3
    assert store.shape[1] * store.shape[2] == 2048


GROWN = [rs.EvenlySpaced(2, seed=5), rs.EvenlySpaced(2, seed=6)]
PAIRS = [(25, 5), (75, 5), (25, 6), (75, 6)]


@pytest.mark.parametrize("how", ["like", "in place", "samples", "asked for"])
def test_queries_see_the_noise_of_the_store_that_they_are_compared_with(how: str, tmp_path: Path) -> None:
    store = sketched(images(6), tmp_path / "s", timesteps=GROWN)
    asked = images(8)[6:]
    if how == "samples":
        queries = rs.Samples(asked, TASK, STATES).sketch(store)
    elif how == "asked for":  # a seed that is left open is the store's
        store = sketched(images(6), None, timesteps=rs.EvenlySpaced(2, seed=5))
        queries = sketched(asked, like=store, timesteps=rs.EvenlySpaced(2))
    else:
        queries = sketched(asked, like=store, out=tmp_path / "q" if how == "in place" else None)
    expected = gradients(asked, PAIRS[: store.shape[1]])
    for name, rows in expected.items():
        np.testing.assert_allclose(queries.sketches(name), rows, atol=1e-5 * np.abs(rows).max())
    train = gradients(images(6), PAIRS[: store.shape[1]])
    index = rs.build_index(store, rs.ReTrac(pairing="matched"), None, dtype="float32")
    scores = oracle.retrac_matched(train, expected, store.weights)
    np.testing.assert_allclose(np.asarray(index.scores(queries)), scores, atol=1e-4 * np.abs(scores).max())


def test_queries_that_were_sketched_before_the_store_grew_are_measured_as_it_is_then(tmp_path: Path) -> None:
    store = sketched(images(6), tmp_path / "s", timesteps=GROWN[0])
    sketched(images(8)[6:], tmp_path / "q", like=store)
    store = sketched(images(6), tmp_path / "s", timesteps=GROWN[1], grow=True)
    before = rs.open_store(tmp_path / "q")
    with pytest.raises(ValueError, match="needs the index's timesteps in the queries"):
        rs.build_index(store).query(before, 2)
    queries = sketched(images(8)[6:], tmp_path / "q", like=store)
    assert plans_of(queries.fingerprint) == plans_of(store.fingerprint)
    np.testing.assert_array_equal(queries.sketches("late")[:, :2], before.sketches("late"))
    assert rs.build_index(store).query(queries, 2).ids.shape == (2, 2)


def test_rerank_and_self_influence_are_those_of_common_noise() -> None:
    store = sketched(images(6), timesteps=rs.EvenlySpaced(2, seed=5))
    asked = images(8)[6:]
    train, queries = gradients(images(6), PAIRS[:2]), gradients(asked, PAIRS[:2])
    estimator = rs.ReTrac(pairing="matched")
    expected = oracle.retrac_matched(train, queries, store.weights)
    index = rs.build_index(store, estimator)
    answer = index.query(rs.Samples(asked, TASK, STATES), 6, rerank=6, train=rs.Samples(images(6), TASK, STATES))
    np.testing.assert_array_equal(answer.ids, np.argsort(-expected, axis=1))
    np.testing.assert_allclose(answer.scores, -np.sort(-expected, axis=1), atol=1e-4 * np.abs(expected).max())
    again = sketched(images(6), like=store)  # the same images as queries have the same gradients
    itself = np.diag(oracle.retrac_matched(train, train, store.weights))
    np.testing.assert_allclose(self_influence(store, estimator, queries=again), itself, rtol=1e-4)
    np.testing.assert_allclose(self_influence(store, estimator), itself, rtol=1e-4)


def test_rerank_takes_the_measure_of_the_index_from_a_task_of_several(tmp_path: Path) -> None:
    several = rs.DiffusionTask(SmallDenoiser(), SCHEDULER, measure=["mse", "mean_squared_output"])
    alone = rs.DiffusionTask(SmallDenoiser(), SCHEDULER, measure="mean_squared_output")
    given: dict[str, Any] = {"checkpoints": STATES, "timesteps": rs.EvenlySpaced(2), "progress": False}
    rs.sketch(several, images(6), tmp_path / "s", **given)
    index = rs.build_index(rs.open_store(tmp_path / "s", measure="mean_squared_output"), rs.ReTrac("matched"))

    def reranked(task: rs.DiffusionTask) -> rs.TopK:
        return index.query(
            rs.Samples(images(8)[6:], task, STATES), 6, rerank=6, train=rs.Samples(images(6), task, STATES)
        )

    expected = reranked(alone)
    np.testing.assert_array_equal(reranked(several).ids, expected.ids)
    np.testing.assert_allclose(reranked(several).scores, expected.scores, rtol=1e-5)
    other = rs.build_index(rs.open_store(tmp_path / "s", measure="mse"), rs.ReTrac("matched"))
    mse = other.query(
        rs.Samples(images(8)[6:], several, STATES), 6, rerank=6, train=rs.Samples(images(6), several, STATES)
    )
    assert not np.allclose(mse.scores, expected.scores, rtol=0.01)


def test_self_influence_refuses_the_same_noise_in_another_order(tmp_path: Path) -> None:
    one, other = (
        sketched(images(3), tmp_path / name, timesteps=plans)
        for name, plans in zip("ab", (GROWN, GROWN[::-1]), strict=True)
    )
    with pytest.raises(ValueError, match="the same noise on both sides, in the same order"):
        self_influence(one, rs.ReTrac(pairing="matched"), queries=other)


def test_images_of_another_size_have_common_noise_of_their_own_shape() -> None:
    store = sketched(images(4), timesteps=rs.EvenlySpaced(2, seed=5))
    wide = torch.randn(2, 1, 6, 9, generator=torch.Generator().manual_seed(1))
    queries = sketched(wide, like=store)
    for name, rows in gradients(wide, PAIRS[:2]).items():
        np.testing.assert_allclose(queries.sketches(name), rows, atol=1e-5 * np.abs(rows).max())


@pytest.mark.parametrize(
    ("plan", "theirs"),
    [
        (rs.EvenlySpaced(2, noise="own"), "noise of their own"),
        (rs.EvenlySpaced(2, seed=6), "common noise of seed 6"),
    ],
)
@pytest.mark.parametrize("estimator", [rs.ReTracRidge(), rs.TracIn()])
def test_queries_under_other_noise_are_refused_with_the_reason(plan: Any, theirs: str, estimator: Any) -> None:
    store = sketched(images(6), timesteps=rs.EvenlySpaced(2, seed=5))
    why = rf"common noise of seed 5, the queries under {theirs}; scores would be the luck of two draws"
    with pytest.raises(ValueError, match=why):
        rs.build_index(store, estimator).query(sketched(images(2), timesteps=plan), 2)


def until(out: Any, share: float, at_most: int = 32, of: Any = None, **options: Any) -> rs.SketchStore:
    arguments = {
        "timesteps": rs.EvenlySpaced(2),
        "until": share,
        "at_most": at_most,
        "checkpoints": {"c": STATES["late"]},
    }
    return sketched(images(40) if of is None else of, out, **{**arguments, **options})


def test_until_ends_at_the_share_or_at_the_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = until(tmp_path / "s", 0.5, 16)
    t = store.shape[1]
    reached = rs.repeatability(store).overlap.value
    assert reached >= 0.5 or t == 16
    added = [further(rs.EvenlySpaced(2), number, 100) for number in range(2, t // 2 + 1)]
    assert plans_of(store.fingerprint)[1:] == [plan.spec() for plan in added]
    assert until(tmp_path / "s", min(0.5, reached)).shape[1] == t  # nothing is left to do
    assert ("raise at_most=16" in caplog.text) == (reached < 0.5)
    caplog.clear()
    assert until(tmp_path / "s", 0.99999, t + 3).shape[1] == t + 2  # whole rounds, within the budget
    assert f"not 0.99999; raise at_most={t + 3} to go on" in caplog.text
    # as if it had been sketched so at once
    plans = [further(rs.EvenlySpaced(2), number, 100) for number in range(1, t // 2 + 2)]
    whole = sketched(images(40), None, timesteps=plans, checkpoints={"c": STATES["late"]})
    np.testing.assert_array_equal(rs.open_store(tmp_path / "s").sketches("c"), whole.sketches("c"))


def test_until_asks_how_far_the_sums_of_all_measures_repeat(tmp_path: Path) -> None:
    task = rs.DiffusionTask(TASK.model, TASK.scheduler, measure=("mse", "mean_squared_output"))
    given: dict[str, Any] = {"checkpoints": {"c": STATES["late"]}, "timesteps": rs.EvenlySpaced(4), **WHOLE}
    first = rs.sketch(task, images(40), tmp_path / "s", **given)
    alone, added_up = (rs.repeatability(one).overlap.value for one in (first, first.under(*task.measures)))
    assert added_up > alone + 0.01
    between = (alone + added_up) / 2
    assert rs.sketch(task, images(40), tmp_path / "s", until=between, at_most=8, **given).shape[1] == 4
    alone_enough = rs.sketch(task.only("mse"), images(40), tmp_path / "t", until=between, at_most=8, **given)
    assert alone_enough.shape[1] > 4


def test_until_measures_a_store_once_more_that_was_measured_once(tmp_path: Path) -> None:
    assert until(tmp_path / "s", 0.99999, 2, timesteps=rs.EvenlySpaced(1)).shape[1] == 2


def test_until_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    class Failing(Labelled):
        broken, reads = True, 0

        def __getitem__(self, row: int) -> Any:
            self.reads += 1
            if self.broken and self.reads > 5 * 40:
                raise OSError("disk gone")
            return self.images[row]

    dataset = Failing(images(40))
    with pytest.raises(rs.FailedTasksError, match="disk gone"):
        until(tmp_path / "s", 0.99999, 8, dataset)
    begun = rs.open_store(tmp_path / "s")
    assert not begun.is_complete
    assert len(plans_of(begun.fingerprint)) == 3
    dataset.broken = False
    resumed = until(tmp_path / "s", 0.99999, 8, dataset)
    assert resumed.shape[1] == 8
    np.testing.assert_array_equal(resumed.sketches("c"), until(tmp_path / "t", 0.99999, 8).sketches("c"))


def test_until_takes_timesteps_that_the_store_has_not(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoints": {"c": STATES["late"]}}
    sketched(images(40), tmp_path / "s", timesteps=[rs.EvenlySpaced(2), rs.Explicit([37, 87])], **options)
    store = until(tmp_path / "s", 0.99999, 8)
    assert [plan.get("timesteps") for plan in plans_of(store.fingerprint)] == [None, [37, 87], [12, 62], [6, 56]]


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 40), number_of=st.integers(1, 300), length=st.sampled_from([50, 100, 1000]))
def test_a_store_is_never_measured_twice_at_the_same_timestep_and_noise(
    count: int, number_of: int, length: int
) -> None:
    plan = rs.EvenlySpaced(count)
    found = [further(plan, number, length).pairs("c", np.arange(1), length) for number in range(1, number_of + 1)]
    seen = [pair for pairs in found for pair in zip(pairs.timesteps[0].tolist(), pairs.seeds[0].tolist(), strict=True)]
    assert len(set(seen)) == len(seen) == count * number_of
    assert {step for step, _ in seen} <= set(range(length))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"until": 1.0}, "an overlap of lists between 0 and 1"),
        ({"at_most": 1}, "at_most must be an integer of 2 or more"),
        ({"out": None}, "until= adds to a store that is there"),
        ({"timesteps": rs.Recorded("record")}, "has one pair for each, the one that it was trained at; give a grid"),
    ],
)
def test_until_says_why_it_cannot_grow(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    given = {"out": tmp_path / "s", "until": 0.9, "timesteps": rs.EvenlySpaced(2), **options}
    with pytest.raises(ValueError, match=why):
        sketched(images(4), given.pop("out"), **given)
    assert not (tmp_path / "s").exists()
