"""The training loop: what it tells, what it can be told, and that it repeats to the bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from published_models import BUILT
from tiny import sparse_recipe, tiny_recipe

from workbench.model.config import SparseLatentAttention
from workbench.text import BytePairs
from workbench.train.events import Change, Checkpoint, Evaluation, Event, Spike, Step
from workbench.train.loop import apply_change, due_after, train
from workbench.train.recipes import AuxiliaryLoss, LossFreeBias, NoBalance, Recipe
from workbench.train.schedule import WarmupCosine
from workbench.train.spikes import SpikeDetector
from workbench.train.state import TrainState


def steps_of(events: Sequence[Event]) -> list[Step]:
    return [event for event in events if isinstance(event, Step)]


def losses_of(events: Sequence[Event]) -> list[dict[str, float]]:
    return [dict(step.losses_nats) for step in steps_of(events)]


def test_events_come_in_their_order() -> None:
    told = [(type(event).__name__, event.step) for event in train(tiny_recipe())]
    assert told == [
        ("Evaluation", 0),
        *[("Step", 1), ("Step", 2), ("Step", 3), ("Evaluation", 3), ("Checkpoint", 3)],
        *[("Step", 4), ("Step", 5), ("Step", 6), ("Evaluation", 6), ("Checkpoint", 6)],
    ]


def test_what_is_due_after_an_update_can_be_told_before_it_comes() -> None:
    recipe = tiny_recipe(steps=60, evaluate_every=5, checkpoint_every=7)
    state = TrainState(recipe)
    events = train(recipe, state)
    assert isinstance(next(events), Evaluation)
    seen: set[type[Event]] = set()
    while state.step < recipe.steps:
        threshold = SpikeDetector(state.recent_losses).threshold()
        step = next(events)
        assert isinstance(step, Step)
        # The weights are spoilt once, so that the loss leaves its band.
        if step.step == 31:
            apply_change(Change(learning_rate=1.0), state)
        due = due_after(recipe, step, threshold)
        for kind in due:
            event = next(events)
            assert type(event) is kind and event.step == step.step
        seen |= set(due)
    assert next(events, None) is None
    assert seen == {Spike, Evaluation, Checkpoint}


def test_a_step_reports_what_it_did() -> None:
    recipe = tiny_recipe(accumulation_steps=2)
    step = steps_of(list(train(recipe)))[-1]
    assert step.tokens_seen == 6 * 2 * 4 * 32
    assert step.layer_names == ("layer 1", "mtp 1")
    assert step.load_LE.shape == (2, 8) and (step.load_LE.sum(1) == 2 * 4 * 32 * 2).all()
    assert set(step.losses_nats) == {"next_token", "mtp_1", "balance", "z"}
    assert set(step.epochs) == {corpus.name for corpus in recipe.text.weights}
    assert step.total_loss_nats == pytest.approx(step.losses_nats["next_token"] + 0.3 * step.losses_nats["mtp_1"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_recipe_gives_the_same_bits(dtype: str) -> None:
    recipe = tiny_recipe(dtype=dtype)
    first, second = list(train(recipe)), list(train(recipe))
    assert losses_of(first) == losses_of(second)
    assert losses_of(first) != losses_of(list(train(replace(recipe, seed=1))))
    np.testing.assert_array_equal(steps_of(first)[-1].bias_LE, steps_of(second)[-1].bias_LE)


def test_the_form_of_the_ops_is_the_recipes_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition gives the losses of the fast form; twins are not to be had on a CPU, and nothing replaces them."""
    recipe = replace(tiny_recipe(), steps=3)
    module = sys.modules["workbench_kernels.linear_cross_entropy"]
    spy = Mock(wraps=module.reference)
    monkeypatch.setattr(module, "reference", spy)
    fast = [e for e in train(recipe) if isinstance(e, Step)]
    assert not spy.called
    defined = [e for e in train(replace(recipe, impl="reference")) if isinstance(e, Step)]
    assert spy.called
    for ours, theirs in zip(fast, defined, strict=True):
        assert ours.total_loss_nats == pytest.approx(theirs.total_loss_nats, rel=1e-5)
    with pytest.raises(ValueError, match="runs on a CPU only with TRITON_INTERPRET=1"):
        list(train(replace(recipe, impl="fused")))


def test_it_learns() -> None:
    evaluations = [e for e in train(tiny_recipe(steps=120, evaluate_every=60)) if isinstance(e, Evaluation)]
    assert evaluations[0].nats_per_token == pytest.approx(np.log(256), abs=0.2)
    assert evaluations[-1].nats_per_byte < evaluations[-1].floors_nats_per_byte["unigram"]
    assert evaluations[0].floors_nats_per_byte == evaluations[-1].floors_nats_per_byte
    assert evaluations[-1].mtp_accuracy[1] > evaluations[0].mtp_accuracy[1]


