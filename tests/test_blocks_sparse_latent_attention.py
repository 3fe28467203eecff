"""Sparse latent attention: equal to the reference, to its own other forms, and to plain attention where all is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from deepseek_v32_reference import reference_output, reference_with_weights_of

from workbench.blocks.indexer_loss import indexer_loss
from workbench.blocks.latent_attention import LatentAttention, LatentQuery
from workbench.blocks.lightning_indexer import as_mask
from workbench.blocks.rope import Rotation, rotate_interleaved, rotation
from workbench.blocks.sparse_latent_attention import (
    SparseAttention,
    SparseLatentAttention,
    SparseLatentCache,
    gathered_attention,
    masked_attention,
)
from workbench.model import attention_config as spec
from workbench.model.rotary import rotary_frequencies, rotation_scale, softmax_sharpening
from workbench_kernels.causal_attention import visible
from workbench_kernels.sparse_select import select

CPU = torch.device("cpu")
WIDTH = 45
PLAIN = spec.LatentAttention(
    num_attention_heads=3, q_lora_rank=19, kv_lora_rank=17, qk_nope_head_dim=14, qk_rope_head_dim=6, v_head_dim=11
)
YARN = spec.Yarn(factor=8.0, original_max_position_embeddings=24, mscale=1.0, mscale_all_dim=1.0)
STRETCHED = replace(PLAIN, rope=spec.Rope(rope_interleave=True, scaling=YARN))
UNEQUAL = replace(PLAIN, rope=spec.Rope(rope_interleave=True, scaling=replace(YARN, mscale=0.7, mscale_all_dim=1.3)))
# With many index heads no score is exactly 0, so that no two keys tie; with two heads every fourth is.
MANY, FEW = 13, 2


def latent_arguments(latent: spec.LatentAttention) -> dict[str, Any]:
    yarn = latent.rope.scaling
    assert yarn is None or isinstance(yarn, spec.Yarn)
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "softmax_scale": (latent.qk_nope_head_dim + latent.qk_rope_head_dim) ** -0.5 * softmax_sharpening(yarn),
        "rotate": rotate_interleaved,
    }


def make(
    latent: spec.LatentAttention = PLAIN,
    *,
    index_topk: int = 7,
    index_n_heads: int = MANY,
    dtype: torch.dtype = torch.float64,
) -> SparseLatentAttention:
    torch.manual_seed(3)
    block = SparseLatentAttention(
        WIDTH,
        latent.num_attention_heads,
        **latent_arguments(latent),
        index_n_heads=index_n_heads,
        index_head_dim=11,
        index_topk=index_topk,
    )
    for name, parameter in block.named_parameters():
        if "norm.weight" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


def turn(first: int, length: int, latent: spec.LatentAttention = PLAIN, dtype: torch.dtype = torch.float64) -> Rotation:
    yarn = latent.rope.scaling
    assert yarn is None or isinstance(yarn, spec.Yarn)
    angles = rotary_frequencies(latent, dtype, CPU)
    return rotation(torch.arange(first, first + length), angles, scale=rotation_scale(yarn))


def inputs(length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def new_cache(length: int, dtype: torch.dtype = torch.float64) -> SparseLatentCache:
    return SparseLatentCache(2, length, kv_lora_rank=17, qk_rope_head_dim=6, index_head_dim=11, dtype=dtype, device=CPU)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1))


def gap(output: SparseAttention) -> float:
    """How far the worst selected key's score lies above the best dropped one's, at the closest of all queries."""
    seen = visible(output.selected.shape[1], output.selected.shape[2], CPU)
    worst_in = output.index_scores.masked_fill(~output.selected, torch.inf).amin(-1)
    best_out = output.index_scores.masked_fill(output.selected | ~seen, -torch.inf).amax(-1)
    return float((worst_in - best_out).min())


CASES = {
    "few keys of many": (PLAIN, 7),
    "a single key": (PLAIN, 1),
    "more places than keys": (PLAIN, 64),
    "YaRN": (STRETCHED, 7),
    "YaRN, different mscales": (UNEQUAL, 7),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_equal_the_reference_in_float32(name: str, implementation: str) -> None:
    latent, index_topk = CASES[name]
    block = make(latent, index_topk=index_topk, dtype=torch.float32)
    x = inputs(33, torch.float32)
    with torch.no_grad():
        ours = block(x, turn(0, 33, latent, torch.float32))
    # The reference leaves ties to torch.topk, whose order is arbitrary: without any there is one right choice.
    assert gap(ours) > 1e-4
    theirs = reference_output(reference_with_weights_of(block, latent, implementation), x)
    assert difference(ours.hidden, theirs) <= 1e-5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("index_n_heads", [MANY, FEW])
def test_outputs_equal_the_reference_in_float64(name: str, index_n_heads: int) -> None:
    """With few index heads most choices are cut through a tie; see `wide_reference` on the reference's order."""
    latent, index_topk = CASES[name]
    block = make(latent, index_topk=index_topk, index_n_heads=index_n_heads)
    x = inputs(33)
    with torch.no_grad():
        ours = block(x, turn(0, 33, latent))
    theirs = reference_output(reference_with_weights_of(block, latent, settle_ties=True), x)
    assert difference(ours.hidden, theirs) <= 1e-10
    if index_topk < 33:
        assert (gap(ours) == 0) == (index_n_heads == FEW)


