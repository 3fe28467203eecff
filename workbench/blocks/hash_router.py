"""The hash router: which experts a token visits is written in a table, by the token's id; only the weights are learned.

Early layers know little more of a token than its id. A table keeps them balanced from the first step on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.blocks.router import Routing
from workbench_kernels.moe_route import ScoringFunction, expert_scores


class HashRouter(nn.Module):
    """Read each token's experts from `tid2eid`, [V, A], and weigh them by the learned gate's scores.

    The table is a buffer of whole numbers: it belongs to the checkpoint and is never trained. A row names every expert
    at most once. Scores and weights are computed in float32 or wider.

    Raises:
        ValueError: `num_experts_per_tok` is outside 1..n_routed_experts.

    Source: DeepSeek-V4, arXiv 2606.19348, section 2.1; Roller et al., arXiv 2106.04426 (hash layers).
    """

    tid2eid: Tensor

    def __init__(
        self,
        hidden_size: int,
        n_routed_experts: int,
        *,
        vocab_size: int,
        num_experts_per_tok: int,
        scoring_func: ScoringFunction,
        norm_topk_prob: bool,
        routed_scaling_factor: float,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok} must lie in 1..{n_routed_experts} (n_routed_experts)"
            )
        self.scoring_func: ScoringFunction = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        self.register_buffer("tid2eid", torch.empty(vocab_size, num_experts_per_tok, dtype=torch.int64))

    def forward(self, x: Float[Tensor, "N D"], tokens: Int[Tensor, " N"]) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        scores_NE = expert_scores(F.linear(x.to(wide), self.weight.to(wide)), self.scoring_func)
        indices_NA = self.tid2eid[tokens]
        weights_NA = scores_NE.gather(1, indices_NA)
        if self.norm_topk_prob:
            weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
        load_E = torch.bincount(indices_NA.flatten(), minlength=scores_NE.shape[1])
        # A table cannot be balanced: losses on the scores would only bend the weights.
        return Routing(indices_NA, weights_NA * self.routed_scaling_factor, scores_NE.detach(), load_E)
