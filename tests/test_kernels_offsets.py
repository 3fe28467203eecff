"""No kernel multiplies a row, page or expert by a stride in 32 bits: a tensor of 2^31 numbers would be read elsewhere.

Read from what Triton makes of the kernels, as such tensors do not fit here: an offset that comes from the program's
number or from memory may be added in 32 bits, where it is small, but not multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from workbench_kernels.fused.ahead_of_time import Case, compiled_kernel
from workbench_kernels.fused.cases import all_cases

GROWS = ("tt.get_program_id", "tt.load")  # what may be as large as the tensors
KERNELS = {
    case.kernel.__name__: case
    for cases in all_cases().values()
    for case in reversed(cases)
    if "sm_90" in case.architectures
}


def narrow_products(text: str, tile_sizes: Collection[int] = ()) -> list[str]:
    """The pointers of Triton's IR that are moved by a 32-bit product of something that grows.

    The number of a tile times the tile's size is a position, which 32 bits hold, and no offset.
    """
    operations = {
        name: (operation, re.findall(r"%[\w-]+", rest), rest)
        for name, operation, rest in re.findall(r"^\s*(%[\w-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$", text, re.MULTILINE)
    }

    def origins(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        if name in seen or name not in operations:
            return set()
        operation, operands, _ = operations[name]
        return {operation}.union(*(origins(operand, seen | {name}) for operand in operands))

    def is_position(operands: list[str]) -> bool:
        constants = (
            re.search(r"(\d+)", operations[x][2]) for x in operands if operations.get(x, ("",))[0] == "arith.constant"
        )
        return any(found is not None and int(found[1]) in tile_sizes for found in constants)

    def products(name: str, seen: frozenset[str] = frozenset()) -> bool:
        if name in seen or name not in operations:
            return False
        operation, operands, rest = operations[name]
        if (
            operation == "arith.muli"
            and not is_position(operands)
            and re.search(r": (tensor<[\dx]*)?x?i32", rest)
            and origins(name) & set(GROWS)
        ):
            return True
        # A value that was read is a number of its own: how its own pointer moved is that load's matter.
        return operation != "tt.load" and any(products(operand, seen | {name}) for operand in operands)

    return [
        f"{name} = {operation}{rest}"
        for name, (operation, operands, rest) in operations.items()
        if operation == "tt.addptr" and products(operands[-1])
    ]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_offset_is_multiplied_in_32_bits(kernel: str) -> None:
    case = KERNELS[kernel]
    tile_sizes = {size for name, size in case.constants.items() if name.startswith("BLOCK")}
    assert narrow_products(compiled_kernel(case, "sm_90").asm["ttir"], tile_sizes) == []


def test_the_check_sees_a_narrow_product() -> None:
    """A rope whose strides are 32-bit numbers, and whose rows are not made wide, multiplies in 32 bits."""
    case: Case = KERNELS["rope_fwd_kernel"]
    text = compiled_kernel(case, "sm_90").asm["ttir"]
    narrow = re.sub(r"i64", "i32", text)
    assert narrow_products(text) == [] and narrow_products(narrow)
