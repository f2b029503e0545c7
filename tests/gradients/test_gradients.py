"""Per-sample gradients of every layer type against autograd, one sample at a time."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import retrac_scale as rs
from retrac_scale.gradients.factored import FactoredGradients, pairs_of
from retrac_scale.gradients.graphs import leaves_of
from retrac_scale.gradients.layers import Call
from retrac_scale.gradients.rules.normalization import _sums, _watched
from tests.oracle import gradient


def check(model: nn.Module, inputs: Tensor, *, rows: int = 1) -> None:
    """Sketches under Identity, and norms, equal the gradients of one sample's loss at a time in float64.

    Those of another function of the same forward pass, taken before, are its own.
    """
    model = model.eval()
    torch.manual_seed(1)
    n = len(inputs) // rows

    def losses(module: nn.Module, x: Tensor, n: int) -> Tensor:
        values: Tensor = module(x).reshape(n, -1).sin().square().mean(1)
        return values

    with rs.GradientSketcher(model, rs.Identity()) as sketcher:
        values = losses(model, inputs, n)
        tripled, _ = sketcher(3 * values, retain_graph=True)
        sketch, norm = sketcher(values)
    torch.testing.assert_close(tripled, 3 * sketch)
    reference = copy.deepcopy(model).double()
    for sample in range(n):
        x = inputs[sample * rows : (sample + 1) * rows]
        expected = gradient(reference, losses(reference, x.double() if x.is_floating_point() else x, 1).sum())
        torch.testing.assert_close(sketch[sample].double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norm[sample].double(), expected.norm(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_autograd_for_any_number_of_positions(shape: tuple[int, ...], bias: bool) -> None:
    check(nn.Sequential(nn.Linear(5, 6, bias=bias), nn.SiLU(), nn.Linear(6, 3)), torch.randn(shape))


class WithContext(nn.Module):
    """The first row is of pixels, the others are tokens of a context, which may have none."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.tokens = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x[:, 0]) + self.tokens(x[:, 1:]).sum(1)  # type: ignore[no-any-return]


def test_gradient_of_a_linear_layer_over_no_positions_is_zero_as_by_autograd() -> None:
    check(WithContext(), torch.randn(3, 1, 5))


@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    bias=st.booleans(),
    rows=st.integers(1, 2),
)
def test_convolution_equals_autograd_for_every_option(
    dims: int, groups: int, kernel: int, stride: int, padding: Any, dilation: int, mode: str, bias: bool, rows: int
) -> None:
    assume(padding != "same" or stride == 1)
    layer: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    model = layer(
        4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )
    check(model, torch.randn(2 * rows, 4, *(6,) * dims), rows=rows)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), (3, 3, 5, 5)),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), (3, 5, 4)),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((5, 6), bias=False)), (3, 5, 4)),
    ],
)
def test_norm_layers_equal_autograd(model: nn.Module, shape: tuple[int, ...]) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    check(model, torch.randn(shape))


def test_embedding_equals_autograd_with_repeated_rows_and_padding() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 2))
    check(model, torch.tensor([[1, 1, 0], [2, 6, 2], [0, 0, 3]]))


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_one_sample_add_up(rows: int) -> None:
    check(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
        torch.randn(2 * rows, 2, 6, 6),
        rows=rows,
    )


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


class Bare(nn.Module):
    """A table of its own, used around a layer with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.table) * self.table  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model", [Twice(), Tied(), nn.Sequential(Bare(), Bare()), nn.Sequential(nn.PReLU(), nn.Linear(4, 2))]
)
def test_reuse_tying_and_parameters_without_a_rule_equal_autograd(model: nn.Module) -> None:
    check(model, torch.randn(2, 3, 4))


def test_an_unused_parameter_has_gradient_zero() -> None:
    model = Twice()
    model.unused = nn.Linear(2, 2)
    check(model, torch.randn(3, 4))


def test_parameters_selects_by_pattern_and_refuses_a_pattern_that_matches_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    sketcher = rs.GradientSketcher(model, rs.Identity(), parameters=["1.*"])
    assert list(sketcher.shapes) == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match=r"'2\.\*' matches none"):
        rs.GradientSketcher(model, rs.Identity(), parameters=["2.*"])


def test_weights_are_trainable_again_after_the_context() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    with rs.GradientSketcher(model, rs.Identity()) as sketcher:
        sketcher(model(torch.randn(2, 3)).sum(1))
        assert model.weight not in set(leaves_of(model(torch.randn(2, 3))))
    assert model.weight.requires_grad
    assert not model.bias.requires_grad
    assert model.weight.grad is None


def test_a_layer_that_does_not_see_the_batch_is_refused_by_name() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.position(torch.ones(1, 3))  # type: ignore[no-any-return]

    model = Broadcast()
    with (
        rs.GradientSketcher(model, rs.Identity()) as sketcher,
        pytest.raises(ValueError, match="layer 'position' ran on 1 rows for 2 losses"),
    ):
        sketcher(model(torch.randn(2, 3)).sum(1))


class Around(nn.Module):
    """Multiplies with a weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.second.weight + self.second.bias  # type: ignore[no-any-return]


