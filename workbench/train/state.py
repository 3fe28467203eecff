"""Everything a run needs to go on exactly as if it had never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from workbench.model.decoder import Decoder
from workbench.train.optimizer import build_optimizer
from workbench.train.recipes import LossFreeBias, Recipe


class TrainState:
    """Model, optimizer moments, counters and what was changed on the way.

    The data position is `step` itself: batches are a pure function of it. Training draws no random numbers after the
    initial weights, so there is no generator to keep. `learning_rate_anchor` is the last change (its step and value);
    `balance_speed` is None where no bias balances.
    A weight that no term of the objective reaches has no moments, and no update moves it.
    With a bfloat16 recipe `decoder` computes and `master` holds the float32 weights that the optimizer moves.
    """

    def __init__(self, recipe: Recipe) -> None:
        devices = [recipe.device] if recipe.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(recipe.seed)
            self.decoder = Decoder(recipe.model).to(recipe.device)
        self.master = dict(self.decoder.named_parameters())
        if recipe.dtype == "bfloat16":
            self.master = {name: nn.Parameter(p.detach().clone()) for name, p in self.master.items()}
            self.decoder.to(torch.bfloat16)
        self.optimizer = build_optimizer(recipe.optimizer, self.master)
        self.step = 0
        self.tokens_seen = 0
        self.learning_rate_anchor: tuple[int, float] | None = None
        self.balance_speed = recipe.balance.speed if isinstance(recipe.balance, LossFreeBias) else None
        self.recent_losses: list[float] = []

    def parts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and plain values that `from_parts` builds an equal state from; the tensors are not copied."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.master.items()}
        tensors |= {f"buffer.{name}": b for name, b in self.decoder.named_buffers()}
        for name, parameter in self.master.items():
            moments = self.optimizer.state.get(parameter)
            if moments:
                tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        values = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "learning_rate_anchor": list(self.learning_rate_anchor) if self.learning_rate_anchor else None,
            "balance_speed": self.balance_speed,
            "recent_losses": list(self.recent_losses),
            "without_moments": [name for name, p in self.master.items() if not self.optimizer.state.get(p)],
        }
        return tensors, values

    @classmethod
    def from_parts(cls, recipe: Recipe, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> TrainState:
        """The state that `parts` described.

        Raises:
            ValueError: an entry is missing, unknown, or has another shape than the recipe's model gives it.
        """
        state = cls(recipe)
        _require_equal_keys(state.parts()[1].keys(), values.keys(), "value")
        state.allocate_moments(without=values["without_moments"])
        state.fill(tensors)
        state.step = values["step"]
        state.tokens_seen = values["tokens_seen"]
        anchor = values["learning_rate_anchor"]
        state.learning_rate_anchor = None if anchor is None else (anchor[0], anchor[1])
        state.balance_speed = values["balance_speed"]
        state.recent_losses = list(values["recent_losses"])
        for parameter in state.master.values():
            if parameter in state.optimizer.state:
                state.optimizer.state[parameter]["step"].fill_(state.step)
        return state

    @torch.no_grad()
    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy saved tensors into those that there are: weights and buffers, and moments once they are allocated.

        Raises:
            ValueError: a tensor is missing, unknown, or has another shape than the recipe's model gives it.
        """
        wanted, _ = self.parts()
        _require_equal_keys(wanted.keys(), tensors.keys(), "tensor")
        for name, tensor in wanted.items():
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise ValueError(
                    f"saved tensor {name} is {_describe(tensors[name])}; this recipe needs {_describe(tensor)}"
                )
            tensor.copy_(tensors[name])
        self.copy_master_to_decoder()

    @classmethod
    def from_decoder(cls, recipe: Recipe, decoder: Decoder) -> TrainState:
        """A state at step 0 whose weights are those of `decoder`, imported or trained before; they are copied.

        The recipe's model may differ from the decoder's wherever no tensor changes its shape: another number of experts
        per token, scale of the routed experts, RoPE base. A selection bias is taken over too, and stays as it is unless
        the recipe balances by it.

        Raises:
            ValueError: a tensor is missing, unknown, or has another shape than the recipe's model gives it.
        """
        refuse_other_shapes(recipe, decoder)
        state = cls(recipe)
        given = decoder.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in (*state.master.items(), *state.decoder.named_buffers()):
                tensor.copy_(given[name])
        state.copy_master_to_decoder()
        return state

    def allocate_moments(self, *, without: Sequence[str] = ()) -> None:
        """Give every parameter but those named in `without` zero moments, as the first update would."""
        for name, parameter in self.master.items():
            if name in without:
                continue
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def copy_master_to_decoder(self) -> None:
        """Bring the computing weights up to date with the float32 ones, where the two differ."""
        for name, parameter in self.decoder.named_parameters():
            if parameter is not self.master[name]:
                parameter.copy_(self.master[name])


def refuse_other_shapes(recipe: Recipe, decoder: Decoder) -> None:
    """Raise `ValueError`, in one line, unless every tensor of `decoder` has its place in the recipe's model."""
    with torch.device("meta"):
        wanted = Decoder(recipe.model).state_dict()
    given = decoder.state_dict()
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            raise ValueError(f"the given model has no {name}, which the recipe's model has {list(wanted[name].shape)}")
        if name not in wanted:
            raise ValueError(f"the given model has {name} {list(given[name].shape)}, which the recipe's model has not")
        if given[name].shape != wanted[name].shape:
            raise ValueError(
                f"the given model's {name} is {list(given[name].shape)}; the recipe's needs {list(wanted[name].shape)}"
            )


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _require_equal_keys(wanted: Any, given: Any, kind: str) -> None:
    missing, extra = sorted(wanted - given), sorted(given - wanted)
    if missing:
        raise ValueError(
            f"the saved state lacks {kind} {missing[0]!r} ({len(missing)} missing): damaged, or older than this code"
        )
    if extra:
        raise ValueError(
            f"the saved state has {kind} {extra[0]!r}, which this recipe does not know ({len(extra)} extra)"
        )
