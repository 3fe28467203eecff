"""How the learning rate moves over a run, as a factor of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass

from workbench.field_types import require_types
from workbench.model.config import require


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear rise over `warmup_steps`, then half a cosine down to `final_fraction` at the last step."""

    warmup_steps: int
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_types(self)
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be 0 or more")
        require(0 <= self.final_fraction <= 1, f"final_fraction={self.final_fraction} must lie in 0..1")

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for update number `step` (1..total_steps); later steps keep the last one's."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear rise, a constant, then 1 - sqrt(progress) down to `final_fraction` over the last `decay_steps`.

    Source: Haegele et al., arXiv 2405.18392, section 3 (form of the decay).
    """

    warmup_steps: int
    decay_steps: int
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be 0 or more")
        require(self.decay_steps >= 0, f"decay_steps={self.decay_steps} must be 0 or more")
        require(0 <= self.final_fraction <= 1, f"final_fraction={self.final_fraction} must lie in 0..1")

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for update number `step` (1..total_steps); later steps keep the last one's."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        left = max(0, total_steps - step)
        if left >= self.decay_steps:
            return 1.0
        progress = 1 - left / self.decay_steps
        return self.final_fraction + (1 - self.final_fraction) * (1 - math.sqrt(progress))
