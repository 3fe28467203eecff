"""The model on the fixed validation batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.blocks.router import Routing
from workbench.model.decoder import Decoder
from workbench.model.generate import generate
from workbench.text import Batch, Floors, Text, Tokenizer
from workbench.train.events import Evaluation
from workbench.train.losses import mtp_inside, mtp_targets
from workbench.train.recipes import Recipe
from workbench_kernels import linear_cross_entropy
from workbench_kernels.tier import using

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Examination:
    """What a run is examined on: drawn once, the same for every seed, with the floors of counting models over it."""

    batches: Sequence[Batch]
    floors: Floors
    names: tuple[str, ...]
    tokenizer: Tokenizer
    prompt: np.ndarray


def prepare_examination(recipe: Recipe, text: Text) -> Examination:
    """Draw the validation batches of a recipe and count their floors."""
    batches = text.validation(
        recipe.batch_size, recipe.sequence_length, recipe.lookahead, num_batches=recipe.evaluation_batches
    )
    floors = text.floors(batches, recipe.sequence_length, max_distance=recipe.lookahead)
    return Examination(batches, floors, text.names, text.tokenizer, text.tokenizer.encode(recipe.sample_prompt))


@torch.no_grad()
def examine(decoder: Decoder, exam: Examination, recipe: Recipe, step: int) -> Evaluation:
    """Losses per token and byte, MTP accuracy, loads per corpus, and a sample, after `step` updates.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    with using(recipe.impl):
        return _examine(decoder, exam, recipe, step)


def _examine(decoder: Decoder, exam: Examination, recipe: Recipe, step: int) -> Evaluation:
    length = recipe.sequence_length
    byte_lengths_V = torch.from_numpy(exam.tokenizer.byte_lengths)
    num_corpora = len(exam.names)
    nats_by_corpus, bytes_by_corpus = torch.zeros(num_corpora, dtype=torch.float64), torch.zeros(num_corpora)
    loads: list[Tensor] = []
    hits, guesses = [0.0] * recipe.lookahead, [0.0] * recipe.lookahead
    num_tokens = 0
    for batch in exam.batches:
        tokens = torch.from_numpy(batch.tokens)
        documents = torch.from_numpy(batch.documents)
        device_tokens = tokens.to(recipe.device)
        lookahead = device_tokens[:, length : length + recipe.lookahead - 1]
        states = decoder.states(device_tokens[:, :length], lookahead=lookahead)
        targets_BT = tokens[:, 1 : length + 1]
        losses_N = linear_cross_entropy(
            states.hidden.flatten(0, 1),
            decoder.lm_head.weight,
            device_tokens[:, 1 : length + 1].flatten(),
            reduction="none",
        )
        losses_BT = losses_N.view(targets_BT.shape).cpu()
        corpus_B = torch.from_numpy(batch.corpus).long()
        nats_by_corpus.index_add_(0, corpus_B, losses_BT.sum(1, dtype=torch.float64))
        bytes_by_corpus.index_add_(0, corpus_B, byte_lengths_V[targets_BT].sum(1).float())
        num_tokens += targets_BT.numel()
        loads.append(load_by_corpus(states.routing, corpus_B, num_corpora))
        for depth, hidden_BTD in enumerate(states.mtp_hidden, start=1):
            inside_BT = mtp_inside(documents, length, depth)
            inside_BT[:, length - depth :] = False  # the counting models' targets end with the next-token ones
            right_BT = likeliest(decoder, hidden_BTD).cpu() == mtp_targets(tokens, length, depth)
            hits[depth] += float((right_BT & inside_BT).sum())
            guesses[depth] += float(inside_BT.sum())
    if not math.isfinite(float(nats_by_corpus.sum())):
        raise FloatingPointError(f"the validation loss after step {step} is {float(nats_by_corpus.sum())}")
    loads_by_corpus = torch.stack(loads).sum(0).numpy()
    depths = range(1, recipe.lookahead)
    return Evaluation(
        step=step,
        nats_per_token=float(nats_by_corpus.sum()) / num_tokens,
        nats_per_byte=float(nats_by_corpus.sum() / bytes_by_corpus.sum()),
        nats_per_byte_by_corpus={
            name: float(nats_by_corpus[i] / bytes_by_corpus[i]) for i, name in enumerate(exam.names)
        },
        floors_nats_per_byte=dict(exam.floors.nats_per_byte),
        floors_nats_per_token=dict(exam.floors.nats_per_token),
        mtp_accuracy={depth: hits[depth] / max(1.0, guesses[depth]) for depth in depths},
        distance_bigram_accuracy={depth: exam.floors.distance_accuracy[depth + 1] for depth in depths},
        load_by_corpus_LE={name: loads_by_corpus[i] for i, name in enumerate(exam.names)},
        sample=write_sample(decoder, exam, recipe, step),
    )


def likeliest(decoder: Decoder, hidden: Tensor) -> Tensor:
    """The token [B, T] with the largest logit at each position, never all logits at once."""
    parts = [decoder.lm_head(part).argmax(-1) for part in hidden.flatten(0, 1).split(CHUNK_TOKENS)]
    return torch.cat(parts).view(hidden.shape[:2])


def load_by_corpus(routing: Sequence[Routing | None], corpus: Tensor, num_corpora: int) -> Tensor:
    """Choices [corpora, expert layers, experts] of one batch, whose sequences belong to `corpus` [B]."""
    routed = [r for r in routing if r is not None]
    num_experts = routed[0].scores.shape[1] if routed else 0
    loads = torch.zeros(num_corpora, len(routed), num_experts, dtype=torch.int64)
    for layer, choice in enumerate(routed):
        indices_BX = choice.indices.cpu().reshape(len(corpus), -1)
        flat = corpus[:, None] * num_experts + indices_BX
        loads[:, layer] = torch.bincount(flat.flatten(), minlength=num_corpora * num_experts).view(num_corpora, -1)
    return loads


def write_sample(decoder: Decoder, exam: Examination, recipe: Recipe, step: int) -> str:
    """A continuation of the recipe's prompt, drawn with a seed of its own (nothing when none is asked for)."""
    if recipe.sample_tokens == 0:
        return ""
    kept = exam.prompt[: recipe.model.max_position_embeddings - 1]
    room = recipe.model.max_position_embeddings - len(kept)
    prompt = torch.from_numpy(kept).long()[None].to(recipe.device)
    generation = generate(
        decoder,
        prompt,
        min(recipe.sample_tokens, room),
        temperature=recipe.sample_temperature,
        top_p=recipe.sample_top_p,
        seed=recipe.seed + step,
    )
    return exam.tokenizer.decode(generation.tokens[0].cpu().numpy())