@pytest.mark.parametrize("check", [True, False])
def test_a_parameter_used_around_its_layer_is_refused_by_name(check: bool) -> None:
    model = Around()
    with (
        rs.GradientSketcher(model, rs.Identity(), check=check) as sketcher,
        pytest.raises(ValueError, match=r"'second\.(weight|bias)' is used outside its own layer's forward"),
    ):
        sketcher(model(torch.randn(2, 3, 4)).square().sum((1, 2)))
    assert model.second.weight.requires_grad
    assert model.second.weight.grad is None


@pytest.mark.parametrize("model", [Around(), nn.Linear(4, 4)], ids=["refused", "sketched"])
def test_gradients_that_weights_have_are_as_before(model: nn.Module) -> None:
    model(torch.randn(2, 3, 4)).sum().backward()
    before = {
        name: (weight.grad, weight.grad.clone()) for name, weight in model.named_parameters() if weight.grad is not None
    }
    with contextlib.suppress(ValueError), rs.GradientSketcher(model, rs.Identity(), check=False) as sketcher:
        sketcher(model(torch.randn(2, 3, 4)).square().sum((1, 2)))
    for name, weight in model.named_parameters():
        own, values = before[name]
        assert weight.grad is own
        torch.testing.assert_close(own, values, rtol=0, atol=0)


def test_a_module_taken_whole_equals_autograd() -> None:
    class AroundWhole(Around):
        pass

    rs.gradients.recompute_whole(AroundWhole)
    check(nn.Sequential(nn.Linear(4, 4), AroundWhole(), nn.Linear(4, 2)), torch.randn(3, 5, 4))


def test_multihead_attention_equals_autograd_and_is_refused_where_samples_come_second() -> None:
    class Attention(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(4, 2, batch_first=batch_first)
            self.flip = not batch_first

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1) if self.flip else x
            y = self.inner(x, x, x)[0]
            return y.transpose(0, 1) if self.flip else y  # type: ignore[no-any-return]

    check(Attention(True), torch.randn(3, 5, 4))
    with pytest.raises(ValueError, match=r"'inner' .* gives another output for one sample alone"):
        check(Attention(False), torch.randn(2, 6, 4))


def test_dropout_in_a_module_that_is_run_again_is_said_to_be_it() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    with rs.GradientSketcher(model, rs.Identity()) as sketcher:
        losses = model(torch.randn(4, 5, 6)).square().sum((1, 2))
        with pytest.raises(ValueError, match=r"'self_attn' .* if it drops out, call eval\(\) or set its dropout to 0"):
            sketcher(losses)
    check(model, torch.randn(4, 5, 6))  # by eval()


def test_an_input_changed_in_place_is_refused_by_layer() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x) * 1
            y = self.second(hidden)
            hidden += 1
            return y + hidden  # type: ignore[no-any-return]

    model = InPlace()
    with (
        rs.GradientSketcher(model, rs.Identity()) as sketcher,
        pytest.raises(ValueError, match="input of layer 'second' was changed in place"),
    ):
        sketcher(model(torch.randn(2, 3)).square().sum(1))


