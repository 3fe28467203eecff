"""Losses, schedules, optimizer groups, spikes, memory and recipes, each by itself."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_recipe
from torch import nn

from workbench.blocks.router import Router
from workbench.model.config import MixtureOfExperts
from workbench.model.decoder import Decoder, DecoderStates
from workbench.train import memory
from workbench.train.events import Step
from workbench.train.loop import balance_per, train, weigh
from workbench.train.losses import LossTerms, loss_terms, mtp_inside, mtp_loss, mtp_targets
from workbench.train.optimizer import AdamW, build_optimizer
from workbench.train.recipes import AuxiliaryLoss, LossFreeBias, NoBalance, Recipe, small_v3, toy_v3
from workbench.train.schedule import WarmupCosine, WarmupStableDecay
from workbench.train.spikes import FACTOR, MINIMUM_SCALE_NATS, SpikeDetector
from workbench.train.state import TrainState


def test_next_token_and_z_terms_by_hand() -> None:
    """A head that hands on the states, which so are logits."""
    states = DecoderStates(torch.tensor([[[0.0, math.log(3.0)], [math.log(3.0), 0.0]]]), (), (), ())
    tokens, documents = torch.tensor([[0, 1, 1]]), torch.zeros(1, 3, dtype=torch.int32)
    terms = loss_terms(states, torch.eye(2), tokens, documents, balance_per=None)
    assert float(terms.next_token) == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    assert float(terms.z) == pytest.approx(math.log(4) ** 2)
    assert terms.named() == {
        "next_token": pytest.approx(float(terms.next_token)),
        "balance": 0.0,
        "z": pytest.approx(float(terms.z)),
    }


def test_depth_one_predicts_two_ahead_and_stays_within_its_document() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    documents = torch.tensor([[1, 1, 1, 2, 2]])
    assert mtp_targets(tokens, 3, 1).tolist() == [[7, 8, 9]]
    assert mtp_inside(documents, 3, 1).tolist() == [[True, False, False]]
    hidden, head = torch.randn(1, 3, 6), torch.randn(10, 6)
    expected = F.cross_entropy(hidden[:, 0] @ head.T, torch.tensor([7]))
    torch.testing.assert_close(mtp_loss(hidden, head, tokens, documents, 1), expected)
    hidden[:, 1:] += 1e4
    torch.testing.assert_close(mtp_loss(hidden, head, tokens, documents, 1), expected)
    assert mtp_loss(hidden, head, tokens, torch.arange(5)[None], 1) == 0


def test_the_balance_term_reaches_the_router() -> None:
    torch.manual_seed(0)
    recipe = tiny_recipe(balance=AuxiliaryLoss(per="sequence"))
    decoder = Decoder(recipe.model)
    tokens = torch.randint(0, 256, (4, 34))
    states = decoder.states(tokens[:, :32], lookahead=tokens[:, 32:33])
    terms = loss_terms(states, decoder.lm_head.weight, tokens, torch.zeros_like(tokens), balance_per=4)
    assert float(terms.balance.detach()) >= len(recipe.model.expert_layers())
    terms.balance.backward()
    gates = [module.weight.grad for module in decoder.modules() if isinstance(module, Router)]
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gates)


def test_cosine_schedule() -> None:
    schedule = WarmupCosine(warmup_steps=4, final_fraction=0.1)
    assert [schedule.factor(s, 12) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert schedule.factor(8, 12) == pytest.approx(0.55)
    assert schedule.factor(12, 12) == schedule.factor(99, 12) == pytest.approx(0.1)


def test_warmup_stable_decay_schedule() -> None:
    schedule = WarmupStableDecay(warmup_steps=2, decay_steps=4)
    assert [schedule.factor(s, 10) for s in (1, 2, 3, 6)] == [0.5, 1.0, 1.0, 1.0]
    assert schedule.factor(7, 10) == pytest.approx(1 - math.sqrt(0.25))
    assert schedule.factor(10, 10) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupCosine(warmup_steps=-1), "warmup_steps=-1 must be 0 or more"),
        (
            lambda: WarmupStableDecay(warmup_steps=1, decay_steps=1, final_fraction=2.0),
            "final_fraction=2.0 must lie in 0..1",
        ),
        (lambda: AdamW(learning_rate=0.0), "learning_rate=0.0 must be a positive finite number"),
        (lambda: AdamW(learning_rate=1e-3, beta2=1.0), "beta2=1.0 must lie in"),
        (lambda: AuxiliaryLoss(coefficient=0.0), "NoBalance leaves it out"),
        (lambda: LossFreeBias(speed=-1.0), "speed=-1.0 must be 0 or"),
        (
            lambda: tiny_recipe(sequence_length=129),
            r"sequence_length=129 must lie in 1..128 \(max_position_embeddings\)",
        ),
        (lambda: tiny_recipe(steps=0), "steps=0 must be a whole number above 0"),
        (lambda: tiny_recipe(seed=-1), "seed=-1 must be"),
        (lambda: tiny_recipe(seed=2**70), "must be a whole number in 0..2"),
        (lambda: tiny_recipe(sample_prompt=""), "sample_prompt='' must hold text"),
        (lambda: tiny_recipe(num_threads=0), "num_threads=0 must be a whole number above 0, or None"),
    ],
)
def test_bad_settings_get_one_line(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_gains_do_not_decay_and_matrices_do() -> None:
    named = {"matrix": nn.Parameter(torch.ones(2, 2)), "gain": nn.Parameter(torch.ones(2))}
    optimizer = build_optimizer(AdamW(learning_rate=0.1, weight_decay=0.5), named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(named["matrix"].detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(named["gain"].detach(), torch.ones(2))


def test_spikes_need_history_and_height() -> None:
    detector = SpikeDetector([])
    assert detector.threshold() == math.inf
    for i in range(40):
        detector.add(2.0 + 0.001 * (i % 2))
    assert detector.threshold() == pytest.approx(2.0005 + FACTOR * MINIMUM_SCALE_NATS, abs=1e-3)
    for _ in range(200):
        detector.add(5.0)
    assert len(detector.recent) == 50 and detector.threshold() > 5.0


@pytest.mark.parametrize(
    "recipe",
    [
        toy_v3(),
        small_v3(),
        tiny_recipe(balance=NoBalance(), schedule=WarmupStableDecay(warmup_steps=1, decay_steps=2)),
        tiny_recipe(balance=AuxiliaryLoss(per="sequence"), dtype="bfloat16", num_threads=None),
    ],
)
def test_recipes_round_trip_exactly(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_file_cannot_name_classes_of_its_own() -> None:
    text = tiny_recipe().to_json()
    with pytest.raises(ValueError, match="unknown kind 'Popen'"):
        Recipe.from_json(text.replace('"LossFreeBias"', '"Popen"'))
    with pytest.raises(ValueError, match="unknown field 'sed'"):
        Recipe.from_json(text.replace('"seed"', '"sed"'))
    with pytest.raises(ValueError, match="dtype='float16' must be one of 'float32', 'bfloat16'"):
        Recipe.from_json(text.replace('"dtype": "float32"', '"dtype": "float16"'))
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.from_json(text[:-5])


def test_loss_free_balance_needs_a_selection_bias() -> None:
    recipe = tiny_recipe()
    sparse = recipe.model.layers[1]
    assert isinstance(sparse.feed_forward, MixtureOfExperts)
    greedy = replace(sparse, feed_forward=replace(sparse.feed_forward, topk_method="greedy", n_group=1, topk_group=1))
    model = replace(recipe.model, layers=(recipe.model.layers[0], greedy), mtp_layers=())
    with pytest.raises(ValueError, match="LossFreeBias needs topk_method='noaux_tc'; layer 1 has 'greedy'"):
        replace(recipe, model=model)


def test_layers_of_different_numbers_of_experts_are_refused() -> None:
    model = tiny_recipe().model
    wide = replace(model.layers[1], feed_forward=replace(model.layers[1].feed_forward, n_routed_experts=16))
    with pytest.raises(ValueError, match=r"expert layers of \[8, 16\] experts: all must have one number"):
        tiny_recipe(model=replace(model, layers=(*model.layers, wide)))


def test_what_cannot_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.refuse_what_cannot_fit(tiny_recipe())
    assert memory.estimate_bytes(toy_v3()) > 16 * 10_000_000
    assert memory.estimate_bytes(tiny_recipe(batch_size=8)) > memory.estimate_bytes(tiny_recipe(batch_size=4))
    long = tiny_recipe(sequence_length=128)
    assert memory.estimate_bytes(long) > 3 * memory.estimate_bytes(tiny_recipe()) / 2
    num_logits, recipe = 256 * 4 * 32, tiny_recipe()
    assert memory.logits_bytes(num_logits, recipe) == 4 * num_logits
    assert memory.logits_bytes(num_logits, replace(recipe, impl="reference")) == 3 * 4 * num_logits * recipe.lookahead
    assert memory.logits_bytes(10**12, recipe) == 2**29
    weights = {
        change: memory.kept_weights_per_query(recipe.model.layers[0], replace(recipe, **dict([change])))
        for change in (("impl", "auto"), ("impl", "reference"), ("device", "cuda"))
    }
    assert list(weights.values()) == [2 * 32 // 2, 2 * 2 * 32, 0]
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    memory.refuse_what_cannot_fit(tiny_recipe())
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1_000_000)
    with pytest.raises(ValueError, match=r"tiny needs about .* GB on cpu, 0.0 GB are free; make batch_size") as caught:
        memory.refuse_what_cannot_fit(tiny_recipe())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device='gpu' must be cpu, cuda"),
        ("meta", "device='meta' must be cpu, cuda"),
        ("cuda:99", "device='cuda:99' is not on this machine"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        memory.refuse_what_cannot_fit(tiny_recipe(device=device))
    assert "\n" not in str(caught.value)


def test_a_container_limit_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.container_bytes() is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1500\nactive_file 100\ninactive_file 400\n")
    assert memory.container_bytes() == 3400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.container_bytes() is None


def test_a_corpus_that_is_no_mixture_is_refused() -> None:
    # In a process of its own: in this one the types are checked first.
    code = "import dataclasses, workbench; dataclasses.replace(workbench.toy_v3(), text=workbench.StdlibCode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: text=StdlibCode() must be a Mixture; one corpus alone is Mixture({corpus: 1})" in done.stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"z_weight": 0.25}, lambda t: t.next_token + 0.25 * t.z + 0.3 * t.mtp[0]),
        ({"mtp_weight": 0.5}, lambda t: t.next_token + 0.5 * t.mtp[0]),
        ({"mtp_weight": 0.0, "indexer_weight": 0.5}, lambda t: t.next_token + 0.5 * t.indexer),
        ({"mtp_weight": 0.0, "indexer_weight": 0.0}, lambda t: t.next_token),
        ({"balance": AuxiliaryLoss(coefficient=0.5)}, lambda t: t.next_token + 0.3 * t.mtp[0] + 0.5 * t.balance),
        (
            {"balance": LossFreeBias(sequence_coefficient=0.5)},
            lambda t: t.next_token + 0.3 * t.mtp[0] + 0.5 * t.balance,
        ),
    ],
)
def test_the_objective_weighs_every_term(changes: dict, expected) -> None:
    indexer = torch.tensor(11.0) if "indexer_weight" in changes else None
    terms = LossTerms(torch.tensor(2.0), (torch.tensor(3.0),), torch.tensor(5.0), torch.tensor(7.0), indexer)
    assert float(weigh(terms, tiny_recipe(**changes))) == pytest.approx(float(expected(terms)))


def test_two_depths_count_by_their_mean() -> None:
    terms = LossTerms(torch.tensor(2.0), (torch.tensor(3.0), torch.tensor(5.0)), torch.tensor(0.0), torch.tensor(0.0))
    assert float(weigh(terms, tiny_recipe(mtp_weight=0.5))) == pytest.approx(2 + 0.5 * 4)


def test_balance_is_judged_per_batch_or_per_sequence() -> None:
    judged = [
        balance_per(tiny_recipe(balance=balance))
        for balance in (AuxiliaryLoss(per="batch"), AuxiliaryLoss(per="sequence"), LossFreeBias(), NoBalance())
    ]
    assert judged == [1, tiny_recipe().batch_size, None, None]


def test_the_gradient_is_clipped_before_the_update() -> None:
    recipe = tiny_recipe(optimizer=AdamW(learning_rate=1e-3, max_grad_norm=1e-3))
    state = TrainState(recipe)
    events = train(recipe, state)
    steps = [next(events) for _ in range(2)]
    assert isinstance(steps[1], Step) and steps[1].grad_norm > 0.01  # told as it was
    gradients = [parameter.grad for parameter in state.master.values() if parameter.grad is not None]
    squares = sum(float(gradient.square().sum()) for gradient in gradients)
    assert squares**0.5 == pytest.approx(1e-3, rel=1e-3)
