"""causal_attention: the rule in all its forms, shared heads, queries at the end, the future by NaN."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_rules import ODD_SIZES, assert_exact, assert_obeys_rule, results
from torch import Tensor

from workbench_kernels.causal_attention import causal_attention, flash, reference, visible


def make(
    queries: int, keys: int, dtype: torch.dtype, *, heads: int = 4, groups: int = 4, width: int = 12, value: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, queries, heads, width), (2, keys, groups, width), (2, keys, groups, value)
    query, key, values = (torch.randn(shape).to(dtype) for shape in shapes)
    return query, key, values


def scaled(op):
    return lambda query, key, value: op(query, key, value, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*ODD_SIZES, 64])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_obeys_the_rule(size: int, groups: int, dtype: torch.dtype) -> None:
    assert_obeys_rule(scaled(causal_attention), scaled(reference), make(size, size, dtype, groups=groups))


@pytest.mark.parametrize(("queries", "keys"), [(1, 60), (60, 129), (65, 66)])
@pytest.mark.parametrize(("width", "value"), [(1, 1), (5, 16)])
def test_obeys_the_rule_when_queries_are_the_last_positions(queries: int, keys: int, width: int, value: int) -> None:
    inputs = make(queries, keys, torch.float32, width=width, value=value)
    assert_obeys_rule(scaled(causal_attention), scaled(reference), inputs)


@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (7, 70)])
@pytest.mark.parametrize(("width", "value"), [(12, 8), (8, 12)])
def test_the_form_for_long_texts_agrees(queries: int, keys: int, width: int, value: int) -> None:
    inputs = make(queries, keys, torch.float64, groups=2, width=width, value=value)
    grad = torch.randn(2, queries, 4, value, dtype=torch.float64)
    for ours, theirs in zip(
        results(scaled(flash), inputs, grad), results(scaled(reference), inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_long_texts_take_the_form_without_a_square_matrix() -> None:
    inputs = make(1030, 1030, torch.float32, heads=1, groups=1, width=4, value=4)
    inputs[0].requires_grad_()
    torch.testing.assert_close(causal_attention(*inputs, 0.3), flash(*inputs, 0.3), rtol=0, atol=0)
    torch.testing.assert_close(causal_attention(*inputs, 0.3), reference(*inputs, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1030, 1030), (1, 1500), (130, 1100)])
def test_long_texts_without_gradients_obey_the_rule(queries: int, keys: int, dtype: torch.dtype) -> None:
    inputs = make(queries, keys, dtype, groups=2, width=5, value=3)
    query, key, values = (x.double() for x in inputs)
    truth = reference(query, key, values, 0.3)
    assert_exact("output", causal_attention(*inputs, 0.3), reference(*inputs, 0.3), truth)


def test_a_case_by_hand() -> None:
    query = torch.full((1, 2, 1, 1), math.log(3.0))
    key = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    value = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(causal_attention(query, key, value, 1.0).flatten(), torch.tensor([2.0, 5.0]))


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (129, 129), (1, 60), (65, 130)])
@pytest.mark.parametrize("window", [1, 7, 64, 500, None])
def test_obeys_the_rule_with_a_window_and_sinks(
    queries: int, keys: int, window: int | None, dtype: torch.dtype
) -> None:
    def op(kind, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        return kind(query, key, value, 0.3, window=window, sinks=sinks)

    inputs = (*make(queries, keys, dtype, groups=2), SINKS.to(dtype))
    assert_obeys_rule(lambda *t: op(causal_attention, *t), lambda *t: op(reference, *t), inputs)


def test_a_window_as_long_as_the_text_hides_nothing() -> None:
    inputs = make(100, 100, torch.float64)
    torch.testing.assert_close(causal_attention(*inputs, 0.3, window=100), reference(*inputs, 0.3))
    torch.testing.assert_close(
        causal_attention(*inputs, 0.3, sinks=torch.full((4,), -torch.inf)), reference(*inputs, 0.3)
    )


def test_what_left_the_window_is_never_read() -> None:
    query, key, value = make(100, 100, torch.float32)
    before = causal_attention(query, key, value, 0.3, window=5)
    key[:, :80], value[:, :80] = 1e30, 1e30
    after = causal_attention(query, key, value, 0.3, window=5)
    assert torch.equal(after[:, 84:], before[:, 84:])
    assert (after[:, 83] != before[:, 83]).all()


def test_who_sees_whom() -> None:
    seen = visible(2, 4, torch.device("cpu"), window=2)
    assert seen.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(2, 4, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_sink_by_hand() -> None:
    """Two keys with logits 0 and ln 2 and a sink of ln 5: weights 1/8, 2/8, and 5/8 for nothing."""
    query = torch.full((1, 2, 1, 1), math.log(2.0))
    key, value = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), torch.tensor([8.0, 16.0]).view(1, 2, 1, 1)
    mixed = causal_attention(query, key, value, 1.0, sinks=torch.tensor([math.log(5.0)]))
    torch.testing.assert_close(mixed.flatten(), torch.tensor([8 / 6, 8 / 8 + 16 * 2 / 8]))


def test_the_future_is_never_read() -> None:
    query, key, value = make(100, 100, torch.float32)
    before = causal_attention(query, key, value, 0.3)
    key[:, 80:], value[:, 80:] = 1e30, 1e30
    torch.testing.assert_close(causal_attention(query, key, value, 0.3)[:, :80], before[:, :80], rtol=0, atol=0)


def test_gradcheck_and_opcheck() -> None:
    inputs = [x.requires_grad_() for x in make(5, 7, torch.float64, heads=2, groups=1, width=3, value=2)]
    assert torch.autograd.gradcheck(scaled(causal_attention), inputs)
    torch.library.opcheck(torch.ops.workbench_kernels.causal_attention.default, (*inputs, 0.3))


def test_compiles_in_one_graph() -> None:
    inputs = make(9, 9, torch.float32)
    compiled = torch.compile(scaled(causal_attention), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), causal_attention(*inputs, 0.3), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "must have 4 axes each"),
        (lambda q, k, v: (q, k[..., :3], v), r"must be \[B, T, H, K\]"),
        (lambda q, k, v: (q, k[:, :, :3], v[:, :, :3]), "with G a divisor of H"),
        (lambda q, k, v: (q, k[:, :4], v[:, :4]), "5 queries are more than 4 keys"),
        (lambda q, k, v: (q, k, v.double()), "must have one floating dtype"),
    ],
)
def test_bad_input_gets_one_line(change, message: str) -> None:
    query, key, value = change(*make(5, 5, torch.float32))
    with pytest.raises(ValueError, match=message) as caught:
        causal_attention(query, key, value, 0.3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sinks": torch.zeros(3)}, r"sinks \(torch.float32 \[3\]\) must be \[4\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, "of a floating dtype"),
    ],
)
def test_bad_options_get_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_attention(*make(5, 5, torch.float32), 0.3, **options)


@pytest.mark.parametrize("gradients", [False, True])
def test_an_infinite_later_key_reaches_no_earlier_output(gradients: bool) -> None:
    query, key, value = (torch.randn(1, 5, 2, 4) for _ in range(3))
    key[:, 4] = torch.inf
    query = query.abs().requires_grad_(gradients)
    expected = reference(query, key, value, 0.5)[:, :4]
    assert expected.isfinite().all()
    torch.testing.assert_close(causal_attention(query, key, value, 0.5)[:, :4], expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_products_beyond_float16_do_not_overflow(gradients: bool) -> None:
    query, key = (torch.full((1, 4, 1, 64), 40.0, dtype=torch.float16) for _ in range(2))
    value = torch.randn(1, 4, 1, 8).half()
    found = causal_attention(query.requires_grad_(gradients), key, value, 0.125)
    torch.testing.assert_close(found[:, -1], value.float().mean(1).half(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"sinks": True}])
@pytest.mark.parametrize("shape", [(1, 0, 2, 4), (0, 3, 2, 4), (1, 3, 0, 4)])
def test_empty_axes(shape: tuple[int, ...], options: dict) -> None:
    options = {**options, "sinks": torch.ones(shape[2])} if "sinks" in options else options
    query = torch.ones(shape, requires_grad=True)
    found = causal_attention(query, torch.ones(shape[0], 3, 1, 4), torch.ones(shape[0], 3, 1, 5), 1.0, **options)
    assert found.shape == (*shape[:3], 5)
    found.sum().backward()


def test_compiles_once_for_all_lengths() -> None:
    attend = torch.compile(causal_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (5, 64, 70, 129, 200):
            query, key, value = (torch.randn(1, length, 2, 4, requires_grad=True) for _ in range(3))
            torch.testing.assert_close(attend(query, key, value, 0.5), causal_attention(query, key, value, 0.5))