def test_a_rule_that_forgets_a_parameter_is_refused() -> None:
    class Affine(nn.Linear):
        pass

    rs.gradients.register(Affine, lambda layer, activation, grad, n: {"bias": grad})
    model = nn.Sequential(nn.Linear(3, 3), Affine(3, 2))
    with (
        rs.GradientSketcher(model, rs.Identity()) as sketcher,
        pytest.raises(ValueError, match=r"the rule for Affine gives no gradient for '1\.weight'"),
    ):
        sketcher(model(torch.randn(2, 3)).sum(1))


def test_a_rule_that_forgets_the_bias_beside_its_products_is_refused() -> None:
    class Forgetful(nn.Linear):
        pass

    def rule(layer: nn.Linear, activation: Tensor, grad_output: Tensor, n: int) -> Any:
        pairs = pairs_of((1,), (1,), (1,), (0,), (1,), (1,))
        return {"weight": FactoredGradients(grad_output[:, None, :, None], activation[:, None, :, None], (), pairs)}

    rs.gradients.register(Forgetful, rule, factored=FactoredGradients.suit)
    model = nn.Sequential(nn.Linear(3, 3), Forgetful(3, 2))
    for projection in (rs.CountSketch(8), rs.Identity()):
        with (
            rs.GradientSketcher(model, projection) as sketcher,
            pytest.raises(ValueError, match=r"the rule for Forgetful gives no gradient for '1\.bias'"),
        ):
            sketcher(model(torch.randn(2, 3)).sum(1))


def test_a_registered_rule_is_used_for_its_layer_type() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    calls = []

    def rule(layer: Scale, activation: Tensor, grad_output: Tensor, n: int) -> dict[str, Tensor]:
        calls.append(n)
        return {"gain": (activation * grad_output).reshape(n, -1, 4).sum(1)}

    rs.gradients.register(Scale, rule)
    check(nn.Sequential(nn.Linear(4, 4), Scale()), torch.randn(2, 3, 4))
    assert set(calls) == {2}


def test_batch_norm_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="batch norm in training mode"):
        rs.GradientSketcher(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train(), rs.Identity())


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norm_over_the_batch_is_refused_whatever_is_selected(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, **options), nn.Conv2d(2, 1, 1))
    model.train("affine" in options)
    with pytest.raises(ValueError, match="layer '1' is a batch norm"):
        rs.GradientSketcher(model, rs.Identity(), parameters=["2.*"])
    check(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)), torch.randn(3, 1, 4, 4))


def test_complex_parameters_are_refused_by_name_unless_left_out() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(4, 5, dtype=torch.cfloat))
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.fft.irfft(torch.fft.rfft(x) * self.filter))  # type: ignore[no-any-return]

    for refused in (lambda: rs.GradientSketcher(Spectral(), rs.Identity()), lambda: rs.check_model(Spectral(), ONE)):
        with pytest.raises(rs.gradients.UncapturableError, match="'filter' is complex"):
            refused()
    model = Spectral()
    with rs.GradientSketcher(model, rs.Identity(), parameters=["inner.*"]) as sketcher:
        assert sketcher(model(ONE).square().sum((1, 2)))[0].isfinite().all()


