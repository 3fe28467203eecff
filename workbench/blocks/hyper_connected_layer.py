"""One layer between several residual streams: what a transformer layer adds, written back by hyper-connections."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.hyper_connections import HyperConnection, write_back
from workbench.blocks.rope import Rotation
from workbench.blocks.transformer_layer import LayerCache, LayerOutput, TransformerLayer


class HyperConnectedLayer(TransformerLayer):
    """A transformer layer whose attention and feed-forward each have a connection of their own to O streams.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.2.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        attention: nn.Module,
        feed_forward: nn.Module,
        attn_hc: HyperConnection,
        ffn_hc: HyperConnection,
        eps: float,
    ) -> None:
        super().__init__(hidden_size, attention=attention, feed_forward=feed_forward, eps=eps)
        self.attn_hc = attn_hc
        self.ffn_hc = ffn_hc

    def forward(
        self,
        hidden: Float[Tensor, "B T O D"],
        turn: Rotation,
        cache: LayerCache | None = None,
        tokens: Int[Tensor, "B T"] | None = None,
    ) -> LayerOutput:
        """`hidden` are the streams; `tokens` the ids, which only a hash router reads."""
        connection = self.attn_hc(hidden)
        attended_BTD, reading = self.attend(connection.collapsed, turn, cache)
        hidden = write_back(hidden, attended_BTD, connection)
        connection = self.ffn_hc(hidden)
        fed_BTD, routing = self.feed(connection.collapsed, tokens)
        return LayerOutput(write_back(hidden, fed_BTD, connection), routing, reading)