def test_it_trains_on_byte_pairs() -> None:
    model = replace(tiny_recipe().model, vocab_size=300)
    events = list(train(tiny_recipe(tokenizer=BytePairs(vocab_size=300), model=model, steps=40, evaluate_every=40)))
    first, last = (event for event in events if isinstance(event, Evaluation))
    assert first.nats_per_token == pytest.approx(np.log(300), abs=0.2)
    assert last.nats_per_token < first.nats_per_token - 1
    # A token is worth more than one byte, and the loss is told per byte.
    assert last.nats_per_byte < last.nats_per_token


def test_accumulating_equals_one_larger_batch() -> None:
    # Balance moves by the sign of the load, the same for both; the data of two small batches are those of one large.
    large = steps_of(list(train(tiny_recipe(batch_size=8, steps=3))))
    small = steps_of(list(train(tiny_recipe(batch_size=4, accumulation_steps=2, steps=3))))
    for one, two in zip(large, small, strict=True):
        assert one.losses_nats["next_token"] == pytest.approx(two.losses_nats["next_token"], rel=1e-4)
        assert one.tokens_seen == two.tokens_seen
    np.testing.assert_array_equal(large[0].load_LE, small[0].load_LE)


def test_bfloat16_compute_stays_near_float32() -> None:
    wide, narrow = (losses_of(list(train(tiny_recipe(dtype=dtype)))) for dtype in ("float32", "bfloat16"))
    for one, two in zip(wide, narrow, strict=True):
        assert one["next_token"] == pytest.approx(two["next_token"], abs=0.05)


def send(recipe: Recipe, changes: dict[int, Change]) -> list[Event]:
    """All events of a run that is told `changes[s]` in answer to the Step s."""
    trainer = train(recipe)
    events: list[Event] = [next(trainer)]
    while True:
        event = events[-1]
        change = changes.get(event.step) if isinstance(event, Step) else None
        try:
            events.append(trainer.send(change))
        except StopIteration:
            return events


def test_a_change_holds_from_the_next_update_on() -> None:
    plain = steps_of(list(train(tiny_recipe())))
    told = steps_of(send(tiny_recipe(), {3: Change(learning_rate=1e-4, balance_speed=0.5)}))
    assert [s.learning_rate for s in told[:3]] == [s.learning_rate for s in plain[:3]]
    assert told[3].learning_rate == 1e-4 and told[3].balance_speed == 0.5
    # The schedule goes on in proportion.
    assert told[5].learning_rate / told[3].learning_rate == pytest.approx(
        plain[5].learning_rate / plain[3].learning_rate
    )
    assert np.abs(told[3].bias_LE - told[2].bias_LE).max() == pytest.approx(0.5)
    assert losses_of(told[:4]) == losses_of(plain[:4]) and losses_of(told) != losses_of(plain)


def test_a_change_during_warmup_is_held_and_never_multiplied() -> None:
    schedule = WarmupCosine(warmup_steps=4)
    told = steps_of(send(tiny_recipe(steps=8, schedule=schedule), {1: Change(learning_rate=1e-3)}))
    assert [s.learning_rate for s in told[1:4]] == [1e-3] * 3
    after = [s.learning_rate for s in told[4:]]
    assert after == sorted(after, reverse=True) and after[0] < 1e-3
    assert after[0] == pytest.approx(1e-3 * schedule.factor(5, 8))


def test_a_balance_speed_where_nothing_balances_by_one_is_refused() -> None:
    with pytest.raises(ValueError, match="balance_speed has no effect in this run"):
        send(tiny_recipe(balance=NoBalance()), {1: Change(balance_speed=0.1)})
    assert {s.balance_speed for s in steps_of(list(train(tiny_recipe(balance=AuxiliaryLoss()))))} == {0.0}


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_change_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="learning_rate="):
        Change(learning_rate=bad)


