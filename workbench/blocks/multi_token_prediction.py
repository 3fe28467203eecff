"""Multi-token prediction: one more layer that guesses the token after the next."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.blocks.norm import RMSNorm
from workbench.blocks.rope import Rotation
from workbench.blocks.transformer_layer import LayerCache, LayerOutput, TransformerLayer


class MultiTokenPrediction(nn.Module):
    """One prediction depth around an ordinary transformer layer.

    At depth k, position i joins the hidden state of depth k-1 at i (at depth 1: the main model's, after its final norm)
    with the embedding of token i+k; from the result the shared head reads token i+k+1. The joined vector is
    [norm(embedding); norm(hidden)], as checkpoints have it. Embedding and head are those of the main model.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.2.
    """

    def __init__(self, hidden_size: int, layer: TransformerLayer, *, eps: float) -> None:
        super().__init__()
        self.enorm = RMSNorm(hidden_size, eps=eps)
        self.hnorm = RMSNorm(hidden_size, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.layer = layer
        self.norm = RMSNorm(hidden_size, eps=eps)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        embedding: Float[Tensor, "B T D"],
        turn: Rotation,
        cache: LayerCache | None = None,
    ) -> LayerOutput:
        joined_BTD = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
        output = self.layer(joined_BTD, turn, cache)
        return output._replace(hidden=self.norm(output.hidden))
