"""Attention blocks: two forms agree, caches change nothing, the future stays unseen."""

from __future__ import annotations

import pytest
import torch

from workbench.blocks.cache import KeyValueCache, LatentCache
from workbench.blocks.grouped_query_attention import GroupedQueryAttention
from workbench.blocks.latent_attention import LatentAttention, LatentQuery, absorbed_attention, naive_attention
from workbench.blocks.rope import Rotation, frequencies, rotate_halves, rotate_interleaved, rotation
from workbench.model.initial import initialize

CPU = torch.device("cpu")
WIDTH = 24


def turn(first: int, length: int, width: int) -> Rotation:
    return rotation(torch.arange(first, first + length), frequencies(width, 1e3, dtype=torch.float64, device=CPU))


def grouped(heads: int, groups: int) -> GroupedQueryAttention:
    torch.manual_seed(0)
    block = GroupedQueryAttention(
        WIDTH,
        heads,
        num_key_value_heads=groups,
        head_dim=6,
        softmax_scale=6**-0.5,
        rotate=rotate_halves,
        rotary_width=6,
    )
    initialize(block, std=0.5)
    return block.double()


def latent(q_lora_rank: int | None) -> LatentAttention:
    torch.manual_seed(0)
    block = LatentAttention(
        WIDTH,
        3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=7,
        qk_nope_head_dim=5,
        qk_rope_head_dim=4,
        v_head_dim=9,
        softmax_scale=9**-0.5,
        rotate=rotate_interleaved,
    )
    initialize(block, std=0.5)
    return block.double()


BLOCKS = {
    "MHA": (grouped(4, 4), 6),
    "GQA": (grouped(4, 2), 6),
    "MQA": (grouped(4, 1), 6),
    "MLA": (latent(11), 4),
    "MLA, plain queries": (latent(None), 4),
}


def new_cache(block: torch.nn.Module, length: int) -> KeyValueCache | LatentCache:
    place = {"dtype": torch.float64, "device": CPU}
    if isinstance(block, LatentAttention):
        return LatentCache(2, length, kv_lora_rank=7, qk_rope_head_dim=4, **place)
    assert isinstance(block, GroupedQueryAttention)
    return KeyValueCache(2, length, num_heads=block.k_proj.out_features // 6, head_dim=6, **place)


@pytest.mark.parametrize("name", BLOCKS)
def test_changing_a_token_leaves_earlier_outputs(name: str) -> None:
    block, rotary = BLOCKS[name]
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = block(x, turn(0, 9, rotary)), block(changed, turn(0, 9, rotary))
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1]])
def test_cached_equals_full(name: str, pieces: list[int]) -> None:
    block, rotary = BLOCKS[name]
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    cache, outputs, first = new_cache(block, 9), [], 0
    for length in pieces:
        outputs.append(block(x[:, first : first + length], turn(first, length, rotary), cache))
        first += length
    torch.testing.assert_close(torch.cat(outputs, dim=1), block(x, turn(0, 9, rotary)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 8), (8, 8), (3, 8)])
def test_absorbed_equals_naive(queries: int, keys: int) -> None:
    draw = torch.Generator().manual_seed(queries)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    query = LatentQuery(normal(2, queries, 3, 5), normal(2, queries, 3, 4))
    latent, key_rope, up = normal(2, keys, 7), normal(2, keys, 4), normal(3, 5 + 9, 7)
    absorbed = absorbed_attention(query, torch.cat((latent, key_rope), dim=-1), up, scale=0.3)
    torch.testing.assert_close(
        absorbed, naive_attention(query, latent, key_rope, up, scale=0.3), rtol=1e-12, atol=1e-12
    )


def test_cache_bytes_are_measured() -> None:
    assert new_cache(BLOCKS["MLA"][0], 10).nbytes == 2 * 10 * (7 + 4) * 8
    assert new_cache(BLOCKS["GQA"][0], 10).nbytes == 2 * 10 * 2 * 2 * 6 * 8


@pytest.mark.parametrize("name", BLOCKS)
def test_a_full_cache_refuses_and_keeps_what_it_has(name: str) -> None:
    block, rotary = BLOCKS[name]
    cache = new_cache(block, 4)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    block(x[:, :3], turn(0, 3, rotary), cache)
    with pytest.raises(ValueError, match="max_length=4 tokens; 3 are kept and 2 more came"):
        block(x[:, 3:], turn(3, 2, rotary), cache)
    assert cache.length == 3
    with pytest.raises(ValueError, match="batch_size=2, not 1"):
        block(x[:1, 3:4], turn(3, 1, rotary), cache)