def trained_and_saved(recipe: Recipe) -> tuple[list[Event], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """All events of a run, and copies of what its checkpoint of step 3 holds."""
    events, saved = [], None
    for event in train(recipe):
        events.append(event)
        if isinstance(event, Checkpoint) and event.step == 3:
            tensors, values = event.state.parts()
            saved = {name: tensor.clone() for name, tensor in tensors.items()}, values
    assert saved is not None
    return events, saved


@pytest.mark.parametrize(
    "balance", [LossFreeBias(sequence_coefficient=0.01), LossFreeBias(centred=True), AuxiliaryLoss(), NoBalance()]
)
def test_resuming_from_parts_continues_bitwise(balance) -> None:
    recipe = tiny_recipe(accumulation_steps=2, balance=balance, dtype="float32")
    events, saved = trained_and_saved(recipe)
    resumed = list(train(recipe, TrainState.from_parts(recipe, *saved)))
    assert losses_of(resumed) == losses_of(events)[3:]
    np.testing.assert_array_equal(steps_of(resumed)[-1].bias_LE, steps_of(events)[-1].bias_LE)


def compressed_recipe() -> Recipe:
    """DeepSeek-V4 in small: nothing teaches its indexer."""
    model = replace(BUILT["deepseek_v4"], vocab_size=256)
    return tiny_recipe(model=model, balance=NoBalance())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", [sparse_recipe(), sparse_recipe(indexer_weight=0.0), compressed_recipe()])
def test_resuming_weights_that_nothing_trains_continues_bitwise(recipe: Recipe, dtype: str) -> None:
    recipe = replace(recipe, dtype=dtype)
    events, saved = trained_and_saved(recipe)
    tensors, idle = saved[0], saved[1]["without_moments"]
    for name, weight in TrainState(recipe).master.items():
        assert torch.equal(weight, tensors[f"parameter.{name}"]) == (name in idle), name
    assert all("indexer" in name for name in idle)
    taught = recipe.indexer_weight > 0 and isinstance(recipe.model.layers[0].attention, SparseLatentAttention)
    assert bool(idle) == (not taught)
    resumed = list(train(recipe, TrainState.from_parts(recipe, *saved)))
    assert losses_of(resumed) == losses_of(events)[3:]


def test_the_indexers_learn_from_what_attention_reads() -> None:
    ends = {}
    for weight in (0.0, 1.0):
        steps = steps_of(list(train(sparse_recipe(steps=80, evaluate_every=80, indexer_weight=weight))))
        ends[weight] = np.mean([step.losses_nats["indexer"] for step in steps[-10:]])
    assert 0 < ends[1.0] < 0.5 * ends[0.0]


def test_a_state_with_an_entry_missing_or_wrong_is_refused() -> None:
    recipe = tiny_recipe(steps=1, checkpoint_every=1)
    state = next(event.state for event in train(recipe) if isinstance(event, Checkpoint))
    tensors, values = state.parts()
    assert {name.split(".")[0] for name in tensors} == {"parameter", "buffer", "exp_avg", "exp_avg_sq"}
    for name in tensors:
        with pytest.raises(ValueError, match="lacks tensor"):
            TrainState.from_parts(recipe, {k: v for k, v in tensors.items() if k != name}, values)
    for name in values:
        with pytest.raises(ValueError, match="lacks"):
            TrainState.from_parts(recipe, tensors, {k: v for k, v in values.items() if k != name})
    with pytest.raises(ValueError, match="has tensor 'stowaway'"):
        TrainState.from_parts(recipe, {**tensors, "stowaway": torch.zeros(1)}, values)
    with pytest.raises(ValueError, match=r"parameter.norm.weight is float32 \[3\]; this recipe needs float32 \[32\]"):
        TrainState.from_parts(recipe, {**tensors, "parameter.norm.weight": torch.zeros(3)}, values)


def test_a_loss_that_is_not_finite_stops_before_the_update() -> None:
    recipe = tiny_recipe()
    state = TrainState(recipe)
    trainer = train(recipe, state)
    assert isinstance(next(trainer), Evaluation)
    with torch.no_grad():
        state.decoder.lm_head.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in state.parts()[0].items()}
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan; the update was not made"):
        next(trainer)
    assert state.step == 0
    for name, tensor in state.parts()[0].items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_validation_loss_that_is_not_finite_stops_too() -> None:
    state = TrainState(tiny_recipe())
    with torch.no_grad():
        state.decoder.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="the validation loss after step 0 is"):
        next(train(tiny_recipe(), state))


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    recipe = tiny_recipe()
    with pytest.raises(ValueError, match="vocab_size=300 must be the tokenizer's 256"):
        next(train(replace(recipe, model=replace(recipe.model, vocab_size=300))))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_balancing_balances(seed: int) -> None:
    """With it the bias moves, no expert is dead and the load is more even than without."""

    def late_loads(recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
        steps = steps_of(list(train(recipe)))
        return np.sum([step.load_LE for step in steps[-20:]], axis=0), steps[-1].bias_LE

    recipe = tiny_recipe(steps=150, seed=seed, evaluate_every=150, checkpoint_every=150)
    free, no_bias = late_loads(replace(recipe, balance=NoBalance()))
    balanced, bias = late_loads(replace(recipe, balance=LossFreeBias(speed=0.02)))
    assert not no_bias.any() and bias.any(axis=1).all()
    mean = balanced.mean(axis=1, keepdims=True)
    assert (balanced > 0.01 * mean).all(), "an expert is dead"
    assert (balanced.max(1) / balanced.mean(1)).max() < (free.max(1) / free.mean(1)).max()
