"""How much memory a recipe will need, before it is started."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from workbench.model.config import (
    CompressedAttention,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    SparseLatentAttention,
)
from workbench.model.count import parameters
from workbench.train.recipes import Recipe
from workbench_kernels.causal_attention import LONGEST_KEPT
from workbench_kernels.linear_cross_entropy import WORKSPACE_BYTES

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def estimate_bytes(recipe: Recipe) -> int:
    """Weights, gradients and moments exactly; activations by counting what each block keeps for its backward.

    An estimate: allocator waste and temporary results come on top, so a run that barely fits by it may still fail.
    """
    count = parameters(recipe.model)
    compute_bytes = 2 if recipe.dtype == "bfloat16" else 4
    copies = 0 if recipe.dtype == "float32" else 2 * compute_bytes
    weights = (count.total + count.mtp) * (4 * 4 + copies)
    layers = (*recipe.model.layers, *recipe.model.mtp_layers)
    per_token = sum(kept_numbers_per_token(layer, recipe.model.hidden_size) for layer in layers) * compute_bytes
    per_token += sum(kept_weights_per_query(layer, recipe) for layer in layers) * compute_bytes
    num_tokens = recipe.sequence_length * recipe.batch_size
    return weights + num_tokens * per_token + logits_bytes(recipe.model.vocab_size * num_tokens, recipe)


def logits_bytes(num_logits: int, recipe: Recipe) -> int:
    """What the loss keeps of each depth's logits: the definition all of them, three times; other forms a chunk."""
    if recipe.impl == "reference":
        return 3 * 4 * num_logits * recipe.lookahead
    return min(WORKSPACE_BYTES, 4 * num_logits)


def kept_weights_per_query(layer: LayerConfig, recipe: Recipe) -> int:
    """Attention weights that the backward of one layer needs per query.

    The definition keeps whole rows of scores and weights, the form on a CPU half a row, up to the length that is kept;
    what runs on a GPU makes them again.
    """
    attention, length = layer.attention, recipe.sequence_length
    if isinstance(attention, SparseLatentAttention):
        # Scores and weights of every head, whatever the length; the products of index heads are made again.
        return (2 * attention.num_attention_heads + 8) * length
    if recipe.impl == "reference":
        return 2 * attention.num_attention_heads * length
    kept = recipe.device == "cpu" and length <= LONGEST_KEPT
    return attention.num_attention_heads * length // 2 if kept else 0


def kept_numbers_per_token(layer: LayerConfig, hidden_size: int) -> int:
    """Numbers that the backward of one layer needs per token."""
    attention = layer.attention
    if isinstance(attention, SparseLatentAttention):
        attention = attention.latent
    match attention:
        case LatentAttention():
            heads = attention.num_attention_heads
            key = attention.qk_nope_head_dim + attention.qk_rope_head_dim
            inside = heads * (3 * key + 3 * attention.v_head_dim) + 2 * attention.kv_lora_rank
            inside += 2 * (attention.q_lora_rank or 0)
        case GroupedQueryAttention():
            inside = attention.head_dim * (3 * attention.num_attention_heads + 4 * attention.num_key_value_heads)
        case CompressedAttention():
            inside = attention.head_dim * (4 * attention.num_attention_heads + 4) + 2 * attention.q_lora_rank
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, MixtureOfExperts):
        routed = feed_forward.num_experts_per_tok * (4 * feed_forward.moe_intermediate_size + 2 * hidden_size)
        shared = feed_forward.n_shared_experts * 4 * feed_forward.moe_intermediate_size
        wide = routed + shared + 3 * feed_forward.n_routed_experts
    else:
        wide = 4 * feed_forward.intermediate_size
    return inside + wide + 6 * hidden_size


def available_bytes(device: str) -> int | None:
    """Memory that a new process could take now, of the GPU or of the machine; None where the system does not say.

    On Linux that is what the kernel calls available, within the limit of a container.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    if MEMINFO.exists():
        known = dict(line.split(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
        free, limit = int(known["MemAvailable"].split()[0]) * 1024, container_bytes()
        return free if limit is None else min(free, limit)
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def container_bytes() -> int | None:
    """What a container's limit leaves; None without one. Pages of files that the kernel would give up count as free."""
    if not (CGROUP / "memory.max").exists():
        return None
    limit = (CGROUP / "memory.max").read_text().strip()
    if limit == "max":
        return None
    details = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    return int(limit) - int((CGROUP / "memory.current").read_text()) + int(details["inactive_file"])


def refuse_what_cannot_fit(recipe: Recipe) -> None:
    """Raise `ValueError`, in one line, when the recipe's device is not there or has too little memory."""
    refuse_missing_device(recipe.device)
    needed, available = estimate_bytes(recipe), available_bytes(recipe.device)
    if available is not None and needed > available:
        raise ValueError(
            f"{recipe.name} needs about {needed / 1e9:.1f} GB on {recipe.device}, {available / 1e9:.1f} GB are free;"
            " make batch_size, sequence_length or the model smaller"
        )


def refuse_missing_device(device: str) -> None:
    """Raise `ValueError`, in one line, unless torch can compute on `device`."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"device={device!r} must be cpu, cuda, cuda:0, .. or mps") from None
    present = {
        "cpu": lambda: True,
        "cuda": lambda: (torch.device(device).index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
    }
    if kind not in present:
        raise ValueError(f"device={device!r} must be cpu, cuda, cuda:0, .. or mps")
    if not present[kind]():
        raise ValueError(f"device={device!r} is not on this machine; device='cpu' always is")
