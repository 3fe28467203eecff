"""mla_attention on the CPU: the rule with every option, cases by hand, documents, the future; no twin here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from kernel_rules import assert_obeys_rule, results
from torch import Tensor

from workbench_kernels import mla_attention
from workbench_kernels.mla_attention import MAX_WIDTHS, fits_twin, forward, reference
from workbench_kernels.tier import resolve


def make(
    queries: int, keys: int, dtype: torch.dtype, *, sequences: int = 2, heads: int = 8, sinks: bool = False
) -> list[Tensor]:
    """Heads of widths K=5, R=2 and U=7."""
    torch.manual_seed(0)
    of_query, of_key = (sequences, queries, heads), (sequences, keys, heads)
    shapes = [(*of_query, 5), (*of_query, 2), (*of_key, 5), (sequences, keys, 2), (*of_key, 7)]
    return [torch.randn(shape).to(dtype) for shape in (*shapes, *([(heads,)] if sinks else []))]


def op(kind: Callable[..., Tensor], window: int | None = None, ends: list[int] | None = None) -> Callable[..., Tensor]:
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)

    def attend(*tensors: Tensor) -> Tensor:
        sinks = tensors[5] if len(tensors) == 6 else None
        return kind(*tensors[:5], 0.3, cu_seqlens=cu_seqlens, window=window, sinks=sinks)

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (60, 60), (129, 129), (1, 60), (60, 129), (0, 3), (0, 0)])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("sinks", [False, True])
def test_obeys_the_rule(queries: int, keys: int, window: int | None, sinks: bool, dtype: torch.dtype) -> None:
    inputs = make(queries, keys, dtype, sinks=sinks)
    assert_obeys_rule(op(mla_attention, window), op(reference, window), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [[0], [0, 129], [0, 0, 1, 60, 60, 129], [0, 70, 100]])
@pytest.mark.parametrize("window", [None, 7])
def test_documents_obey_the_rule(ends: list[int], window: int | None, dtype: torch.dtype) -> None:
    inputs = make(129, 129, dtype, sequences=1, sinks=True)
    assert_obeys_rule(op(mla_attention, window, ends), op(reference, window, ends), inputs)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"ends": [0, 70, 129]}])
def test_peaked_weights_obey_the_rule(options: dict) -> None:
    """Logits that lie tens apart: weights made from the logarithm of their sum would be off by several roundings."""
    inputs = make(129, 129, torch.float32, sequences=1)
    inputs = [*(x * 3 for x in inputs[:4]), inputs[4]]
    assert_obeys_rule(op(mla_attention, **options), op(reference, **options), inputs)


@pytest.mark.parametrize("options", [{"window": 3}, {"ends": [0, 1]}])
@pytest.mark.parametrize("sinks", [False, True])
def test_one_query_of_one_head(options: dict, sinks: bool) -> None:
    inputs = make(1, 1, torch.float32, sequences=1, heads=1, sinks=sinks)
    assert_obeys_rule(op(mla_attention, **options), op(reference, **options), inputs)


def test_a_sink_beyond_all_logits_where_documents_do_not_cover_all() -> None:
    inputs = make(4, 4, torch.float32, sequences=1, sinks=True)
    inputs[5].fill_(100.0)
    assert_obeys_rule(op(mla_attention, ends=[0, 2]), op(reference, ends=[0, 2]), inputs)


def test_no_sequences() -> None:
    assert_obeys_rule(op(mla_attention), op(reference), make(4, 6, torch.float32, sequences=0))
    assert_obeys_rule(op(mla_attention, 2), op(reference, 2), make(4, 6, torch.float32, sequences=0, sinks=True))


@pytest.mark.parametrize("kind", [mla_attention, reference])
def test_what_no_document_owns_is_never_read(kind: Callable[..., Tensor]) -> None:
    """NaN at positions beyond the last document, in the inputs and in the gradient that comes back."""
    inputs, grad = make(9, 9, torch.float64, sequences=1, sinks=True), torch.randn(1, 9, 8, 7, dtype=torch.float64)
    expected = results(op(reference, 2, [0, 4]), [*(x[:, :4] for x in inputs[:5]), inputs[5]], grad[:, :4])
    for x in (*inputs[:5], grad):
        x[:, 4:] = torch.nan
    found = results(op(kind, 2, [0, 4]), inputs, grad)
    for ours, theirs in zip(found[:6], expected, strict=False):
        torch.testing.assert_close(ours[:, :4], theirs)
        assert (ours[:, 4:] == 0).all()
    torch.testing.assert_close(found[6], expected[6])


def test_documents_are_sequences_without_padding() -> None:
    inputs = make(90, 90, torch.float64, sequences=1, sinks=True)
    packed = op(mla_attention, None, [0, 70, 70, 90])(*inputs)
    for first, last in ((0, 70), (70, 90)):
        alone = op(mla_attention)(*(x[:, first:last] for x in inputs[:5]), inputs[5])
        torch.testing.assert_close(packed[:, first:last], alone)


@pytest.mark.parametrize("options", [{}, {"window": 30}, {"ends": [0, 40, 100]}])
def test_a_later_token_leaves_earlier_outputs_as_they_were(options: dict) -> None:
    inputs = make(100, 100, torch.float32, sequences=1)
    before = op(mla_attention, **options)(*inputs)
    for x in inputs:
        x[:, 80:] = 1e30
    torch.testing.assert_close(op(mla_attention, **options)(*inputs)[:, :80], before[:, :80], rtol=0, atol=0)


def test_a_case_by_hand() -> None:
    """Two keys: content gives logits of 0 and ln 2, position adds ln 2 to the second, and a sink has ln 3."""
    one = torch.ones(1, 2, 1, 1)
    k_nope, k_rope = torch.tensor([0.0, math.log(2.0)]).view(1, 2, 1, 1), torch.tensor([0.0, math.log(2.0)])
    value = torch.tensor([8.0, 16.0]).view(1, 2, 1, 1)
    arguments = one, one, k_nope, k_rope.view(1, 2, 1), value, 1.0
    torch.testing.assert_close(mla_attention(*arguments).flatten(), torch.tensor([8.0, (8 + 16 * 4) / 5]))
    sinks = torch.tensor([math.log(3.0)])
    mixed = mla_attention(*arguments, sinks=sinks).flatten()
    torch.testing.assert_close(mixed, torch.tensor([8 / 4, (8 + 16 * 4) / 8]))


def test_a_sink_of_no_weight_and_a_window_as_long_as_the_text_change_nothing() -> None:
    inputs = make(100, 100, torch.float64)
    none = torch.full((8,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(op(mla_attention, 100)(*inputs, none), op(reference)(*inputs))


def test_long_texts_agree_with_the_definition() -> None:
    inputs = make(1030, 1030, torch.float32, sequences=1, heads=1)
    torch.testing.assert_close(op(mla_attention)(*inputs), op(reference)(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"ends": [0, 2, 2, 4]}])
def test_gradients_by_finite_differences(options: dict) -> None:
    inputs = make(5, 5, torch.float64, sequences=1, heads=2, sinks="window" in options)
    assert torch.autograd.gradcheck(op(mla_attention, **options), [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("ends", [None, [0, 4]])
def test_op_is_registered_correctly(sinks: bool, ends: list[int] | None) -> None:
    inputs = [x.requires_grad_() for x in make(6, 6, torch.float32, sequences=1, sinks=sinks)]
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    arguments = (*inputs[:5], inputs[5] if sinks else None, cu_seqlens, 0.3, 3, False)
    torch.library.opcheck(torch.ops.workbench_kernels.mla_attention.default, arguments)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"ends": [0, 2, 5]}])
def test_compiles_as_one_graph(options: dict) -> None:
    inputs, attend = make(6, 6, torch.float32, sequences=1), op(mla_attention, **options)
    grad = torch.randn(1, 6, 8, 7)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, inputs, grad), results(attend, inputs, grad), rtol=0, atol=0)


def test_the_form_with_options_is_that_without() -> None:
    q_nope, q_rope, k_nope, k_rope, value = inputs = make(70, 75, torch.float64)
    blocks = forward(q_nope, q_rope, k_nope, k_rope, value, None, None, 0.3, None)[0]
    torch.testing.assert_close(blocks, op(mla_attention)(*inputs))


GOOD = dict(zip(("q_nope", "q_rope", "k_nope", "k_rope", "value"), make(5, 5, torch.float32, sequences=1), strict=True))
ENDS = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_nope": GOOD["q_nope"][0]}, "must have 4 axes each, k_rope 3"),
        ({"k_nope": GOOD["k_nope"][..., :4]}, r"must be \[B, T, H, K\]"),
        ({"k_rope": GOOD["k_rope"][..., :1]}, r"\[B, S, R\]"),
        ({"value": GOOD["value"][..., :0]}, "with H, K, R, U > 0"),
        ({"value": GOOD["value"].double()}, "must have one floating dtype"),
        ({name: GOOD[name][:, :4] for name in ("k_nope", "k_rope", "value")}, "5 queries are more than 4 keys"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sinks": torch.zeros(2)}, r"must be \[8\], of a floating dtype"),
        ({"cu_seqlens": ENDS.long()}, r"must be int32 \[documents \+ 1\]"),
        ({"cu_seqlens": ENDS + 1}, "must begin at 0"),
        ({"cu_seqlens": ENDS * 2}, "end within 5 positions"),
        ({"cu_seqlens": torch.tensor([0, 4, 3], dtype=torch.int32)}, "not decrease"),
        (
            {"cu_seqlens": ENDS, "q_nope": GOOD["q_nope"][:, :4], "q_rope": GOOD["q_rope"][:, :4]},
            "divides one sequence",
        ),
        ({"impl": "triton"}, "'auto', 'reference' or 'fused'"),
        ({"impl": "fused"}, "only with TRITON_INTERPRET=1"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mla_attention(**{**GOOD, "softmax_scale": 0.3, **change})
    assert "\n" not in str(caught.value)


def test_auto_on_a_gpu_takes_the_twin_for_heads_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench_kernels.tier.find_spec", lambda name: object())
    wide = MAX_WIDTHS
    for widths, dtype, tier in (
        (wide, torch.bfloat16, "fused"),
        (wide, torch.float32, "reference"),
        ((128, 64, 128), torch.float32, "fused"),
        ((*wide[:2], wide[2] + 1), torch.bfloat16, "reference"),
    ):
        assert resolve("mla_attention", "auto", torch.device("cuda"), dtype, fits=fits_twin(*widths, dtype)) == tier


def test_every_head_that_fits_has_a_tile() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from workbench_kernels.fused.mla_attention import launches_for, widths_for

    for dtype in (torch.float32, torch.bfloat16):
        for widths in ((1, 1, 1), (33, 16, 32), (64, 64, 64), (128, 64, 128), (192, 64, 256)):
            if fits_twin(*widths, dtype):
                held = widths_for(*widths)
                assert all(width <= most for width, most in zip(widths, held, strict=True))
                for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
                    assert len(launches_for(held, architecture, dtype.itemsize)) == 3


@pytest.mark.parametrize("options", [{}, {"window": 3}])
def test_compiles_for_every_length(options: dict) -> None:
    attend = torch.compile(mla_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 70):  # each its own graph, where blocks are cut by length
        query, rope, shared = torch.randn(1, length, 2, 8), torch.randn(1, length, 2, 4), torch.randn(1, length, 4)
        inputs = query, rope, query.flip(1), shared, query.flip(2)
        torch.testing.assert_close(attend(*inputs, 0.3, **options), mla_attention(*inputs, 0.3, **options))