def test_few_keys_are_read_and_it_shows() -> None:
    x = inputs(33)
    sparse, dense = make(index_topk=7)(x, turn(0, 33)), make(index_topk=33)(x, turn(0, 33))
    counts = torch.arange(1, 34).clamp(max=7)
    assert (sparse.selected.sum(-1) == counts).all()
    torch.testing.assert_close(sparse.attention.sum(-1), torch.ones(2, 33, dtype=torch.float64))
    assert ((sparse.attention > 0) == sparse.selected).all()
    assert difference(sparse.hidden[:, :7], dense.hidden[:, :7]) < 1e-12
    assert (sparse.hidden - dense.hidden)[:, 7:].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("latent", [PLAIN, STRETCHED], ids=["plain", "YaRN"])
@pytest.mark.parametrize("index_topk", [33, 64])
def test_reading_all_keys_is_plain_latent_attention(latent: spec.LatentAttention, index_topk: int) -> None:
    block = make(latent, index_topk=index_topk)
    dense = LatentAttention(WIDTH, 3, **latent_arguments(latent)).double()
    dense.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("indexer.")})
    x, turned = inputs(33), turn(0, 33, latent)
    torch.testing.assert_close(block(x, turned).hidden, dense(x, turned), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index_n_heads", [MANY, FEW])
@pytest.mark.parametrize("index_topk", [1, 3, 64])
@pytest.mark.parametrize("pieces", [[17], [1] * 17, [7, 1, 6, 1, 2]], ids=str)
def test_cached_equals_full(pieces: list[int], index_topk: int, index_n_heads: int) -> None:
    block, x = make(index_topk=index_topk, index_n_heads=index_n_heads), inputs(17)
    full, cache, first = block(x, turn(0, 17)), new_cache(17), 0
    for length in pieces:
        last = first + length
        piece = block(x[:, first:last], turn(first, length), cache)
        torch.testing.assert_close(piece.hidden, full.hidden[:, first:last], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(piece.attention, full.attention[:, first:last, :last], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(piece.index_scores, full.index_scores[:, first:last, :last], rtol=1e-12, atol=1e-12)
        assert torch.equal(piece.selected, full.selected[:, first:last, :last])
        first = last


@pytest.mark.parametrize("index_n_heads", [MANY, FEW])
def test_changing_a_token_leaves_earlier_outputs(index_n_heads: int) -> None:
    block, x = make(index_topk=4, index_n_heads=index_n_heads), inputs(17)
    changed = x.clone()
    changed[:, 9] += 1
    before, after = block(x, turn(0, 17)), block(changed, turn(0, 17))
    torch.testing.assert_close(before.hidden[:, :9], after.hidden[:, :9], rtol=0, atol=0)
    assert torch.equal(before.selected[:, :9], after.selected[:, :9])
    assert not torch.allclose(before.hidden[:, 9:], after.hidden[:, 9:])


def test_where_all_scores_are_equal_the_first_keys_are_read() -> None:
    block = make(index_topk=4)
    torch.nn.init.zeros_(block.indexer.weights_proj.weight)
    x = inputs(17)
    output = block(x, turn(0, 17))
    assert torch.equal(output.selected[0], visible(17, 17, CPU) & (torch.arange(17) < 4))
    # What the last query does not select it does not touch: no number in its place changes nothing.
    cache = new_cache(17)
    block(x[:, :16], turn(0, 16), cache)
    cache.latents.kept[:, 4:16] = torch.nan
    last = block(x[:, 16:], turn(16, 1), cache)
    torch.testing.assert_close(last.hidden, output.hidden[:, 16:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys", "index_topk"), [(1, 1, 1), (1, 8, 3), (8, 8, 3), (3, 8, 20)])
def test_gathered_equals_masked(queries: int, keys: int, index_topk: int) -> None:
    draw = torch.Generator().manual_seed(queries)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    query = LatentQuery(normal(2, queries, 3, 5), normal(2, queries, 3, 4))
    chosen = select(normal(2, queries, keys), visible(queries, keys, CPU), index_topk=index_topk)
    arguments = (query, normal(2, keys, 7), normal(2, keys, 4), normal(3, 5 + 9, 7), chosen)
    for gathered, masked in zip(
        gathered_attention(*arguments, scale=0.3), masked_attention(*arguments, scale=0.3), strict=True
    ):
        torch.testing.assert_close(gathered, masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", [gathered_attention, masked_attention])
def test_attention_by_hand(attend: Any) -> None:
    # One head: a key is the latent itself, a value ten times it. Of keys 1, 2, 4 the query 1 reads the outer two,
    # whose products 1 and 4, scaled by ln(2) / 3, weigh 1 : 2.
    one = torch.ones(1, 1, 1, 1)
    query = LatentQuery(one, 0 * one)
    latent = torch.tensor([[[1.0], [2.0], [4.0]]])
    up = torch.tensor([[[1.0], [10.0]]])
    scale = float(torch.tensor(2.0).log() / 3)
    mixed, attention = attend(query, latent, 0 * latent, up, torch.tensor([[[2, 0, -1]]]), scale=scale)
    torch.testing.assert_close(mixed, one * (10 + 2 * 40) / 3)
    torch.testing.assert_close(attention, torch.tensor([[[1 / 3, 0.0, 2 / 3]]]))


def test_each_loss_trains_its_own_weights() -> None:
    block = make(index_topk=5)
    x = inputs(17).requires_grad_()
    output = block(x, turn(0, 17))
    output.hidden.square().sum().backward(retain_graph=True)
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == name.startswith("indexer."), name
    block.zero_grad(set_to_none=True)
    x.grad = None
    indexer_loss(output.index_scores, output.attention, output.selected).backward()
    assert x.grad is None
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) != name.startswith("indexer."), name
        assert parameter.grad is None or parameter.grad.abs().max() > 1e-6, name


def test_the_warm_up_teaches_the_indexer_what_attention_reads_most() -> None:
    block, x = make(index_topk=33), inputs(33)
    optimizer = torch.optim.Adam(block.indexer.parameters(), lr=0.01)
    losses, recalls = [], []
    for _ in range(30):
        output = block(x, turn(0, 33))
        loss = indexer_loss(output.index_scores, output.attention, output.selected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        recalls.append(recall(output, 6))
    assert losses[-1] < 0.5 * losses[0]
    assert recalls[-1] > recalls[0] + 0.2


def recall(output: SparseAttention, count: int) -> float:
    """Share of the keys with the largest attention that are among those with the best scores, over full choices."""
    seen = visible(output.selected.shape[1], output.selected.shape[2], CPU)
    by_score, by_attention = (
        as_mask(select(scores, seen, index_topk=count), scores.shape[-1])[:, count:]
        for scores in (output.index_scores, output.attention)
    )
    return float((by_score & by_attention).sum() / by_attention.sum())


def test_the_indexer_adds_these_parameters() -> None:
    block = make()
    added = sum(p.numel() for p in block.indexer.parameters())
    assert added == 19 * MANY * 11 + WIDTH * 11 + 2 * 11 + WIDTH * MANY


def test_cache_bytes_are_measured() -> None:
    assert new_cache(10).nbytes == 2 * 10 * (17 + 6 + 11) * 8


def test_a_narrower_cache_hands_back_what_came_in() -> None:
    block, x, cache = make(index_topk=4), inputs(17), new_cache(17, torch.float32)
    full = block(x, turn(0, 17))
    block(x[:, :16], turn(0, 16), cache)
    last = block(x[:, 16:], turn(16, 1), cache)
    assert last.hidden.dtype == torch.float64 and cache.index_key.dtype == torch.float32
    assert 1e-12 < difference(last.hidden, full.hidden[:, 16:]) < 1e-5
    parts = (torch.zeros(2, 1, width, dtype=torch.float64) for width in (17, 6, 11))
    assert {part.dtype for part in new_cache(1, torch.float32).append(*parts)} == {torch.float64}


def test_a_full_cache_refuses_and_keeps_what_it_has() -> None:
    block, x, cache = make(), inputs(5), new_cache(4)
    block(x[:, :3], turn(0, 3), cache)
    kept = cache.index_key.clone()
    with pytest.raises(ValueError, match="max_length=4 tokens; 3 are kept and 2 more came"):
        block(x[:, 3:], turn(3, 2), cache)
    with pytest.raises(ValueError, match="batch_size=2, not 1"):
        block(x[:1, 3:4], turn(3, 1), cache)
    assert cache.length == 3 and torch.equal(cache.index_key, kept)