ONE = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul_": lambda y, h: y.mul_(2),
    "relu": lambda y, h: F.relu(y, inplace=True),
    "add": lambda y, h: y.add_(h),
    "slice": lambda y, h: y[..., :2].mul_(3) * 0 + y[..., :2],
    "view": lambda y, h: y.view(-1).mul_(2).view_as(y),
    "twice": lambda y, h: F.relu(y.mul_(2), inplace=True),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE.keys())
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 6), (3, 6)),
        (nn.Linear(6, 6), (3, 4, 6)),
        (nn.Linear(6, 6, bias=False), (3, 2, 4, 6)),
        (nn.LayerNorm(6), (3, 4, 6)),
        (nn.Conv1d(6, 6, 1), (3, 6, 6)),
        (nn.GroupNorm(2, 6), (3, 6, 6)),
        (nn.BatchNorm1d(6), (3, 6, 6)),
        (nn.InstanceNorm1d(6, affine=True), (3, 6, 6)),
        (nn.PReLU(6), (3, 6, 6)),
    ],
)
def test_a_layers_output_may_be_changed_in_place(
    layer: nn.Module, shape: tuple[int, ...], change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer, self.after = nn.Linear(6, 6), copy.deepcopy(layer), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.before(x).tanh()
            return self.after(change(self.layer(hidden), hidden))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Changing()
    model.eval()(torch.randn(shape))
    check(model, torch.randn(shape))


def test_an_output_that_its_own_module_has_saved_is_guarded_by_autograd_as_ever() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gain = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) * self.gain).sigmoid()  # type: ignore[no-any-return]

    check(Gate(), torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check(nn.Sequential(Gate(), nn.ReLU(inplace=True)), torch.randn(3, 6))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)), (3, 6)),
        (nn.LSTM(6, 5, batch_first=True), (4, 3, 6)),
        (nn.GRU(6, 5, 2, batch_first=True), (4, 3, 6)),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), (3, 4, 6)),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), (4, 6)),
        (nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), (4, 6)),
    ],
)
def test_vectors_recurrent_and_parametrized_layers_equal_autograd(model: nn.Module, shape: tuple[int, ...]) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

    check(First(), torch.randn(shape))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_weight_that_a_hook_computes_is_recomputed_with_it_and_leaves_no_graph() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))

    model, x = build(), torch.randn(4, 6)
    for check_first in (True, False):  # with trainable weights, with frozen ones
        with rs.GradientSketcher(model, rs.Identity(), check=check_first) as sketcher:
            found, _norm = sketcher(model(x).sin().square().mean(1))
        reference = build().double()
        for sample in range(4):
            expected = gradient(reference, reference(x[sample].double()).sin().square().mean())
            torch.testing.assert_close(found[sample].double(), expected, rtol=1e-4, atol=1e-6)
    copy.deepcopy(model)  # which a graph would not allow


def test_hooks_of_the_model_see_what_they_saw_and_their_changes_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2))
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: 0.5 * output)
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    check(model, torch.randn(3, 5, 4))


def test_losses_made_outside_the_context_are_refused() -> None:
    model = nn.Linear(3, 2)
    losses = F.relu(model(torch.randn(2, 3))).sum(1).detach()
    with rs.GradientSketcher(model, rs.Identity()) as sketcher, pytest.raises(ValueError, match="inside the context"):
        sketcher(losses)


@pytest.mark.parametrize("take", [lambda losses: losses[:0], lambda losses: losses.sum()], ids=["none", "a sum"])
def test_losses_that_are_not_one_of_each_sample_are_refused(take: Callable[[Tensor], Tensor]) -> None:
    model = nn.Linear(3, 2)
    with rs.GradientSketcher(model, rs.Identity()) as sketcher, pytest.raises(ValueError, match="one value per sample"):
        sketcher(take(model(torch.randn(2, 3)).sum(1)))


@pytest.mark.parametrize("rows", [1, 2])
def test_channels_last_activations_make_no_difference(rows: int) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(4, 24, 3, padding=1),
        nn.GroupNorm(4, 24),
        nn.Conv2d(24, 4, 3, stride=2, padding=1),  # by the windows of the gradient
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 24, 1),
    )
    model.to(memory_format=torch.channels_last)
    inputs = torch.randn(2 * rows, 4, 6, 6).to(memory_format=torch.channels_last)
    assert model[0](inputs).is_contiguous(memory_format=torch.channels_last)
    check(model, inputs, rows=rows)


