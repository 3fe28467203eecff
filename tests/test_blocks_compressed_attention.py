"""DeepSeek-V4's attention: equal to the reference, caches change nothing, the future stays unseen, ties are settled."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepseek_v4_reference import (
    largest_difference,
    reference,
    tiny_config,
    with_random_weights,
    with_weights_of,
)
from torch import Tensor

from workbench.blocks.compressed_attention import CompressedAttention, grouped_linear, sink_attention
from workbench.blocks.compressed_cache import CompressedCache
from workbench.blocks.compressed_indexer import SparseCompressor, chosen
from workbench.blocks.compressor import HeavyCompressor, closed
from workbench.blocks.rope import Rotation, frequencies, rotation

CPU = torch.device("cpu")
WIDTH, HEADS, HEAD, ROTARY, RATIOS = 20, 6, 10, 4, {"window": None, "heavy": 5, "sparse": 3}
KINDS = {
    "window": "sliding_attention",
    "heavy": "heavily_compressed_attention",
    "sparse": "compressed_sparse_attention",
}


def turn(kind: str, length: int, dtype: torch.dtype = torch.float64, *, first: int = 0) -> Rotation:
    theta = 100.0 if kind == "window" else 900.0
    return rotation(torch.arange(first, first + length), frequencies(ROTARY, theta, dtype=dtype, device=CPU))


def empty_block(kind: str, *, window: int = 7, topk: int = 2, index_heads: int = 12) -> CompressedAttention:
    compressor: HeavyCompressor | SparseCompressor | None = None
    if kind == "heavy":
        compressor = HeavyCompressor(WIDTH, HEAD, compress_ratio=5, eps=1e-6)
    if kind == "sparse":
        compressor = SparseCompressor(
            WIDTH,
            HEAD,
            q_lora_rank=9,
            compress_ratio=3,
            index_n_heads=index_heads,
            index_head_dim=7,
            index_topk=topk,
            eps=1e-6,
        )
    return CompressedAttention(
        WIDTH,
        HEADS,
        head_dim=HEAD,
        q_lora_rank=9,
        o_groups=3,
        o_lora_rank=5,
        sliding_window=window,
        softmax_scale=HEAD**-0.5,
        compressor=compressor,
        eps=1e-6,
    )


def block(kind: str, **changes: int) -> CompressedAttention:
    ours = empty_block(kind, **changes)
    with_random_weights(ours, torch.float64)
    return ours


def new_cache(kind: str, length: int, *, window: int = 7, dtype: torch.dtype = torch.float64) -> CompressedCache:
    return CompressedCache(
        2,
        length,
        head_dim=HEAD,
        qk_rope_head_dim=ROTARY,
        sliding_window=window,
        compress_ratio=RATIOS[kind],
        index_head_dim=7 if kind == "sparse" else None,
        dtype=dtype,
        device=CPU,
    )


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


def in_pieces(ours: CompressedAttention, kind: str, x: Tensor, pieces: list[int], cache: CompressedCache) -> Tensor:
    outputs, first = [], 0
    with torch.no_grad():
        for length in pieces:
            outputs.append(ours(x[:, first : first + length], turn(kind, length, first=first), cache))
            first += length
    assert first == x.shape[1] == cache.length
    return torch.cat(outputs, dim=1)


def reference_output(theirs: Any, kind: str, x: Tensor) -> Tensor:
    length = x.shape[1]
    position = torch.arange(length)
    age = position[:, None] - position
    mask = torch.zeros(2, 1, length, length, dtype=x.dtype).masked_fill((age < 0) | (age >= 7), -torch.inf)
    own = turn(kind, length, x.dtype)
    turns = {name: tuple(part[None] for part in own) for name in ("main", "compress")}
    return theirs(x, turns, position.expand(2, -1), mask)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 9, 15, 41])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_output_and_gradients_equal_the_reference(kind: str, length: int, dtype: torch.dtype, allowed: float) -> None:
    """With index scores that have no ties: `transformers` breaks those as `torch.topk` happens to, we by index."""
    theirs = with_random_weights(reference(dtype).DeepseekV4Attention(tiny_config(KINDS[kind]), 0), dtype).eval()
    ours = with_weights_of(empty_block(kind), theirs, dtype)
    assert isinstance(ours, CompressedAttention)
    x = tokens(length, dtype)
    if isinstance(ours.compressor, SparseCompressor):
        read = ours.entries(x, ours.q_a_norm(ours.q_a_proj(x)), turn(kind, length, dtype))
        assert read is not None and read.scores is not None
        ties = read.scores.unsqueeze(-1) == read.scores.unsqueeze(-2)
        assert ties.sum() == read.scores.numel(), "the case has ties"
    mine, peer = ours(x, turn(kind, length, dtype)), reference_output(theirs, kind, x)
    assert mine.dtype == peer.dtype == dtype
    differences = {"output": largest_difference(mine, peer)}
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    for output in (mine, peer):
        (output * weights).sum().backward()
    peer_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "indexer" in name:
            assert parameter.grad is None and peer_parameters[name].grad is None, "the choice passes no gradient"
            continue
        # Before the first entry the reference leaves out what we sum over nothing.
        assert parameter.grad is not None
        grad = peer_parameters[name].grad
        differences[name] = largest_difference(parameter.grad, torch.zeros_like(parameter) if grad is None else grad)
    assert max(differences.values()) <= allowed, differences


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_index_scores_equal_the_reference(dtype: torch.dtype, allowed: float) -> None:
    theirs = with_random_weights(reference(dtype).DeepseekV4Attention(tiny_config(KINDS["sparse"]), 0), dtype).eval()
    ours = with_weights_of(empty_block("sparse"), theirs, dtype)
    assert isinstance(ours, CompressedAttention)
    x, scores = tokens(41, dtype), []
    theirs.get_submodule("compressor.indexer.scorer").register_forward_hook(lambda *call: scores.append(call[2]))
    reference_output(theirs, "sparse", x)
    read = ours.entries(x, ours.q_a_norm(ours.q_a_proj(x)), turn("sparse", 41, dtype))
    assert read is not None and read.scores is not None and read.scores.shape == (2, 41, 13)
    assert largest_difference(read.scores, scores[0]) <= allowed


def test_sixteen_bit_attention_has_float32_statistics() -> None:
    """Two of 500 keys have the logit -9.9, which bfloat16 rounds to -9.875: their weights would be off by 2.5 %."""
    key = torch.zeros(1, 500, 2, dtype=torch.bfloat16)
    key[:, :2, 0] = 1
    query = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    query[..., 0] = -9
    read = torch.ones(1, 1, 500, dtype=torch.bool)
    sinks = torch.full((1,), 1.3, dtype=torch.bfloat16)
    mixed = sink_attention(query, key, read, sinks, scale=1.1)
    expected = sink_attention(query.double(), key.double(), read, sinks.double(), scale=1.1)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[23], [1] * 23, [4, 1, 11, 2, 1, 4], [9, 9, 5], [2, 3, 1, 17]])
def test_cached_equals_full(kind: str, pieces: list[int]) -> None:
    ours, x = block(kind), tokens(23)
    pieced = in_pieces(ours, kind, x, pieces, new_cache(kind, 24))
    torch.testing.assert_close(pieced, ours(x, turn(kind, 23)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 2, 30])
def test_cached_equals_full_for_any_window(kind: str, window: int) -> None:
    ours, x = block(kind, window=window), tokens(23)
    pieced = in_pieces(ours, kind, x, [6, 1, 1, 9, 6], new_cache(kind, 23, window=window))
    torch.testing.assert_close(pieced, ours(x, turn(kind, 23)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_cache_rounds_alike_in_pieces_of_any_length(kind: str) -> None:
    ours, x = block(kind), tokens(23)
    whole = in_pieces(ours, kind, x, [23], new_cache(kind, 23, dtype=torch.float32))
    pieced = in_pieces(ours, kind, x, [4, 1, 11, 2, 1, 4], new_cache(kind, 23, dtype=torch.float32))
    torch.testing.assert_close(pieced, whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(whole, ours(x, turn(kind, 23)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", [0, 5, 14, 22])
def test_changing_a_token_leaves_earlier_outputs(kind: str, changed: int) -> None:
    ours, x = block(kind), tokens(23)
    other = x.clone()
    other[:, changed] += 1
    before, after = ours(x, turn(kind, 23)), ours(other, turn(kind, 23))
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=0, atol=0)
    assert not torch.allclose(before[:, changed], after[:, changed])


@pytest.mark.parametrize(("kind", "reach"), [("window", 7), ("heavy", 23), ("sparse", 23)])
def test_how_far_back_a_query_sees(kind: str, reach: int) -> None:
    """With more entries allowed than there are, the compressed kinds see every token; the window alone only its own."""
    ours, x = block(kind, topk=99), tokens(23).requires_grad_()
    ours(x, turn(kind, 23))[:, -1].sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 2)) > 0
    assert seen.tolist() == [t >= 23 - reach for t in range(23)]


@pytest.mark.parametrize("kind", KINDS)
def test_only_distances_matter(kind: str) -> None:
    """Keys carry their position into the output as values; turning back makes it a distance."""
    ours, x = block(kind), tokens(23)
    shifted = ours(x, turn(kind, 23, first=1000))
    torch.testing.assert_close(shifted, ours(x, turn(kind, 23)), rtol=1e-10, atol=1e-10)
    still = Rotation(*(torch.full_like(part, value) for part, value in zip(turn(kind, 23), (1.0, 0.0), strict=True)))
    assert not torch.allclose(ours(x, still), shifted)


def test_ties_go_to_the_lowest_index_among_closed_entries() -> None:
    scores = torch.tensor([[[0.0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 9], [-1, -2, 0, 0, 0, 0], [3, 3, 3, 3, 3, 4]]])
    # The queries at positions 5, 14, 8 and 0 with ratio 3.
    first_closed = torch.tensor([2, 5, 3, 0])[:, None] > torch.arange(6)
    read = chosen(scores, first_closed, 3)
    assert [row.nonzero().flatten().tolist() for row in read[0]] == [[0, 1], [0, 1, 3], [0, 1, 2], []]
    many = torch.zeros(1, 1, 5000)
    everything = torch.ones(1, 5000, dtype=torch.bool)
    assert chosen(many, everything, 7)[0, 0].nonzero().flatten().tolist() == list(range(7))


def test_ties_leave_cached_and_full_equal() -> None:
    """One index head: relu makes half of all scores exactly 0."""
    ours, x = block("sparse", index_heads=1), tokens(47)
    read = ours.entries(x, ours.q_a_norm(ours.q_a_proj(x)), turn("sparse", 47))
    assert read is not None and read.scores is not None
    assert (read.scores == 0).float().mean() > 0.3
    pieced = in_pieces(ours, "sparse", x, [4, 1, 25, 1, 1, 15], new_cache("sparse", 47))
    torch.testing.assert_close(pieced, ours(x, turn("sparse", 47)), rtol=1e-12, atol=1e-12)


def test_an_entry_is_visible_once_its_window_has_closed() -> None:
    assert closed(0, 7, 2, 3, CPU).int().tolist() == [[0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
    assert closed(4, 2, 2, 3, CPU).int().tolist() == [[1, 0], [1, 1]]


def test_a_sink_takes_weight_and_gives_nothing() -> None:
    """Two keys with logits 0 and ln 2 (the third is not read) and a sink of ln 5: weights 1/8, 2/8 and 5/8."""
    query = torch.tensor([[[[math.log(2.0) / 0.5, 0.0]]]])
    key = torch.tensor([[[0.0, 8.0], [1.0, 16.0], [9.0, 9.0]]])
    read = torch.tensor([[[True, True, False]]])
    mixed = sink_attention(query, key, read, torch.tensor([math.log(5.0)]), scale=0.5)
    torch.testing.assert_close(mixed, torch.tensor([[[[2 / 8, 8 / 8 + 16 * 2 / 8]]]]))


def test_pooling_without_overlap_by_hand() -> None:
    """Gates and biases that make the weights 1/4 and 3/4; the fifth token waits for a sixth."""
    compressor = HeavyCompressor(1, 1, compress_ratio=2, eps=0.0)
    with torch.no_grad():
        compressor.kv_proj.weight.fill_(1)
        compressor.gate_proj.weight.fill_(0)
        compressor.position_bias.copy_(torch.tensor([[0.0], [math.log(3.0)]]))
        compressor.kv_norm.weight.fill_(1)
        raw = pooled_values(compressor, torch.tensor([1.0, 5.0, 2.0, -6.0, 100.0]))
    torch.testing.assert_close(raw, torch.tensor([1 / 4 + 5 * 3 / 4, 2 / 4 - 6 * 3 / 4]))


def test_pooling_with_overlap_by_hand() -> None:
    """Equal gates: an entry is the mean of the window's second series and the first series of the window before."""
    compressor = empty_sparse()
    with torch.no_grad():
        compressor.kv_proj.weight.copy_(torch.tensor([[10.0], [1.0]]))
        compressor.gate_proj.weight.fill_(0)
        compressor.position_bias.fill_(0)
        raw = pooled_values(compressor, torch.tensor([1.0, 5.0, 2.0, -6.0, 3.0, 4.0, 100.0]))
    expected = torch.tensor([(1 + 5) / 2, (10 + 50 + 2 - 6) / 4, (20 - 60 + 3 + 4) / 4])
    torch.testing.assert_close(raw, expected)


