"""Recipes small enough that a test trains them in a second."""

from __future__ import annotations

from dataclasses import replace

from workbench.model.config import LatentAttention, SparseLatentAttention
from workbench.text import InductionTask, Mixture, ModularArithmeticTask
from workbench.train.optimizer import AdamW
from workbench.train.recipes import Recipe, v3_style
from workbench.train.schedule import WarmupCosine


def tiny_recipe(**changes: object) -> Recipe:
    """Two layers of width 32 with 8 experts on generated text; one thread, so that runs repeat bitwise."""
    recipe = Recipe(
        name="tiny",
        model=v3_style(
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            q_lora_rank=12,
            kv_lora_rank=8,
            head_dim=8,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            max_position_embeddings=128,
        ),
        text=Mixture({ModularArithmeticTask(): 2.0, InductionTask(): 1.0}),
        sequence_length=32,
        batch_size=4,
        steps=6,
        optimizer=AdamW(learning_rate=5e-3),
        schedule=WarmupCosine(warmup_steps=2),
        evaluate_every=3,
        evaluation_batches=2,
        checkpoint_every=3,
        sample_prompt="1",
        sample_tokens=4,
        num_threads=1,
    )
    return replace(recipe, **changes)


def sparse_recipe(**changes: object) -> Recipe:
    """Two layers and a prediction layer with sparse attention that reads 6 of at most 32 tokens."""
    recipe = tiny_recipe(steps=6, batch_size=8, sequence_length=24)
    latent = recipe.model.layers[0].attention
    assert isinstance(latent, LatentAttention)
    sparse = SparseLatentAttention(latent=latent, index_n_heads=3, index_head_dim=8, index_topk=6)
    stacks = {
        name: tuple(replace(layer, attention=sparse) for layer in getattr(recipe.model, name))
        for name in ("layers", "mtp_layers")
    }
    return replace(recipe, model=replace(recipe.model, **stacks), **changes)