@pytest.mark.parametrize("positions", [1, 255, 1000])
@pytest.mark.parametrize("orders", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_of_a_group_norm_are_alike_in_either_memory_order(
    monkeypatch: pytest.MonkeyPatch, positions: int, orders: tuple[bool, bool], threads: int
) -> None:
    for least in ("THREAD_BYTES", "SHARED_BYTES"):
        monkeypatch.setattr(f"retrac_scale.native.threads.{least}", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, grad = (torch.randn(3, 10, positions, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    given = [one.mT.contiguous().mT if last else one for one, last in zip((x, grad), orders, strict=True)]
    product, total = _sums(*given)
    torch.testing.assert_close(product.double(), (x.double() * grad.double()).sum(2), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total.double(), grad.double().sum(2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("positions", [1, 37])
@pytest.mark.parametrize("orders", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_backward_pass_through_a_group_norm_is_autograds_and_tells_its_sums(
    monkeypatch: pytest.MonkeyPatch, positions: int, orders: tuple[bool, bool], threads: int
) -> None:
    for least in ("THREAD_BYTES", "SHARED_BYTES"):
        monkeypatch.setattr(f"retrac_scale.native.threads.{least}", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = nn.GroupNorm(2, 6).requires_grad_(False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
    given = (torch.randn(3, 6, positions, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x, grad = (one.mT.contiguous().mT if last else one for one, last in zip(given, orders, strict=True))
    x.requires_grad_()
    told: list[Tensor] = []
    through = _watched(layer, x, layer(x), lambda *tensors: told.extend(tensors))
    through.mul_(2)  # as a model may
    torch.autograd.backward(through, grad)
    reference = x.detach().double().requires_grad_()
    torch.autograd.backward(2 * copy.deepcopy(layer).double()(reference), grad.double())
    assert x.grad is not None
    assert reference.grad is not None
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
    doubled = 2 * grad.double()
    torch.testing.assert_close(told[0].double(), doubled)
    torch.testing.assert_close(told[3].double(), (doubled * x.double()).sum(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told[4].double(), doubled.sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_of_a_batch_stays_in_memory(bf16: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    sketcher, before = rs.GradientSketcher(model, rs.CountSketch(64)), calls_in_memory()
    with sketcher, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sketcher(model(torch.randn(2, 3, 8, 8)).float().square().flatten(1).mean(1))
    assert calls_in_memory() <= before


def calls_in_memory() -> int:
    """How many calls of layers are kept track of, by anything."""
    gc.collect()
    return sum(type(one) is Call for one in gc.get_objects())


def test_a_group_norm_that_is_trained_keeps_autograds_backward_pass() -> None:
    layer, x = nn.GroupNorm(2, 6), torch.randn(3, 6, 5, requires_grad=True)
    output = layer(x)
    assert _watched(layer, x, output, lambda *tensors: None) is output


def test_mixed_gradients_of_channels_last_activations_are_those_of_contiguous_ones() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(4, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.Conv2d(64, 64, 3, padding=1))
    inputs = torch.randn(3, 4, 6, 6)
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        with rs.GradientSketcher(model, rs.LowRank(4, 256)) as sketcher:
            outputs = model(inputs.to(memory_format=memory_format))
            assert outputs.is_contiguous(memory_format=memory_format)
            found.append(sketcher(outputs.sin().square().flatten(1).mean(1))[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Listed(nn.Module):
    """Computes with parameters in containers that have no forward, beside a layer that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.tables = nn.ParameterList([nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))])
        self.nested = nn.ModuleDict({"inner": nn.ParameterDict({"scale": nn.Parameter(torch.randn(4))})})

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) @ self.tables[0] + self.tables[1]) * self.nested["inner"]["scale"]  # type: ignore[index,no-any-return]


ADAPTERS: dict[str, Any] = {
    "LoKr": peft.LoKrConfig(r=2, target_modules=["1", "3"], decompose_factor=2, init_weights=False),
    "LoHa": peft.LoHaConfig(r=2, target_modules=["1", "3"], init_weights=False),
    "HRA": peft.HRAConfig(r=2, target_modules=["1", "3"], init_weights=False),
    "VeRA": peft.VeraConfig(r=4, target_modules=["3"], d_initial=0.5),
    "DoRA": peft.LoraConfig(r=2, use_dora=True, target_modules=["1", "3"], init_lora_weights=False),
    "rank pattern": peft.LoraConfig(
        r=2, rank_pattern={"1": 4}, alpha_pattern={"3": 32}, target_modules=["1", "3"], init_lora_weights=False
    ),
}


@pytest.mark.parametrize("kind", [*ADAPTERS, "two active"])
def test_adapters_of_every_kind_equal_autograd(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 8, 3), nn.Flatten(2), nn.Linear(4, 8), nn.Linear(8, 2))
    adapted: Any = peft.get_peft_model(model, ADAPTERS.get(kind, ADAPTERS["rank pattern"]))
    if kind == "two active":
        adapted.add_adapter("other", peft.LoraConfig(r=1, target_modules=["3"], init_lora_weights=False))
        adapted.base_model.set_adapter(["default", "other"])
    check(adapted, torch.randn(3, 2, 6, 6))


def test_parameters_in_containers_without_a_forward_equal_autograd() -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(3, 4), Listed(), nn.Linear(4, 2)), torch.randn(3, 5, 3))
