"""Manifold-constrained hyper-connections (mHC): several residual streams instead of one.

A sublayer reads a weighted sum of the streams, and its output is added to each of them with a weight of its own, while
a matrix mixes the streams among themselves. All these weights depend on the token. The matrix is doubly stochastic
(no entry below 0, every row and column sums to 1): however many layers mix, the streams neither grow nor die out, and
their sum is passed on unchanged. O is the number of streams.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from workbench.blocks.keep_wide import KeepWide
from workbench.blocks.unit_norm import unit_rms


class Connection(NamedTuple):
    """What a sublayer reads, and how its output comes back: `post` weighs it for every stream, `mixing` joins streams.

    Row j of `mixing` says where stream j goes, column k where stream k comes from.
    """

    collapsed: Float[Tensor, "B T D"]
    post: Float[Tensor, "B T O"]
    mixing: Float[Tensor, "B T O O"]


class HyperConnection(KeepWide):
    """The connection of the streams to one sublayer, attention or feed-forward.

    One linear map of all streams together, normalised, gives 2Y + YY numbers: weights for reading, for writing, and
    the matrix. `scale` multiplies each of these three parts, `base` is added. Reading weights lie in (0, 1), plus
    `hc_eps`; writing weights in (0, 2). `eps` is that of the norm. All of this is computed in float32 or wider.

    Raises:
        ValueError: `hc_mult` is below 1.

    Source: arXiv 2512.24880, section 4; DeepSeek-V4, arXiv 2606.19348, section 2.2.
    """

    keep_wide = ("fn", "base", "scale")

    def __init__(self, hidden_size: int, hc_mult: int, *, hc_sinkhorn_iters: int, hc_eps: float, eps: float) -> None:
        super().__init__()
        if hc_mult < 1:
            raise ValueError(f"hc_mult={hc_mult} must be at least 1")
        self.hc_mult = hc_mult
        self.hc_sinkhorn_iters = hc_sinkhorn_iters
        self.hc_eps = hc_eps
        self.eps = eps
        num_weights = (2 + hc_mult) * hc_mult
        self.fn = nn.Parameter(torch.empty(num_weights, hc_mult * hidden_size))
        self.base = nn.Parameter(torch.empty(num_weights))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, streams: Float[Tensor, "B T O D"]) -> Connection:
        parts = (self.hc_mult, self.hc_mult, self.hc_mult**2)
        raw = stream_weights(streams, self.fn, self.eps).split(parts, dim=-1)
        base = self.base.to(raw[0].dtype).split(parts)
        pre_BTO, post_BTO, flat_BTX = (x * scale + b for x, scale, b in zip(raw, self.scale, base, strict=True))
        mixing_BTOO = doubly_stochastic(
            flat_BTX.unflatten(-1, (self.hc_mult, self.hc_mult)), iterations=self.hc_sinkhorn_iters, eps=self.hc_eps
        )
        collapsed_BTD = collapse(streams, pre_BTO.sigmoid() + self.hc_eps)
        return Connection(collapsed_BTD, 2 * post_BTO.sigmoid(), mixing_BTOO)


class HyperHead(KeepWide):
    """The weighted sum of the streams that the final norm reads; weights as for a sublayer.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.2.
    """

    keep_wide = ("hc_fn", "hc_base", "hc_scale")

    def __init__(self, hidden_size: int, hc_mult: int, *, hc_eps: float, eps: float) -> None:
        super().__init__()
        self.hc_eps = hc_eps
        self.eps = eps
        self.hc_fn = nn.Parameter(torch.empty(hc_mult, hc_mult * hidden_size))
        self.hc_base = nn.Parameter(torch.empty(hc_mult))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams: Float[Tensor, "B T O D"]) -> Float[Tensor, "B T D"]:
        raw_BTO = stream_weights(streams, self.hc_fn, self.eps)
        return collapse(streams, (raw_BTO * self.hc_scale + self.hc_base).sigmoid() + self.hc_eps)


def stream_weights(streams: Float[Tensor, "B T O D"], fn: Float[Tensor, "X OD"], eps: float) -> Float[Tensor, "B T X"]:
    """X raw weights per token from all its streams, joined and normalised; float32 or wider."""
    wide = torch.promote_types(streams.dtype, torch.float32)
    return F.linear(unit_rms(streams.flatten(2).to(wide), eps), fn.to(wide))


def collapse(streams: Float[Tensor, "B T O D"], weights: Float[Tensor, "B T O"]) -> Float[Tensor, "B T D"]:
    """The weighted sum of the streams, in their dtype."""
    return torch.einsum("bty,btyd->btd", weights, streams.to(weights.dtype)).to(streams.dtype)


def write_back(
    streams: Float[Tensor, "B T O D"], output: Float[Tensor, "B T D"], connection: Connection
) -> Float[Tensor, "B T O D"]:
    """The streams after a sublayer: stream k becomes sum over j of mixing[j, k] * stream j, plus post[k] * output.

    The matrix is applied transposed: it is not symmetric, and so the direction matters. The sum is made in the weights'
    dtype and rounded once; `transformers` rounds the matrix to a 16-bit model's dtype first, so that its columns no
    longer sum to 1.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.2.
    """
    wide = connection.mixing.dtype
    mixed_BTOD = torch.einsum("btjk,btjd->btkd", connection.mixing, streams.to(wide))
    written_BTOD = connection.post.unsqueeze(-1) * output.to(wide).unsqueeze(-2)
    return (mixed_BTOD + written_BTOD).to(streams.dtype)


def doubly_stochastic(
    logits: Float[Tensor, "*batch O O"], *, iterations: int, eps: float
) -> Float[Tensor, "*batch O O"]:
    """Sinkhorn-Knopp: divide the rows of exp(logits) by their sums, then the columns, `iterations` times over.

    The limit has rows and columns that sum to 1. Columns come last and are exact but for `eps`, which is added to
    every divisor, and to the entries after the first division of rows (a softmax). Rows come nearer to 1 with every
    iteration, and slowly where the logits lie far apart.

    Raises:
        ValueError: `iterations` is below 1.

    Source: Sinkhorn and Knopp, Pacific Journal of Mathematics 21 (1967); arXiv 2512.24880, section 4.2.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1")
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix
