"""What there is: every public op with its tiers, shapes and source, read from the ops themselves."""

import inspect
import re
from typing import NamedTuple

from workbench_kernels.causal_attention import causal_attention
from workbench_kernels.grouped_mm import grouped_mm
from workbench_kernels.linear_cross_entropy import linear_cross_entropy
from workbench_kernels.mla_attention import mla_attention
from workbench_kernels.mla_decode import mla_decode
from workbench_kernels.moe_mlp import moe_mlp
from workbench_kernels.moe_route import moe_route
from workbench_kernels.quantize_blockwise import quantize_blockwise
from workbench_kernels.rms_norm import rms_norm
from workbench_kernels.rope import rope
from workbench_kernels.scaled_mm_blockwise import scaled_mm_blockwise
from workbench_kernels.sparse_select import sparse_select
from workbench_kernels.tier import FUSED_OPS

OPS = (
    rms_norm,
    rope,
    moe_route,
    grouped_mm,
    moe_mlp,
    causal_attention,
    mla_attention,
    mla_decode,
    linear_cross_entropy,
    quantize_blockwise,
    scaled_mm_blockwise,
    sparse_select,
)


class OpDescription(NamedTuple):
    """One op: its call with all defaults, what it computes, the shapes of its arguments, its tiers, and its source."""

    name: str
    call: str
    summary: str
    shapes: dict[str, str]
    tiers: tuple[str, ...]
    source: str


class Catalogue(tuple[OpDescription, ...]):
    """All ops; printed, or shown in a notebook, as a list to read."""

    def __str__(self) -> str:
        return "\n\n".join(
            "\n".join(
                [f"{op.call}  ({', '.join(op.tiers)})", f"    {op.summary}"]
                + [f"    {name}: {shape}" for name, shape in op.shapes.items()]
                + [f"    source: {op.source}"]
            )
            for op in self
        )

    def _repr_markdown_(self) -> str:
        return "\n".join(
            f"- **`{op.call}`** ({', '.join(op.tiers)}): {op.summary}\n"
            + "\n".join(f"  - `{name}`: {shape}" for name, shape in op.shapes.items())
            + f"\n  - source: {op.source}"
            for op in self
        )


def describe() -> Catalogue:
    """Every public op of this package."""
    return Catalogue(_describe(op) for op in OPS)


def _describe(op) -> OpDescription:
    text, signature = inspect.getdoc(op) or "", inspect.signature(op)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    arguments = dict(entry.split(": ", 1) for entry in _section(text, "Args:"))
    return OpDescription(
        name=op.__name__,
        call=f"{op.__name__}{inspect.Signature(bare)}",
        summary=text.splitlines()[0],
        shapes=arguments | {"returns": " ".join(_section(text, "Returns:"))},
        tiers=("reference", "torch", "fused") if op.__name__ in FUSED_OPS else ("reference", "torch"),
        source=" ".join(text[text.index("Source: ") + len("Source: ") :].split()),
    )


def _section(text: str, title: str) -> list[str]:
    """The entries of a section of a docstring, each on one line."""
    found = re.search(rf"^{title}\n((?:    .*\n|\n)+)", text + "\n", flags=re.MULTILINE)
    assert found is not None, title
    entries = re.split(r"\n    (?! )", "\n" + found[1])
    return [" ".join(entry.split()) for entry in entries if entry.strip()]
