"""Dense projections through TRAK's projectors, and our projections inside TRAK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

import retrac_scale as rs
from retrac_scale.projections import Projection, TrakProjector, from_spec

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 40)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
X = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0))


def apply(projection: Projection, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Sketches and squared norms."""
    projector = projection.bind(SHAPES, {}, torch.device("cpu"))
    accumulator, squares = projector.start(len(gradients)), torch.zeros(len(gradients))
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    for (name, shape), part in zip(SHAPES.items(), torch.split(gradients, sizes, 1), strict=True):
        added = projector.add(accumulator, name, part.reshape(-1, *shape))
        assert added is not None
        squares += added
    return projector.finish(accumulator), squares


@pytest.mark.parametrize("dim", [8, 300])
def test_dense_inner_products_are_unbiased_with_the_variance_of_a_gaussian_matrix(dim: int) -> None:
    sketches = [apply(rs.Dense(dim, seed), X[:2])[0] for seed in range(400)]
    estimates = [float(x @ y) for x, y in sketches]
    true, variance = float(X[0] @ X[1]), float((X[0] @ X[0]) * (X[1] @ X[1]) + (X[0] @ X[1]) ** 2) / dim
    assert abs(np.mean(estimates) - true) < 4 * np.sqrt(variance / len(estimates))
    # 400 draws put the sample variance within 4 sqrt(2/400) = 28 % of the true one
    assert 0.7 * variance < np.var(estimates) < 1.3 * variance


def test_dense_does_not_depend_on_the_batch() -> None:
    together = apply(rs.Dense(300), X)[0]
    alone = torch.cat([apply(rs.Dense(300), row[None])[0] for row in X])
    torch.testing.assert_close(together, alone)


def test_dense_draws_other_columns_for_every_seed() -> None:
    matrices = [apply(rs.Dense(300, seed), torch.eye(SIZE))[0] for seed in (0, 1, 1000)]
    columns = torch.cat(matrices, 1).T
    assert len(torch.unique(columns, dim=0)) == 900  # with TRAK's own seeding, seed 0 and 1000 share two blocks


def test_dense_comes_with_the_exact_norm() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 2)), torch.randn(3, 5)

    def sketched(projection: Projection) -> tuple[Tensor, Tensor]:
        with rs.GradientSketcher(model, projection) as sketcher:
            return sketcher(model(x).square().sum(1))

    full = sketched(rs.Identity())[0]
    sketch, norm = sketched(rs.Dense(2000))
    torch.testing.assert_close(norm, full.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(sketch.norm(dim=1), norm, rtol=0.15, atol=0)


def test_dense_is_rebuilt_from_its_description() -> None:
    assert from_spec(rs.Dense(64, 3).spec()) == rs.Dense(64, 3)


def test_sketches_of_another_gpu_are_refused_with_what_to_do() -> None:
    projection = rs.Dense(512, multiprocessors=132)
    assert projection.spec()["multiprocessors"] == 132
    with pytest.raises(ValueError, match=r"GPU with 132 multiprocessors, and the model is on cpu.*multiprocessors=0"):
        projection.bind(SHAPES, {}, torch.device("cpu"))
    with pytest.raises(ValueError, match="multiple of 512"):
        rs.Dense(100, multiprocessors=132)


@pytest.mark.parametrize("projection", [rs.CountSketch(64, 3), rs.Dense(64, 3)])
def test_a_projector_for_trak_gives_the_projection_of_vectors_and_of_named_gradients(projection: Projection) -> None:
    projector = TrakProjector(projection, SHAPES)
    expected = apply(projection, X)[0]
    torch.testing.assert_close(projector.project(X, model_id=0), expected)
    parts = torch.split(X, [int(np.prod(shape)) for shape in SHAPES.values()], 1)
    named = {name: part.reshape(-1, *shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}
    torch.testing.assert_close(projector.project(named, model_id=0), expected)


def test_a_projector_for_trak_has_another_matrix_for_another_model_id() -> None:
    projector = TrakProjector(rs.CountSketch(64, 3), SHAPES)
    first = projector.project(X, model_id=0)
    torch.testing.assert_close(projector.project(X, model_id=1), apply(rs.CountSketch(64, 4), X)[0])
    torch.testing.assert_close(projector.project(X, model_id=0), first)


def test_a_projector_for_trak_refuses_gradients_of_other_parameters() -> None:
    projector = TrakProjector(rs.CountSketch(64), SHAPES)
    with pytest.raises(ValueError, match="17 entries, the projector's shapes 162"):
        projector.project(torch.zeros(2, 17), model_id=0)
    with pytest.raises(ValueError, match=r"differ in 'a\.bias'"):
        projector.project({"a.weight": X[:, :35], "b.weight": X[:, 42:]}, model_id=0)


class SquaredError(AbstractModelOutput):  # type: ignore[misc]
    """The loss itself, as TracIn differentiates it."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(model: nn.Module, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        prediction: Tensor = torch.func.functional_call(model, (weights, buffers), x[None])[0]
        return (prediction - y).square().sum()

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        return torch.ones(len(batch[0]), 1)


def test_trak_gives_the_same_scores_with_our_countsketch_as_without_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.Tanh(), nn.Linear(60, 3)).eval()
    train, queries = (torch.randn(40, 6), torch.randn(40, 3)), (torch.randn(10, 6), torch.randn(10, 3))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    size, dim = sum(value.numel() for value in model.parameters()), 512

    def run(name: str, projector: Any) -> tuple[Any, Any]:
        """TRAK's stored gradients `[40, k]` and scores `[40, 10]`."""
        traker = TRAKer(
            model,
            SquaredError(),
            train_set_size=40,
            save_dir=str(tmp_path / name),
            projector=projector,
            device="cpu",
            use_half_precision=False,
            logging_level="ERROR",
            lambda_reg=1.0,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(train, num_samples=40)
        gradients = np.array(traker.saver.current_store["grads"])
        traker.finalize_features()
        traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=0, num_targets=10)
        traker.score(queries, num_samples=10)
        return gradients, np.array(traker.finalize_scores("queries"))

    full, expected = run("none", NoOpProjector(grad_dim=size, proj_dim=size, device="cpu"))
    ours, scores = run("ours", TrakProjector(rs.CountSketch(dim), shapes))
    theirs, _ = run("theirs", BasicProjector(size, dim, 0, ProjectionType.normal, torch.device("cpu")))
    for sketched in (ours, theirs):
        assert np.corrcoef((sketched @ sketched.T).ravel(), (full @ full.T).ravel())[0, 1] > 0.99
    np.testing.assert_allclose(np.diag(ours @ ours.T).mean(), np.diag(full @ full.T).mean(), rtol=0.05)
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.95
    best, true = np.argsort(-scores, axis=0)[:5], np.argsort(-expected, axis=0)[:5]
    assert np.mean([np.isin(a, b).mean() for a, b in zip(best.T, true.T, strict=True)]) > 0.8
