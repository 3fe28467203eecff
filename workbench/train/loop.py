"""The training loop: a generator of events that neither logs, draws nor touches a file."""

from __future__ import annotations

import math
import time
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from workbench.blocks.balance import updated_bias
from workbench.blocks.mixture_of_experts import MixtureOfExperts
from workbench.blocks.router import Router
from workbench.model.decoder import DecoderStates
from workbench.text import Batch, Batches, Text, load
from workbench.train.evaluate import examine, prepare_examination
from workbench.train.events import Change, Checkpoint, Evaluation, Event, Spike, Step
from workbench.train.losses import LossTerms, loss_terms
from workbench.train.memory import refuse_what_cannot_fit
from workbench.train.recipes import AuxiliaryLoss, LossFreeBias, Recipe
from workbench.train.spikes import SpikeDetector
from workbench.train.state import TrainState
from workbench_kernels.tier import using


def train(
    recipe: Recipe, state: TrainState | None = None, text: Text | None = None
) -> Generator[Event, Change | None, None]:
    """Run `recipe` from `state` (default: fresh) and tell what happens.

    Every update yields a `Step`, then as they fall due a `Spike`, an `Evaluation` and a `Checkpoint` of the same step.
    A fresh run begins with an `Evaluation` of step 0. `.send(change)` in the place of `next()` changes the learning
    rate or the balance speed from the next update on: the schedule goes on from the new learning rate in proportion.

    Raises:
        ValueError: the recipe cannot fit into memory, or the text's vocabulary differs from the model's.
        FloatingPointError: a loss or gradient norm is not finite; a training loss that is not stops before the update.
    """
    if state is None:  # the memory of a given state is already taken
        refuse_what_cannot_fit(recipe)
    text = load(recipe.text, recipe.tokenizer) if text is None else text
    refuse_other_vocabulary(recipe, text)
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    state = TrainState(recipe) if state is None else state
    exam = prepare_examination(recipe, text)
    batches = text.batches(recipe.seed, recipe.batch_size, recipe.sequence_length, recipe.lookahead)
    spikes = SpikeDetector(state.recent_losses)
    if state.step == 0:
        apply_change((yield examine(state.decoder, exam, recipe, 0)), state)
    while state.step < recipe.steps:
        event = update(recipe, state, batches, text.tokenizer.byte_lengths)
        threshold, loss = spikes.threshold(), event.losses_nats["next_token"]
        spikes.add(loss)
        state.recent_losses = list(spikes.recent)
        apply_change((yield event), state)
        for kind in due_after(recipe, event, threshold):
            if kind is Spike:
                due: Event = Spike(step=event.step, loss_nats=loss, threshold_nats=threshold)
            elif kind is Evaluation:
                due = examine(state.decoder, exam, recipe, event.step)
            else:
                due = Checkpoint(step=event.step, state=state)
            apply_change((yield due), state)


def due_after(recipe: Recipe, step: Step, spike_threshold_nats: float) -> tuple[type[Event], ...]:
    """The kinds of the events that follow `step` before the next update, in their order."""
    last = step.step == recipe.steps
    due = (
        (Spike, step.losses_nats["next_token"] > spike_threshold_nats),
        (Evaluation, last or step.step % recipe.evaluate_every == 0),
        (Checkpoint, last or step.step % recipe.checkpoint_every == 0),
    )
    return tuple(kind for kind, holds in due if holds)


def refuse_other_vocabulary(recipe: Recipe, text: Text) -> None:
    """Raise `ValueError`, in one line, unless the model has a row for every token of `text` and no other."""
    if text.tokenizer.vocab_size != recipe.model.vocab_size:
        raise ValueError(
            f"the model's vocab_size={recipe.model.vocab_size} must be the tokenizer's {text.tokenizer.vocab_size}"
        )


def apply_change(change: Change | None, state: TrainState) -> None:
    """Take over what the consumer sent; it holds from the next update on.

    Raises:
        ValueError: a balance speed is set where no bias balances.
    """
    if change is None:
        return
    if change.balance_speed is not None and state.balance_speed is None:
        raise ValueError("balance_speed has no effect in this run: only LossFreeBias balances by a speed")
    if change.learning_rate is not None:
        state.learning_rate_anchor = (state.step + 1, change.learning_rate)
    if change.balance_speed is not None:
        state.balance_speed = change.balance_speed


def learning_rate(recipe: Recipe, state: TrainState, step: int) -> float:
    """The learning rate of update `step`: the schedule, rescaled to pass through the last change if there was one.

    A change during warm-up ends it: the value is held until the peak would have been reached.
    """
    factor = recipe.schedule.factor(step, recipe.steps)
    if state.learning_rate_anchor is None:
        return recipe.optimizer.learning_rate * factor
    since, value = state.learning_rate_anchor
    if step <= recipe.schedule.warmup_steps:
        return value
    at_change = recipe.schedule.factor(max(since, recipe.schedule.warmup_steps), recipe.steps)
    return value * (factor / at_change) if at_change > 0 else value


def update(recipe: Recipe, state: TrainState, batches: Batches, byte_lengths: np.ndarray) -> Step:
    """One optimizer update over `accumulation_steps` batches; advances `state` and reports it."""
    # Not around the whole loop: between events, a generator's caller runs in the same context.
    with using(recipe.impl):
        return _update(recipe, state, batches, byte_lengths)


