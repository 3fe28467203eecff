"""The shapes that the code states are checked while the tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from workbench.blocks.balance import updated_bias


def test_a_stated_shape_is_enforced():
    updated_bias(torch.zeros(3), torch.ones(3, dtype=torch.int64), speed=0.1)
    with pytest.raises(TypeCheckError, match="E"):
        updated_bias(torch.zeros(3), torch.ones(4, dtype=torch.int64), speed=0.1)
