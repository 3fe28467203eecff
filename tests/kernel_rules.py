"""The one rule that every kernel obeys, written once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Op = Callable[..., Tensor]
Pair = Callable[..., tuple[Tensor, Tensor]]

ODD_SIZES = (1, 60, 129)

# Where the twins run: on a GPU, or else in Triton's interpreter, which cannot round bfloat16.
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


def assert_obeys_rule(candidate: Op, reference: Op, inputs: Sequence[Tensor]) -> None:
    """Output and every gradient: as exact as the reference allows, and the same bits in every run.

    The error against the float64 reference is at most twice that of the reference in the inputs' own dtype,
    plus two roundings of the largest value. The second run finds NaN in all memory that it does not write. The output
    without gradients, which may take another way, obeys the same.
    """
    alone = without_gradients(candidate, inputs)
    grad = torch.randn_like(alone)
    found = [alone, *results(candidate, inputs, grad)]
    with uninitialized_memory_is_nan():
        again = [without_gradients(candidate, inputs), *results(candidate, inputs, grad)]
    own = results(reference, inputs, grad)
    exact = results(reference, [widened(tensor) for tensor in inputs], grad.double())
    own, exact = [own[0], *own], [exact[0], *exact]
    for index, (ours, second, theirs, truth) in enumerate(zip(found, again, own, exact, strict=True)):
        name = ("output without gradients", "output")[index] if index < 2 else f"gradient {index - 2}"
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert torch.equal(ours, second), f"{name} differs between two runs"
        assert_exact(name, ours, theirs, truth)


def assert_obeys_rule_of_sum(candidate: Pair, reference: Pair, x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """The rule for a norm of a sum, whose two outputs both lead on: each in turn, and both together."""
    for coefficients in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0)):

        def mixed(op: Pair, coefficients: tuple[float, float] = coefficients) -> Op:
            def of_both(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
                y, total = op(x, residual, weight)
                return torch.cat((coefficients[0] * y, coefficients[1] * total))

            return of_both

        assert_obeys_rule(mixed(candidate), mixed(reference), (x, residual, weight))


def assert_exact(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """The error of `ours` is at most twice that of `theirs`, plus two roundings of the largest value."""
    if truth.numel():
        allowed = 2 * largest(theirs.double() - truth) + 2 * torch.finfo(ours.dtype).eps * largest(truth)
        error = largest(ours.double() - truth)
        assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g}"


def results(op: Op, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of `op` and the gradient of each of its floating inputs."""
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = op(*leaves)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def without_gradients(op: Op, inputs: Sequence[Tensor]) -> Tensor:
    """The output of `op` where nothing is recorded."""
    with torch.inference_mode():
        return op(*inputs).clone()


def turned(op: Op, interleaved: bool, cos: Tensor, sin: Tensor) -> Op:
    """A rotation as a function of what it turns; every run of the rule has the same angles."""

    def turn(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return op(x, cos.to(wide), sin.to(wide), interleaved=interleaved)

    return turn


def widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Let `torch.empty` return NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def most_bytes(function: Callable[[], object]) -> int:
    """The most bytes that the tensors which `function` makes hold at one time."""
    with _Memory() as memory:
        function()
    return memory.most


class _Memory(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in known:
                size = made.untyped_storage().nbytes()
                self.held += size
                self.most = max(self.most, self.held)
                weakref.finalize(made, self.free, size)
        return result

    def free(self, size: int) -> None:
        self.held -= size
