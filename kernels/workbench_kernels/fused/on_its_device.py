"""Triton launches on the current GPU, which need not be the one where the tensors lie."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_its_device(launcher: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Let `launcher` run with the GPU of its first tensor as the current one; on a CPU nothing changes."""

    @wraps(launcher)
    def launched(tensor: Tensor, *rest: Rest.args, **options: Rest.kwargs) -> Result:
        with torch.cuda.device_of(tensor):
            return launcher(tensor, *rest, **options)

    return launched
