"""Equal logits of every further prediction depth with `transformers`' MTP model for the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import MtpModel
from wide_reference import reference_of

from workbench.blocks.norm import RMSNorm
from workbench.blocks.router import Router
from workbench.model.config import DenseFeedForward, LatentAttention, LayerConfig, MixtureOfExperts, ModelConfig
from workbench.model.decoder import Decoder

ALLOWED = 1e-5
ATTENTION = LatentAttention(
    num_attention_heads=3, q_lora_rank=13, kv_lora_rank=11, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=7
)
SPARSE = LayerConfig(
    ATTENTION,
    MixtureOfExperts(
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=14,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
    ),
)
MAIN = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    layers=(LayerConfig(ATTENTION, DenseFeedForward(intermediate_size=41)), SPARSE),
    max_position_embeddings=128,
    initializer_range=0.2,
)


def make(depths: int) -> Decoder:
    """A decoder whose gains and selection biases are no longer those of an untrained one.

    With gains of 1 a second norm changes nothing, and the hidden state before the final norm would do as well.
    """
    torch.manual_seed(3)
    decoder = Decoder(replace(MAIN, mtp_layers=(SPARSE,) * depths)).eval()
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, Router):
            module.e_score_correction_bias.normal_(std=0.5)
    return decoder


def references(decoder: Decoder) -> tuple[Any, MtpModel]:
    """The reference's main model and its MTP model, both with the weights of `decoder`."""
    weights = decoder.state_dict()
    main = Decoder(replace(decoder.config, mtp_layers=()))
    main.load_state_dict({key: value for key, value in weights.items() if not key.startswith("mtp_layers.")})
    peer = reference_of(main)
    further = MtpModel(peer, num_mtp_layers=len(decoder.mtp_layers)).eval()
    renamed = {
        key.removeprefix("mtp_").replace(".norm.", ".post_norm.").replace(".layer.", ".mtp_block."): value
        for key, value in weights.items()
        if key.startswith("mtp_layers.")
    }
    # `strict` is false because embedding and head, which the two models share, are among the reference's keys.
    missing, unexpected = further.load_state_dict(renamed, strict=False)
    assert not unexpected and all(key.startswith(("embed_tokens.", "shared_head.")) for key in missing)
    return peer, further


def reference_logits(further: MtpModel, hidden: Tensor, known: Tensor) -> list[Tensor]:
    """Logits of every depth at every position whose token `known` holds, computed as the reference's own loop does."""
    logits = []
    for depth in range(len(further.layers)):
        inputs = known[:, depth + 1 : depth + 1 + hidden.shape[1]]
        positions = depth + 1 + torch.arange(inputs.shape[1])[None]
        hidden = further.forward_layer(depth, hidden[:, : inputs.shape[1]], positions, None, input_ids=inputs)
        logits.append(further._project_to_logits(hidden))
    return logits


def tokens_and_lookahead(depths: int) -> tuple[Tensor, Tensor]:
    known = torch.randint(0, MAIN.vocab_size, (2, 40 + depths), generator=torch.Generator().manual_seed(1))
    return known[:, :40], known[:, 40:]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("looks_ahead", [True, False])
@pytest.mark.parametrize("depths", [1, 2])
@torch.no_grad()
def test_logits_of_every_depth_equal_the_reference(depths: int, looks_ahead: bool) -> None:
    decoder = make(depths)
    peer, further = references(decoder)
    tokens, lookahead = tokens_and_lookahead(depths)
    known = torch.cat((tokens, lookahead), dim=1) if looks_ahead else tokens

    ours = decoder(tokens, lookahead=lookahead if looks_ahead else None).mtp_logits
    theirs = reference_logits(further, peer.model(tokens).last_hidden_state, known)

    assert [x.shape[1] for x in ours] == [40 if looks_ahead else 40 - depth for depth in range(1, depths + 1)]
    for depth, (own, peers) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert difference(own, peers) <= ALLOWED, f"depth {depth}"


@torch.no_grad()
def test_drafted_tokens_equal_the_reference() -> None:
    """Each depth reads the token that the one before drafted, as the reference's own `forward` has it."""
    decoder = make(2)
    peer, further = references(decoder)
    tokens, lookahead = tokens_and_lookahead(2)
    following = lookahead[:, :1]
    shifted = torch.cat((tokens[:, 1:], following), dim=1)
    hidden, positions = peer.model(tokens).last_hidden_state, torch.arange(1, 41)[None]
    drafted, logits, _ = further(shifted, hidden, None, positions, None)

    first, second = decoder(tokens, lookahead=torch.cat((following, drafted[:, :1]), dim=1)).mtp_logits
    assert difference(torch.stack((first[:, -1], second[:, -1]), dim=1), logits) <= ALLOWED
    assert torch.equal(torch.stack((first[:, -1].argmax(-1), second[:, -1].argmax(-1)), dim=1), drafted)


@pytest.mark.parametrize("changed", ["hidden first", "hidden before the final norm", "tokens not shifted further"])
@torch.no_grad()
def test_the_comparison_sees_a_wrong_reference(changed: str) -> None:
    decoder = make(2)
    peer, further = references(decoder)
    tokens, lookahead = tokens_and_lookahead(2)
    known = torch.cat((tokens, lookahead), dim=1)
    before_norm: list[Tensor] = []
    peer.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    hidden = peer.model(tokens).last_hidden_state
    if changed == "hidden first":
        further.config.mtp_hidden_states_first = True
    elif changed == "hidden before the final norm":
        (hidden,) = before_norm
    else:
        known = torch.cat((known[:, :1], known), dim=1)

    wrong = reference_logits(further, hidden, known)
    for own, peers in zip(decoder(tokens, lookahead=lookahead).mtp_logits, wrong, strict=True):
        assert difference(own, peers) > 1000 * ALLOWED
