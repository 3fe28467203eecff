"""Every initial weight is set here, and nowhere else."""

from __future__ import annotations

import torch
from torch import nn

from workbench.blocks.compressed_attention import CompressedAttention
from workbench.blocks.compressor import Pool
from workbench.blocks.grouped_query_attention import GroupedQueryAttention
from workbench.blocks.hash_router import HashRouter
from workbench.blocks.hyper_connections import HyperConnection, HyperHead
from workbench.blocks.mixture_of_experts import Experts
from workbench.blocks.norm import RMSNorm
from workbench.blocks.router import Router


@torch.no_grad()
def initialize(model: nn.Module, *, std: float) -> None:
    """Draw all matrices from a normal distribution with deviation `std`; gains are 1, biases and sinks 0.

    Tables of experts by token deal the experts out in turn, so that all tokens together load them evenly.

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
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case Experts():
                nn.init.normal_(module.gate_up_proj, std=std)
                nn.init.normal_(module.down_proj, std=std)
                for bias in (module.gate_up_proj_bias, module.down_proj_bias):
                    if bias is not None:
                        nn.init.zeros_(bias)
            case HashRouter():
                nn.init.normal_(module.weight, std=std)
                num_experts, (vocab_size, per_token) = module.weight.shape[0], module.tid2eid.shape
                module.tid2eid.copy_(torch.arange(vocab_size * per_token).view(vocab_size, per_token) % num_experts)
            case CompressedAttention() | GroupedQueryAttention():
                if module.sinks is not None:
                    nn.init.zeros_(module.sinks)
            case Pool():
                nn.init.zeros_(module.position_bias)
            case HyperConnection():
                nn.init.normal_(module.fn, std=std)
                nn.init.zeros_(module.base)
                nn.init.ones_(module.scale)
            case HyperHead():
                nn.init.normal_(module.hc_fn, std=std)
                nn.init.zeros_(module.hc_base)
                nn.init.ones_(module.hc_scale)
            case _ if next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"no initial weights are defined for {name} ({type(module).__name__})")
