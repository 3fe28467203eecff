"""What the package says of its ops is what the ops say, and complete."""

from __future__ import annotations

import inspect
import types

import workbench_kernels
from workbench_kernels import describe
from workbench_kernels.tier import FUSED_OPS


def test_every_public_op_is_described() -> None:
    public = {name for name, value in vars(workbench_kernels).items() if isinstance(value, types.FunctionType)}
    assert {op.name for op in describe()} == public - {"describe"}


def test_an_op_says_its_tiers_the_shape_of_every_argument_and_its_source() -> None:
    for op in describe():
        arguments = set(inspect.signature(getattr(workbench_kernels, op.name)).parameters)
        said = {name for names in op.shapes for name in names.split(", ")}
        assert said == arguments | {"returns"}, op.name
        assert all(op.shapes.values()) and op.summary and op.source.endswith("."), op.name
        assert ("fused" in op.tiers) == (op.name in FUSED_OPS)


def test_it_reads_as_text_and_as_markdown() -> None:
    text, markdown = str(describe()), describe()._repr_markdown_()
    assert "rope(x, cos, sin, *, interleaved, impl='auto')  (reference, torch, fused)" in text
    assert "    x: [B, T, H, R]." in text and "Su et al., arXiv 2104.09864" in text
    assert "- **`moe_mlp(x, w13, w2, indices, weights, *, b13=None, b2=None, activation=" in markdown
    assert "  - `w2`: [E, K, F], of the dtype of `x`." in markdown