def _update(recipe: Recipe, state: TrainState, batches: Batches, byte_lengths: np.ndarray) -> Step:
    began = time.perf_counter()
    step = state.step + 1
    for parameter in state.master.values():
        parameter.grad = None
    summed: dict[str, float] = {}
    load_LE: Tensor | None = None
    total, num_bytes = 0.0, 0
    for part in range(recipe.accumulation_steps):
        batch = batches.batch(state.step * recipe.accumulation_steps + part)
        terms, states = forward(recipe, state, batch)
        objective = weigh(terms, recipe) / recipe.accumulation_steps
        require_finite(float(objective.detach()), "loss", step)
        objective.backward()
        gather_gradients(state)
        total += float(objective.detach())
        for name, value in terms.named().items():
            summed[name] = summed.get(name, 0.0) + value / recipe.accumulation_steps
        loads = stacked_loads(states)
        load_LE = loads if load_LE is None else load_LE + loads
        num_bytes += int(byte_lengths[batch.tokens[:, 1 : recipe.sequence_length + 1]].sum())
    grad_norm = float(torch.nn.utils.clip_grad_norm_(list(state.master.values()), recipe.optimizer.max_grad_norm))
    require_finite(grad_norm, "gradient norm", step)
    rate = learning_rate(recipe, state, step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    state.copy_master_to_decoder()
    assert load_LE is not None
    bias_LE = move_biases(recipe, state, load_LE)
    state.step = step
    state.tokens_seen += recipe.tokens_per_step
    return Step(
        step=step,
        tokens_seen=state.tokens_seen,
        epochs=batches.epochs(step * recipe.accumulation_steps),
        losses_nats=summed,
        total_loss_nats=total,
        nats_per_byte=summed["next_token"] * recipe.tokens_per_step / max(1, num_bytes),
        learning_rate=rate,
        balance_speed=state.balance_speed or 0.0,
        grad_norm=grad_norm,
        layer_names=tuple(name for name, _ in recipe.model.expert_layers()),
        load_LE=load_LE.to(torch.int32).cpu().numpy(),
        bias_LE=bias_LE.cpu().numpy(),
        step_ms=(time.perf_counter() - began) * 1000,
    )


def forward(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[LossTerms, DecoderStates]:
    """The loss terms of one batch, and the pass that gave them."""
    length = recipe.sequence_length
    tokens = torch.from_numpy(batch.tokens).to(recipe.device)
    documents = torch.from_numpy(batch.documents).to(recipe.device)
    states = state.decoder.states(tokens[:, :length], lookahead=tokens[:, length : length + recipe.lookahead - 1])
    head = state.decoder.lm_head.weight
    return loss_terms(states, head, tokens, documents, balance_per=balance_per(recipe)), states


def balance_per(recipe: Recipe) -> int | None:
    """Over how many sequences the balance loss is judged; None: no such loss."""
    match recipe.balance:
        case AuxiliaryLoss(per="batch"):
            return 1
        case AuxiliaryLoss():
            return recipe.batch_size
        case LossFreeBias(sequence_coefficient=coefficient) if coefficient > 0:
            return recipe.batch_size
        case _:
            return None


def weigh(terms: LossTerms, recipe: Recipe) -> Tensor:
    """next token + mtp_weight / M x sum of depths + coefficient x balance + z_weight x z + indexer_weight x indexer.

    The last has gradients for the indexers alone, the others for all else. Clipping judges all gradients together.

    Source: DeepSeek-V3, arXiv 2412.19437, equation 25 (the mean over depths).
    """
    objective = terms.next_token + recipe.z_weight * terms.z
    if terms.mtp:
        objective = objective + recipe.mtp_weight * torch.stack(terms.mtp).mean()
    if terms.indexer is not None and recipe.indexer_weight > 0:
        objective = objective + recipe.indexer_weight * terms.indexer
    match recipe.balance:
        case AuxiliaryLoss(coefficient=coefficient) | LossFreeBias(sequence_coefficient=coefficient):
            objective = objective + coefficient * terms.balance
    return objective


def require_finite(value: float, what: str, step: int) -> None:
    """Stop before the update when `value` is not a finite number."""
    if not math.isfinite(value):
        raise FloatingPointError(f"the {what} of step {step} is {value}; the update was not made")


@torch.no_grad()
def gather_gradients(state: TrainState) -> None:
    """Add the computing weights' gradients to the float32 ones, where the two differ."""
    for name, parameter in state.decoder.named_parameters():
        master = state.master[name]
        if parameter is not master and parameter.grad is not None:
            wide = parameter.grad.to(master.dtype)
            master.grad = wide if master.grad is None else master.grad.add_(wide)
            parameter.grad = None


def stacked_loads(states: DecoderStates) -> Tensor:
    """Choices per expert layer and expert [L, E]."""
    loads = [routing.load for routing in states.routing if routing is not None]
    return torch.stack(loads) if loads else torch.zeros(0, 0, dtype=torch.int64)


def move_biases(recipe: Recipe, state: TrainState, load_LE: Tensor) -> Tensor:
    """Update every router's selection bias by its load of this step; returns them all [L, E], 0 where there is none."""
    gates = [module.gate for module in state.decoder.modules() if isinstance(module, MixtureOfExperts)]
    biases: list[Tensor] = []
    for gate, load_E in zip(gates, load_LE, strict=True):
        if not isinstance(gate, Router):  # a table of experts by token
            biases.append(torch.zeros_like(load_E, dtype=torch.float32))
            continue
        biases.append(bias := gate.e_score_correction_bias)
        if isinstance(recipe.balance, LossFreeBias) and state.balance_speed:
            bias.copy_(updated_bias(bias, load_E, speed=state.balance_speed, centred=recipe.balance.centred))
    return torch.stack(biases) if biases else torch.zeros(0, 0)
