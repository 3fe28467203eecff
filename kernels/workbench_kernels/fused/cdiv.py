"""Division that rounds up; Triton's own does not satisfy the type checker."""


def cdiv(numerator: int, denominator: int) -> int:
    """How many pieces of `denominator` hold `numerator`."""
    return -(-numerator // denominator)
