"""The lightning indexer: its scores, its choice and what it learns from."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.blocks.indexer_loss import indexer_loss
from workbench.blocks.lightning_indexer import LightningIndexer, as_mask
from workbench.blocks.rope import Rotation
from workbench_kernels.causal_attention import visible
from workbench_kernels.sparse_select import index_scores, select


def chosen(scores: torch.Tensor, index_topk: int) -> torch.Tensor:
    return select(scores, visible(scores.shape[1], scores.shape[2], scores.device), index_topk=index_topk)


def test_scores_by_hand() -> None:
    query = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    key = torch.tensor([[[3.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]]])
    weight = torch.tensor([[[1.0, -0.5]]])
    # Products of head 0: 3, -1, -1; of head 1: 2, 2, -2. What is below 0 counts as 0.
    assert index_scores(query, key, weight).tolist() == [[[3 - 1, -1, 0]]]


def test_an_indexers_scores_by_hand() -> None:
    """Two heads of width 3, of which the first two numbers turn by a quarter; queries turn, keys are given."""
    indexer = LightningIndexer(2, 2, index_head_dim=3, q_lora_rank=1, qk_rope_head_dim=2)
    with torch.no_grad():
        indexer.wq_b.weight.copy_(torch.tensor([1.0, 0.0, 5.0, 0.0, -1.0, 0.0])[:, None])
        indexer.weights_proj.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    quarter = Rotation(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    x, compressed = torch.tensor([[[3.0, 7.0]]]), torch.ones(1, 1, 1)
    # The queries (1, 0, 5) and (0, -1, 0) become (0, 1, 5) and (1, 0, 0); their weights are 2 * 3 and 1 * 7, both
    # divided by sqrt(2 heads * 3 numbers).
    keys = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])
    expected = torch.tensor([[[7.0, 6.0, 7.0 + 30.0, 0.0]]]) / math.sqrt(6)
    found = indexer(x, compressed, keys, quarter, index_topk=3)
    torch.testing.assert_close(found.scores, expected)
    assert found.keys.tolist() == [[[2, 0, 1]]]


def test_a_key_by_hand() -> None:
    indexer = LightningIndexer(3, 1, index_head_dim=3, q_lora_rank=1, qk_rope_head_dim=2)
    with torch.no_grad():
        indexer.wk.weight.copy_(torch.eye(3))
        indexer.k_norm.weight.copy_(torch.tensor([1.0, 1.0, 2.0]))
        indexer.k_norm.bias.copy_(torch.tensor([0.0, 0.0, 10.0]))
    quarter = Rotation(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
    # Centred and divided by their deviation, 1, 2, 3 are -r, 0, r with r = sqrt(1.5); (-r, 0) turns to (0, -r).
    r = math.sqrt(1.5)
    key = indexer.key(torch.tensor([[[1.0, 2.0, 3.0]]]), quarter)
    torch.testing.assert_close(key, torch.tensor([[[0.0, -r, 10 + 2 * r]]]), rtol=1e-5, atol=1e-5)


def test_a_16_bit_model_scores_in_float32() -> None:
    indexer = LightningIndexer(8, 3, index_head_dim=6, q_lora_rank=5, qk_rope_head_dim=4)
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    indexer.bfloat16()
    x, compressed = (
        torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1)).bfloat16() for width in (8, 5)
    )
    still = Rotation(torch.ones(7, 2), torch.zeros(7, 2))
    scores = indexer(x, compressed, indexer.key(x, still), still, index_topk=1).scores
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float()), "rounded to 16 bits on the way"


def test_selection_by_hand() -> None:
    scores = torch.tensor([[[9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 9.0, 9.0], [1.0, 3.0, 3.0, 9.0], [2.0, 1.0, 2.0, 2.0]]])
    keys = chosen(scores, 2)
    assert keys.tolist() == [[[0, -1], [1, 0], [1, 2], [0, 2]]]
    assert as_mask(keys, 4).int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]]]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (37, 37), (5, 37), (2, 700)])
@pytest.mark.parametrize("index_topk", [1, 4, 64])
def test_the_best_visible_keys_and_of_equals_the_lowest(queries: int, keys: int, index_topk: int) -> None:
    draw = torch.Generator().manual_seed(keys)
    scores = torch.randint(-2, 3, (2, queries, keys), generator=draw).float()
    ours = chosen(scores, index_topk)
    assert ours.shape[-1] == min(index_topk, keys)
    for b in range(2):
        for t in range(queries):
            seen = keys - queries + t + 1
            row = scores[b, t].tolist()
            expected = sorted(range(seen), key=lambda s: (-row[s], s))[:index_topk]
            assert [s for s in ours[b, t].tolist() if s >= 0] == expected
    assert (as_mask(ours, keys).sum(-1) == (ours >= 0).sum(-1)).all()


def test_positive_and_negative_zeros_are_equal() -> None:
    assert chosen(torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]]), 3).tolist() == [[[0, 1, 2]]]


def test_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="index_topk=0 must be at least 1"):
        chosen(torch.zeros(1, 2, 2), 0)


def test_loss_by_hand() -> None:
    attention, selected = torch.tensor([[[3.0, 1.0, 8.0]]]), torch.tensor([[[True, True, False]]])
    even = indexer_loss(torch.tensor([[[5.0, 5.0, -7.0]]]), attention, selected)
    # p = (3/4, 1/4) against (1/2, 1/2).
    assert float(even) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    guess = indexer_loss(torch.tensor([[[0.0, math.log(4.0), 0.0]]]), attention, selected)
    # Now against (1/5, 4/5): the direction of the divergence shows.
    assert float(guess) == pytest.approx(0.75 * math.log(3.75) + 0.25 * math.log(0.3125), rel=1e-6)
    # A second query, whose indexer is right, halves the mean.
    both = indexer_loss(
        torch.tensor([[[5.0, 5.0, -7.0], [2.0, 2.0, 0.0]]]),
        torch.tensor([[[3.0, 1.0, 8.0], [1.0, 1.0, 8.0]]]),
        selected.expand(1, 2, 3),
    )
    torch.testing.assert_close(both, even / 2)


def test_loss_is_zero_where_the_indexer_says_what_attention_does() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 9, 9, dtype=torch.float64, generator=draw)
    selected = as_mask(chosen(torch.randn(2, 9, 9, generator=draw), 4), 9)
    scores = (weights.log() + torch.randn(2, 9, 1, dtype=torch.float64, generator=draw)).requires_grad_()
    loss = indexer_loss(scores, weights, selected)
    loss.backward()
    assert scores.grad is not None
    torch.testing.assert_close(loss.detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), rtol=0, atol=1e-14)
    assert float(indexer_loss(scores.detach().roll(1, -1), weights, selected)) > 0.1


def test_loss_is_finite_where_attention_gives_a_key_nothing() -> None:
    scores = torch.zeros(1, 1, 3, requires_grad=True)
    loss = indexer_loss(scores, torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[True, True, False]]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2.0))
    assert scores.grad is not None and scores.grad.tolist() == [[[-0.5, 0.5, 0.0]]]
