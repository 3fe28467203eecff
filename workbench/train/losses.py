"""The terms of the training objective, each returned by itself before anything is weighted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.blocks.balance import balance_loss
from workbench.blocks.indexer_loss import indexer_loss
from workbench.model.decoder import DecoderStates
from workbench_kernels import linear_cross_entropy


class LossTerms(NamedTuple):
    """Unweighted terms, in nats.

    `mtp[k-1]` is the mean cross-entropy of depth k over the positions whose target lies in the same document.
    `balance` is the sum over expert layers of a balance loss that is 1 at perfect balance (0 when none is asked for).
    `indexer` is the sum over layers of what their lightning indexers are taught by; None in a model without any.
    """

    next_token: Float[Tensor, ""]
    mtp: tuple[Float[Tensor, ""], ...]
    balance: Float[Tensor, ""]
    z: Float[Tensor, ""]
    indexer: Float[Tensor, ""] | None = None

    def named(self) -> dict[str, float]:
        """The values as plain numbers: `next_token`, `mtp_1`.., `balance`, `z`, and `indexer` where there is one."""
        mtp = {f"mtp_{depth}": loss for depth, loss in enumerate(self.mtp, start=1)}
        terms = {"next_token": self.next_token, **mtp, "balance": self.balance, "z": self.z}
        terms |= {} if self.indexer is None else {"indexer": self.indexer}
        return {name: float(term.detach()) for name, term in terms.items()}


def loss_terms(
    states: DecoderStates,
    head: Float[Tensor, "V D"],
    tokens: Int[Tensor, "B _"],
    documents: Int[Tensor, "B _"],
    *,
    balance_per: int | None,
) -> LossTerms:
    """All terms for T positions, of which `tokens` and `documents` hold 1 + M more (M: prediction depths).

    `head` is the weight that makes logits of hidden states; they are never in memory all at once.
    `balance_per`: the number of sequences that balance is judged over: 1 the whole batch at once, B each sequence by
    itself; None leaves the term at 0. The z term is the mean squared log-partition of the next-token logits.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2 (MTP); PaLM, arXiv 2204.02311, section 5 (z);
    DeepSeek-V3.2-Exp report, section 2.1, equation 4 (indexer).
    """
    length = states.hidden.shape[1]
    target_N = tokens[:, 1 : length + 1].reshape(-1)
    next_token, partition_N = linear_cross_entropy(states.hidden.flatten(0, 1), head, target_N, return_lse=True)
    mtp = tuple(
        mtp_loss(hidden_BTD, head, tokens, documents, depth)
        for depth, hidden_BTD in enumerate(states.mtp_hidden, start=1)
    )
    balance = torch.zeros((), device=tokens.device)
    if balance_per is not None:
        for routing in states.routing:
            if routing is not None:
                balance = balance + balance_loss(routing, balance_per)
    indexer = [indexer_loss(x.index_scores, x.attention, x.selected) for x in states.reading]
    return LossTerms(
        next_token,
        mtp,
        balance,
        partition_N.square().mean(),
        torch.stack(indexer).sum() if indexer else None,
    )


def mtp_loss(
    hidden: Float[Tensor, "B T D"],
    head: Float[Tensor, "V D"],
    tokens: Int[Tensor, "B _"],
    documents: Int[Tensor, "B _"],
    depth: int,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the token `depth` + 1 ahead, over positions that stay within their document."""
    length = hidden.shape[1]
    inside_BT = mtp_inside(documents, length, depth)
    target_BT = mtp_targets(tokens, length, depth).masked_fill(~inside_BT, -100)
    total = linear_cross_entropy(hidden.flatten(0, 1), head, target_BT.flatten(), reduction="sum")
    return total / inside_BT.sum().clamp(min=1)


def mtp_targets(tokens: Int[Tensor, "B _"], length: int, depth: int) -> Int[Tensor, "B T"]:
    """What depth `depth` predicts at each of `length` positions."""
    return tokens[:, depth + 1 : depth + 1 + length]


def mtp_inside(documents: Int[Tensor, "B _"], length: int, depth: int) -> Tensor:
    """True where position and target belong to the same document: packed documents do not leak across borders."""
    return mtp_targets(documents, length, depth) == documents[:, :length]
