"""Laws of the projections: linear, unbiased, of bounded variance, the same everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import retrac_scale as rs
from retrac_scale.gradients.mixing import SETS, mix
from retrac_scale.gradients.norms import squared_norm
from retrac_scale.native import threads as passes
from retrac_scale.projections import Projection, TrakProjector, from_spec, random
from retrac_scale.projections.folding import fold, fold_by_block

SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 40)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def apply(projection: Projection, gradients: Tensor) -> Tensor:
    projector = projection.bind(SHAPES, {}, torch.device("cpu"))
    accumulator = projector.start(len(gradients))
    start = 0
    for name, shape in SHAPES.items():
        stop = start + int(np.prod(shape))
        projector.add(accumulator, name, gradients[:, start:stop].reshape(-1, *shape))
        start = stop
    return projector.finish(accumulator)


@given(dim=st.integers(1, 200), seed=st.integers(0, 1000))
def test_countsketch_has_one_entry_of_plus_or_minus_one_per_column(dim: int, seed: int) -> None:
    matrix = apply(rs.CountSketch(dim, seed), torch.eye(SIZE))
    assert matrix.shape == (SIZE, dim)
    assert ((matrix != 0).sum(1) == 1).all()
    assert matrix.abs().sum() == SIZE


@given(dim=st.integers(1, 64), scale=st.floats(-8, 8, width=32))
def test_countsketch_is_linear(dim: int, scale: float) -> None:
    x, y = torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(0))
    projection = rs.CountSketch(dim, 3)
    together = apply(projection, x + scale * y)
    torch.testing.assert_close(together, apply(projection, x) + scale * apply(projection, y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [8, 32])
def test_countsketch_inner_products_are_unbiased_within_the_variance_bound(dim: int) -> None:
    x, y = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1))
    estimates = []
    for seed in range(400):
        sketches = apply(rs.CountSketch(dim, seed), torch.stack([x, y]))
        estimates.append(float(sketches[0] @ sketches[1]))
    bound = float((x @ x) * (y @ y) + (x @ y) ** 2) / dim
    assert abs(np.mean(estimates) - float(x @ y)) < 4 * np.sqrt(bound / len(estimates))
    # 400 draws put the sample variance within 4 sqrt(2/400) = 28 % of the true one
    assert np.var(estimates) < 1.3 * bound


def test_signs_are_the_same_on_every_platform() -> None:
    signs = rs.projections.random.signs(0, "conv_in.weight", 12).astype(int).tolist()
    shifts = rs.projections.random.shifts(0, "conv_in.weight", 4, 4096)
    assert (signs, shifts) == (SIGNS, SHIFTS)


SIGNS = [-1, 1, -1, 1, 1, 1, -1, -1, -1, 1, -1, -1]
SHIFTS = [3898, 2140, 3600, 3923]


def test_sketches_of_different_seeds_and_parameters_are_independent() -> None:
    signs = [rs.projections.random.signs(seed, name, 4096) for seed in (0, 1) for name in ("a", "b")]
    products = np.asarray(np.corrcoef(signs))[np.triu_indices(4, 1)]
    assert np.abs(products).max() < 5 / np.sqrt(4096)


@pytest.mark.parametrize(("rank", "dim", "mixed"), [(4, 512, 2), (8, 32, 1)])
def test_lowrank_inner_products_are_unbiased(rank: int, dim: int, mixed: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.SiLU(), nn.Flatten(2), nn.Linear(25, 400))
    x = torch.randn(2, 8, 7, 7)

    def sketches(projection: Any) -> Tensor:
        with rs.GradientSketcher(model, projection) as sketcher:
            assert len(sketcher._projector.mixers) == (mixed if isinstance(projection, rs.LowRank) else 0)
            sketch: Tensor = sketcher(model(x).square().sum((1, 2)))[0]
        return sketch

    full = sketches(rs.Identity())
    true = float(full[0] @ full[1])
    estimates = []
    for seed in range(300):
        a, b = sketches(rs.LowRank(rank, dim, seed))
        estimates.append(float(a @ b))
    assert abs(np.mean(estimates) - true) < 4 * np.std(estimates) / np.sqrt(len(estimates))


@given(st.integers(0, 9), st.integers(0, 5), st.integers(0, 7), st.integers(0, 4))
def test_a_mixers_rows_are_distinct_and_orthogonal(seed: int, some: int, more: int, block: int) -> None:
    rows, columns = 2 ** min(some, more), 2**more
    mixer = random.orthogonal_signs(seed, "layer", rows, columns, 2**block)
    np.testing.assert_array_equal(mixer @ mixer.T, columns * np.eye(rows))


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (8, 32), (4, 64), (16, 16)])
def test_a_mixer_is_the_identity_on_average_and_varies_less_than_independent_signs(rows: int, columns: int) -> None:
    products = mixed_twice(rows, columns)
    law = (columns - rows) / (columns - 1) / rows  # 1 / rows for independent signs
    np.testing.assert_allclose((products**2).mean(), law, rtol=0.05, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(4, 5), (4, 40), (8, 12)])
def test_a_mixer_of_any_number_of_outputs_is_the_identity_on_average(rows: int, columns: int) -> None:
    mixed_twice(rows, columns)


def mixed_twice(rows: int, columns: int) -> Any:
    """R^T R off its diagonal, of 4,000 mixers R, on average 0; on it, it is 1."""
    mixers = [random.orthogonal_signs(seed, "layer", rows, columns, SETS) for seed in range(4000)]
    products = np.array([mixer.T @ mixer / rows for mixer in mixers])
    apart = ~np.eye(columns, dtype=bool)
    np.testing.assert_array_equal(products[:, ~apart], 1)
    off = products[:, apart]
    assert (np.abs(off.mean(0)) <= 5 * off.std(0) / np.sqrt(len(mixers))).all()  # each within its own standard error
    return off


def test_layers_are_mixed_where_that_saves_a_third_of_the_work_unless_they_are_the_last() -> None:
    sizes = {
        "small": (12, 12, 3, 3),
        "convolution": (64, 64, 3, 3),
        "narrow": (32, 96),
        "square": (64, 64),
        "last": (32, 1152),
        "big": (1280, 640, 1, 1),
    }
    shapes = {f"{name}.weight": size for name, size in sizes.items()}

    def ranks(projection: Projection) -> dict[str, int]:
        mixable = {name: size[0] for name, size in shapes.items()}
        mixers = projection.bind(shapes, mixable, torch.device("cpu")).mixers
        assert all(mixer.shape[1] == shapes[name][0] for name, mixer in mixers.items())
        return {name.removesuffix(".weight"): len(mixer) for name, mixer in mixers.items()}

    assert ranks(rs.LowRank()) == {"convolution": 4, "square": 8, "big": 8}
    assert ranks(rs.LowRank(8)) == ranks(rs.LowRank(dim=4096)) == {"convolution": 8, "big": 16}
    assert ranks(rs.LowRank(dim=8191)) == ranks(rs.LowRank(dim=4096))


def in_set(mixer: Tensor, number: int) -> Tensor:
    """The rows of a set, entry by entry."""
    outputs = np.arange(mixer.shape[1]) % SETS
    signs = [(-1) ** bin(number & output).count("1") for output in outputs]
    return mixer * torch.tensor(signs, dtype=mixer.dtype)


@pytest.mark.parametrize("kernel", [(), (1,), (2, 3), (2, 1, 9)])
@pytest.mark.parametrize("outputs", [6, 37])
def test_each_input_is_mixed_by_its_own_set(kernel: tuple[int, ...], outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixer = torch.randn(4, outputs, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, outputs, 19, *kernel, generator=generator, dtype=torch.float64)
    mixed = mix(mixer, weight)
    assert mixed.shape == (2, 4, 19, *kernel)
    for i in range(19):
        for number, place in enumerate(np.ndindex(*kernel)):
            expected = weight[:, :, i][:, :, *place] @ in_set(mixer, (i + number) % SETS).T
            torch.testing.assert_close(mixed[:, :, i][:, :, *place], expected)


@given(
    st.integers(0, 99),
    st.sampled_from([(4, 16), (4, 32), (4, 64), (8, 64), (8, 128)]),
    st.sampled_from([(16, ()), (32, (1, 1)), (3, (2, 8)), (1, (16,))]),
)
def test_mixing_by_all_sets_makes_no_error_where_inputs_have_the_same_gradient(
    seed: int, sizes: Any, inputs: Any
) -> None:
    (rank, columns), (features, kernel) = sizes, inputs
    mixer = torch.from_numpy(random.orthogonal_signs(seed, "layer", rank, columns, SETS)).double()
    outputs = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    same = outputs.reshape(2, columns, *[1] * (1 + len(kernel))).expand(2, columns, features, *kernel)
    a, b = mix(mixer, same).flatten(1) / rank**0.5
    torch.testing.assert_close(a @ b, same[0].flatten() @ same[1].flatten(), rtol=1e-9, atol=1e-9)


def test_lowrank_norm_is_that_of_the_sketch_and_countsketch_norm_is_exact() -> None:
    model = nn.Linear(20, 30)
    x = torch.randn(3, 20)

    def sketched(projection: Any) -> tuple[Tensor, Tensor]:
        with rs.GradientSketcher(model, projection) as sketcher:
            return sketcher(model(x).square().sum(1))

    full, _ = sketched(rs.Identity())
    sketch, norm = sketched(rs.LowRank(4, 64))
    torch.testing.assert_close(norm, sketch.norm(dim=1))
    torch.testing.assert_close(sketched(rs.CountSketch(16))[1], full.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", ["estimate", "exact"])
def test_lowrank_mixes_a_linear_layer_over_positions_and_keeps_one_that_sees_a_vector_whole(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 48), nn.SiLU(), nn.Linear(48, 320))

    def sketched(projection: Any, x: Tensor) -> Tensor:
        sketcher = rs.GradientSketcher(model, projection)
        with sketcher:
            found = sketcher(model(x).square().flatten(1).sum(1))
        sketcher.check(
            found, lambda: model(x).square().flatten(1).sum(1), lambda: model(x[:1]).square().sum()[None], "sample 0"
        )
        return found[0]

    vectors, sequences = torch.randn(3, 20), torch.randn(3, 7, 20)
    lowrank, countsketch = rs.LowRank(4, 64, norm=norm), rs.CountSketch(64)
    torch.testing.assert_close(sketched(lowrank, vectors), sketched(countsketch, vectors))
    assert not torch.allclose(sketched(lowrank, sequences), sketched(countsketch, sequences), rtol=0.1)


@pytest.mark.parametrize("projection", [rs.CountSketch(64, 3), rs.LowRank(4, 64, 1), rs.LowRank(), rs.Identity()])
def test_a_projection_is_rebuilt_from_its_description(projection: Projection) -> None:
    assert from_spec(projection.spec()) == projection


@pytest.mark.parametrize("dim", [0, -1])
def test_a_dimension_below_one_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="dim of 1 or more"):
        rs.CountSketch(dim)


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.usefixtures("small_layers_mixed")
def test_lowrank_with_exact_norm_is_the_same_sketch_with_the_full_norm(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, stride=2), nn.SiLU(), nn.Conv2d(12, 8, 3, padding=1), nn.Flatten(2), nn.Linear(16, 40)
    )
    x = torch.randn(3, 2, 10, 10)

    def sketched(projection: Any) -> tuple[Tensor, Tensor]:
        with rs.GradientSketcher(model, projection) as sketcher:
            return sketcher(model(x).square().sum((1, 2)))

    estimate, exact = sketched(rs.LowRank(rank, 128)), sketched(rs.LowRank(rank, 128, norm="exact"))
    torch.testing.assert_close(exact[0], estimate[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact[1], sketched(rs.Identity())[1], rtol=1e-5, atol=0)


@pytest.mark.usefixtures("small_layers_mixed")
def test_layers_that_share_a_bias_are_mixed_and_those_that_share_a_weight_are_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)])
    model[2].bias = model[0].bias
    model[3].weight = model[1].weight
    x = torch.randn(3, 7, 24)

    sketcher = rs.GradientSketcher(model, rs.LowRank(4, 64))
    assert sorted(sketcher._projector.mixers) == ["0.weight", "2.weight", "4.weight"]
    with sketcher:
        found = sketcher(model(x).square().sum((1, 2)))
    sketcher.check(found, lambda: model(x).square().sum((1, 2)), lambda: model(x[:1]).square().sum((1, 2)), "sample 0")


@pytest.mark.parametrize("norm", ["estimate", "exact"])
@pytest.mark.usefixtures("small_layers_mixed")
def test_a_linear_layer_is_mixed_in_the_batches_where_it_sees_a_sample_at_several_positions(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 40)
    several, one = torch.randn(3, 5, 24), torch.randn(3, 24)
    mixing, whole = rs.LowRank(4, 64, norm=norm), rs.CountSketch(64)

    def sketched(projection: Projection, *batches: Tensor) -> list[Tensor]:
        with rs.GradientSketcher(model, projection) as sketcher:
            return [sketcher(model(x).sin().flatten(1).sum(1))[0] for x in batches]

    found = sketched(mixing, several, one, several)
    assert torch.equal(found[1], sketched(whole, one)[0])
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], sketched(whole, several)[0], rtol=0.1)


def test_check_names_the_parameters_of_a_layer_that_puts_samples_on_another_axis() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.embed(x).transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = SequenceFirst(), torch.randn(2, 4, 3)

    def losses(rows: int = 2) -> Tensor:
        return model(x[:rows]).square().sum((1, 2))  # type: ignore[no-any-return]

    sketcher = rs.GradientSketcher(model, rs.CountSketch(64), check=False)
    with sketcher:
        sketched = sketcher(losses())
    with pytest.raises(
        rs.projections.GradientMismatchError, match=r"sample 7: .* they differ in inner\.weight, inner\.bias \("
    ):
        sketcher.check(sketched, losses, lambda: losses(1), "sample 7")


@pytest.mark.parametrize(
    "projection", [rs.CountSketch(64), rs.LowRank(4, 64), rs.LowRank(4, 64, norm="exact"), rs.Dense(64), rs.Identity()]
)
@pytest.mark.usefixtures("small_layers_mixed")
def test_check_passes_for_every_projection(projection: Projection) -> None:
    model = nn.Sequential(nn.Conv2d(1, 9, 3), nn.GroupNorm(3, 9), nn.SiLU(), nn.Flatten(), nn.Linear(36, 8))
    x = torch.randn(3, 1, 4, 4)
    sketcher = rs.GradientSketcher(model, projection)
    with sketcher:
        sketched = sketcher(model(x).square().sum(1))
    sketcher.check(sketched, lambda: model(x).square().sum(1), lambda: model(x[:1]).square().sum(1), "sample 0")


def folded(entries: Tensor, k: int, scale: float) -> tuple[Tensor, ...]:
    """Signs, shifts and what entry by entry addition in float64 makes of entries `[n, p]`."""
    rng = np.random.default_rng(0)
    signs = rng.choice(np.array([-1, 1], np.int8), entries.shape[1])
    shifts = rng.integers(0, k, -(-entries.shape[1] // k))
    expected = torch.zeros(len(entries), 2 * k, dtype=torch.float64)
    for place, sign in enumerate(signs):
        expected[:, shifts[place // k] + place % k] += scale * int(sign) * entries[:, place].double()
    return torch.from_numpy(signs), torch.from_numpy(shifts), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("p", "k"), [(1, 8), (64, 16), (37, 16), (5, 16), (1000, 33)])
def test_the_compiled_fold_and_torchs_equal_entry_by_entry_addition(dtype: torch.dtype, p: int, k: int) -> None:
    entries = torch.randn(3, p, generator=torch.Generator().manual_seed(p), dtype=torch.float64).to(dtype)
    signs, shifts, expected = folded(entries, k, 0.25)
    compiled, by_block = torch.zeros(2, 3, 2 * k)
    squares = fold(compiled, entries, (signs.numpy(), shifts.numpy()), 0.25)
    fold_by_block(by_block, entries, signs, shifts.numpy(), 0.25)
    torch.testing.assert_close(compiled.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_block.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares.double(), entries.double().square().sum(1), rtol=1e-5, atol=0)


def test_threads_share_a_fold_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = torch.randn(7, 5000, generator=torch.Generator().manual_seed(0))
    signs, shifts, _ = folded(entries, 64, 1)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(passes, "THREAD_BYTES", 1)
        monkeypatch.setattr(passes, "SHARED_BYTES", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        accumulator = torch.zeros(7, 128)
        found.append((accumulator, fold(accumulator, entries, (signs.numpy(), shifts.numpy()), 1)))
    for accumulator, squares in found[1:]:
        assert torch.equal(accumulator, found[0][0])
        assert torch.equal(squares, found[0][1])


def test_sketches_of_an_earlier_revision_are_refused() -> None:
    spec = rs.CountSketch(64).spec()
    assert from_spec(spec) == rs.CountSketch(64)
    with pytest.raises(ValueError, match="revision 1 of CountSketch, this release makes revision 2"):
        from_spec({key: value for key, value in spec.items() if key != "revision"})


@pytest.mark.parametrize("projection", [rs.Identity(), rs.CountSketch(2048), rs.LowRank(norm="exact")])
def test_exact_norms_are_exact_at_ten_million_entries(projection: Projection) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4096, 2560, bias=False), torch.randn(1, 3, 4096)

    def loss() -> Tensor:
        return layer(x).sin().square().flatten(1).mean(1)  # type: ignore[no-any-return]

    expected = torch.autograd.grad(loss().sum(), layer.weight)[0].double().norm()
    with rs.GradientSketcher(layer, projection) as sketcher:
        _, norm = sketcher(loss())
    torch.testing.assert_close(norm[0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [1, 1023, 1024, 5000, 3_000_000])
def test_norms_of_equal_entries_do_not_drift(p: int) -> None:
    rows = torch.full((2, p), 1 / 3)
    expected = rows.double().square().sum(1).sqrt()
    torch.testing.assert_close(squared_norm(rows).sqrt(), expected, rtol=1e-6, atol=0)
    signs = np.ones(p, np.int8), np.zeros(-(-p // 4096), np.int64)
    torch.testing.assert_close(fold(torch.zeros(2, 8192), rows, signs, 1).sqrt(), expected, rtol=1e-6, atol=0)


def test_norms_of_gradients_whose_squares_float32_cannot_hold() -> None:
    rows = torch.randn(3, 5000) * torch.tensor([1e-21, 1e-30, 1.0])[:, None]
    torch.testing.assert_close(squared_norm(rows).sqrt(), rows.double().norm(dim=1), rtol=1e-6, atol=0)


class Scaled(nn.Module):
    """A linear layer times a learned number of some shape, as ReZero has it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.scale = nn.Linear(6, 3), nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "projection",
    [rs.Identity(), rs.CountSketch(16), rs.LowRank(4, 16), rs.Dense(8)],
    ids=lambda one: type(one).__name__,
)
def test_a_parameter_without_axes_is_sketched_as_one_of_a_single_entry(projection: Projection) -> None:
    found = []
    for shape in ((), (1,)):
        model, x = Scaled(*shape), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        divisors = {name: torch.full_like(value, 2.0).detach() for name, value in model.named_parameters()}
        exact = not isinstance(projection, rs.LowRank)
        with rs.GradientSketcher(model, projection, precondition=divisors if exact else None) as sketcher:
            for _ in range(2):
                sketch, norm = sketcher(model(x).sin().square().mean(1))
        found.append((sketch, norm))
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        given = {name: torch.ones(2, *size) for name, size in shapes.items()}
        assert TrakProjector(projection, shapes).project(given, 0).shape == (2, sketcher.dim)
    torch.testing.assert_close(*found)