def empty_sparse() -> SparseCompressor:
    return SparseCompressor(
        1, 1, q_lora_rank=1, compress_ratio=2, index_n_heads=1, index_head_dim=1, index_topk=1, eps=0.0
    )


def pooled_values(compressor: HeavyCompressor | SparseCompressor, x: Tensor) -> Tensor:
    """The entries of one sequence of one-wide tokens before their norm, which would leave only signs."""
    kept: list[Tensor] = []
    compressor.kv_norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        compressor.kv_norm.weight.fill_(1)
    none = torch.zeros(x.shape[0], 0)
    compressor.pool(x[None, :, None], Rotation(none, none), None)
    return kept[0].flatten()


def test_each_group_is_projected_by_its_own_block() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    projected = grouped_linear(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]]), weight, 2)
    assert projected.tolist() == [[[21.0, 4300.0]]]


def test_cache_bytes_are_measured() -> None:
    window, entries = 2 * 7 * 10, 50 // 5 * 2 * 10
    assert new_cache("window", 50).nbytes == window * 8
    assert new_cache("heavy", 50).nbytes == (window + entries + 2 * 2 * 4 * 10 + 4) * 8
    per_width = 2 * (50 // 3 + 2 * 2 * 2 + 2 * 3)
    assert new_cache("sparse", 50).nbytes == (window + per_width * (10 + 7) + 2 * 4) * 8
    assert new_cache("window", 4).nbytes == 2 * 4 * 10 * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_refuses_and_keeps_what_it_has(kind: str) -> None:
    ours, x, cache = block(kind), tokens(12), new_cache(kind, 10)
    with torch.no_grad():
        ours(x[:, :8], turn(kind, 8), cache)
        with pytest.raises(ValueError, match="max_length=10 tokens; 8 are kept and 4 more came"):
            ours(x[:, 8:], turn(kind, 4, first=8), cache)
        with pytest.raises(ValueError, match="batch_size=2, not 1"):
            ours(x[:1, 8:9], turn(kind, 1, first=8), cache)
        rest = ours(x[:, 8:10], turn(kind, 2, first=8), cache)
    torch.testing.assert_close(rest, ours(x[:, :10], turn(kind, 10))[:, 8:], rtol=1e-12, atol=1e-12)


def test_impossible_sizes_are_refused() -> None:
    sizes = {"head_dim": 4, "q_lora_rank": 3, "o_lora_rank": 2, "sliding_window": 2}
    with pytest.raises(ValueError, match="o_groups=4 must divide num_attention_heads=6"):
        CompressedAttention(8, 6, o_groups=4, softmax_scale=1.0, compressor=None, eps=1e-6, **sizes)
    with pytest.raises(ValueError, match="compress_ratio=0"):
        HeavyCompressor(8, 4, compress_ratio=0, eps=1e-6)
    with pytest.raises(ValueError, match="index_topk=0"):
        SparseCompressor(
            8, 4, q_lora_rank=3, compress_ratio=2, index_n_heads=1, index_head_dim=4, index_topk=0, eps=1e-6
        )
    with pytest.raises(ValueError, match="index_head_dim=4 needs a compress_ratio"):
        CompressedCache(
            1,
            8,
            head_dim=4,
            qk_rope_head_dim=2,
            sliding_window=2,
            compress_ratio=None,
            index_head_dim=4,
            dtype=torch.float32,
            device=CPU,
        )
