"""Every initial weight is set here, and nowhere else."""

from __future__ import annotations

import torch
from torch import nn

from workbench.blocks.mixture_of_experts import Experts
from workbench.blocks.norm import RMSNorm
from workbench.blocks.router import Router


@torch.no_grad()
def initialize(model: nn.Module, *, std: float) -> None:
    """Draw all matrices from a normal distribution with deviation `std`; gains are 1, biases 0.

    Source: DeepSeek-V3, arXiv 2412.19437, section 4.2 (with its own deviation).

    Raises:
        ValueError: a parameter belongs to a kind of module that this function does not know.
    """
    for name, module in model.named_modules():
        match module:
            case nn.Linear() | nn.Embedding():
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            case RMSNorm():
                nn.init.ones_(module.weight)
            case nn.LayerNorm():
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            case Router():
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.e_score_correction_bias)
            case Experts():
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std)
            case _ if next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"no initial weights are defined for {name} ({type(module).__name__})")
