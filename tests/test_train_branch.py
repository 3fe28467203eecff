"""Branching: a new run whose first weights are those of a model that was trained or imported before."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor

from workbench import live
from workbench.live.launch import fingerprint
from workbench.model.config import LayerConfig, MixtureOfExperts
from workbench.model.decoder import Decoder
from workbench.model.pretrained import load as load_pretrained
from workbench.model.pretrained import save as save_pretrained
from workbench.text import Text, load
from workbench.train.events import Checkpoint, Step
from workbench.train.loop import train
from workbench.train.recipes import AuxiliaryLoss, NoBalance, Recipe
from workbench.train.state import TrainState


@pytest.fixture(scope="module")
def text() -> Text:
    recipe = tiny_recipe()
    return load(recipe.text, recipe.tokenizer)


@pytest.fixture(scope="module")
def trained(text: Text) -> TrainState:
    events = train(replace(tiny_recipe(), steps=6, checkpoint_every=6), text=text)
    return next(event.state for event in events if isinstance(event, Checkpoint))


def with_experts(recipe: Recipe, change: Callable[[MixtureOfExperts], MixtureOfExperts]) -> Recipe:
    def changed(layer: LayerConfig) -> LayerConfig:
        experts = layer.feed_forward
        return replace(layer, feed_forward=change(experts)) if isinstance(experts, MixtureOfExperts) else layer

    model = recipe.model
    layers, mtp_layers = (tuple(changed(layer) for layer in group) for group in (model.layers, model.mtp_layers))
    return replace(recipe, model=replace(model, layers=layers, mtp_layers=mtp_layers))


def all_tensors(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in decoder.state_dict().items()}


def test_a_branch_begins_with_the_weights_and_no_moments(trained: TrainState) -> None:
    before = all_tensors(trained.decoder)
    state = TrainState.from_decoder(tiny_recipe(seed=5), trained.decoder)
    assert state.step == 0 and not state.optimizer.state
    for name, tensor in state.decoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
        assert tensor.data_ptr() != trained.decoder.state_dict()[name].data_ptr(), "a copy"


@pytest.mark.parametrize(
    "recipe",
    [
        with_experts(tiny_recipe(), lambda experts: replace(experts, num_experts_per_tok=1)),
        with_experts(tiny_recipe(), lambda experts: replace(experts, routed_scaling_factor=1.0)),
        replace(tiny_recipe(), balance=AuxiliaryLoss()),
        replace(tiny_recipe(), dtype="bfloat16"),
    ],
    ids=["top-k", "scale", "balance", "bfloat16"],
)
def test_a_changed_configuration_trains_on_from_the_learned_loss(
    recipe: Recipe, trained: TrainState, text: Text
) -> None:
    recipe = replace(recipe, steps=1)
    branched = next(e for e in train(recipe, TrainState.from_decoder(recipe, trained.decoder), text) if type(e) is Step)
    fresh = next(e for e in train(recipe, text=text) if type(e) is Step)
    assert branched.step == 1
    assert branched.losses_nats["next_token"] < fresh.losses_nats["next_token"] - 0.1


def test_shapes_that_differ_are_refused_in_one_line(trained: TrainState) -> None:
    wider = with_experts(tiny_recipe(), lambda experts: replace(experts, moe_intermediate_size=48))
    with pytest.raises(ValueError, match=r"^the given model's layers\.1\..*proj is \[.*\]; the recipe's needs \[.*\]$"):
        TrainState.from_decoder(wider, trained.decoder)
    model = tiny_recipe().model
    without_mtp = replace(tiny_recipe(), model=replace(model, mtp_layers=()))
    with pytest.raises(ValueError, match=r"^the given model has mtp_layers\.0\..*, which the recipe's model has not$"):
        TrainState.from_decoder(without_mtp, trained.decoder)
    with pytest.raises(ValueError, match=r"^the given model has no mtp_layers\.0\..*"):
        TrainState.from_decoder(tiny_recipe(), Decoder(without_mtp.model))


def test_an_imported_model_trains_and_its_fingerprint_is_recorded(
    trained: TrainState, text: Text, tmp_path: Path
) -> None:
    save_pretrained(trained.decoder, tmp_path / "published")
    imported = load_pretrained(tmp_path / "published", progress=False)
    recipe = replace(tiny_recipe(), model=imported.config, balance=NoBalance(), steps=2)
    run = live.start(recipe, tmp_path / "runs" / "branch", text=text, weights_of=imported)
    run.wait()
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["hardware"]["initial_weights"] == fingerprint(trained.decoder) == fingerprint(imported)
    by_hand = train(recipe, TrainState.from_decoder(recipe, imported), text)
    losses = [event.losses_nats["next_token"] for event in by_hand if isinstance(event, Step)]
    assert list(run.snapshot().series["next_token"].values) == losses


def test_a_branch_goes_on_from_its_own_weights(trained: TrainState, text: Text, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(), steps=2)
    whole = live.start(recipe, tmp_path / "whole", text=text, weights_of=trained.decoder)
    whole.wait()
    halted = live.start(recipe, tmp_path / "halted", text=text, weights_of=trained.decoder, paused=True)
    halted.stop()
    resumed = live.resume(tmp_path / "halted", text=text)
    resumed.wait()
    for name, tensor in live.decoder(resumed.folder).state_dict().items():
        torch.testing.assert_close(tensor, live.decoder(whole.folder).state_dict()[name], rtol=0, atol=0)


def test_weights_that_do_not_fit_stop_no_run_and_make_no_folder(
    trained: TrainState, text: Text, tmp_path: Path
) -> None:
    run = live.start(tiny_recipe(), tmp_path / "running", text=text, paused=True)
    wider = with_experts(tiny_recipe(), lambda experts: replace(experts, moe_intermediate_size=48))
    with pytest.raises(ValueError, match="the given model's"):
        live.start(wider, tmp_path / "other", text=text, weights_of=trained.decoder)
    assert not (tmp_path / "other").exists()
    assert run.snapshot().status not in ("stopped", "failed")
    run.stop()
