"""The whole expert layer: every token through its experts' feed-forward, mixed by the router's weights.

Letters: N tokens, A experts per token, M rows sorted by expert (N * A of them, and padding), P padding rows, E experts,
K width, F hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.expert_order import (
    Order,
    add_bias_,
    bias_of_rows,
    check_experts,
    group_sums,
    group_unit,
    sort_by_expert,
    take_rows,
)
from workbench_kernels.expert_tiles import MAX_EXPERTS
from workbench_kernels.gated import SWIGLU, GatedActivation
from workbench_kernels.grouped_mm import rows_by_experts, rows_by_rows
from workbench_kernels.tier import check_devices, resolve, unwatched

FEW_PAIRS = 64  # up to here a product for each chosen expert costs less than sorting and torch's grouped product


def moe_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    activation: GatedActivation = SWIGLU,
    impl: str = "auto",
) -> Tensor:
    """Sum over a token's experts e of `weights * (activation(x @ gate[e].T, x @ up[e].T) @ w2[e].T)`.

    Args:
        x: [N, K] tokens.
        w13: [E, 2F, K], gate above up, of the dtype of `x`.
        w2: [E, K, F], of the dtype of `x`.
        indices: int64 [N, A], the experts of each token, in 0..E-1; on a GPU they are not looked at.
        weights: [N, A], in the dtype of `x` or float32.
        b13: [E, 2F], added to the gate and up products, of the dtype of `x`.
        b2: [E, K], added to what `w2` makes, before `weights`; of the dtype of `x`.
        activation: SwiGLU or a clamped relative.
        impl: "auto", "reference" or "fused"; see `workbench_kernels.tier`.

    Returns:
        [N, K] in the dtype of `x`. The gradient of an expert that no token chose is exactly zero.
        For backward the gate and up products [M, 2F] are kept and nothing else as large.

    Raises:
        ValueError: shapes or dtypes do not fit, or an index lies outside 0..E-1.

    Source: Shazeer et al., arXiv 1701.06538, equation 1; DeepSeekMoE, arXiv 2401.06066, section 2.
    """
    _check(x, w13, w2, indices, weights)
    _check_biases(x, w13, w2, b13, b2)
    tier = resolve("moe_mlp", impl, x.device, x.dtype, fits=len(w13) <= MAX_EXPERTS)
    if tier == "reference":
        return reference(x, w13, w2, indices, weights, b13=b13, b2=b2, activation=activation)
    alone = unwatched(x, w13, w2, weights, b13, b2)
    if tier == "fused" and alone:
        from workbench_kernels.fused import moe_mlp as twin

        return twin.forward(x, w13, w2, indices, weights, b13, b2, activation, keep=False).out
    if alone:
        if 0 < indices.numel() <= FEW_PAIRS:
            return few_pairs(x, w13, w2, indices, weights, b13, b2, activation)
        return _forward(x, w13, w2, indices, weights, b13, b2, activation)[0]
    return _moe_mlp(x, w13, w2, indices, weights, b13, b2, *activation, tier == "fused")[0]


def reference(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    activation: GatedActivation = SWIGLU,
) -> Tensor:
    """The definition: one expert after the other; the sum over experts in float32 or wider."""
    out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert in range(w13.shape[0]):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], w13[expert], None if b13 is None else b13[expert]).chunk(2, dim=-1)
        y = F.linear(activation(gate, up), w2[expert], None if b2 is None else b2[expert])
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out.to(x.dtype)


def few_pairs(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: GatedActivation,
) -> Tensor:
    """The torch form for a step of decoding: one product for each expert that is chosen, and none for the others."""
    pairs, num_slots = indices.flatten().tolist(), indices.shape[1]
    check_experts((min(pairs), max(pairs)), w13.shape[0])
    # A single token's rows may stay as its slots are; those of several are sorted by expert.
    if len(x) == 1:
        order, rows_MK = list(range(len(pairs))), x.expand(len(pairs), -1)
    else:
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        rows_MK = x[torch.tensor([pair // num_slots for pair in order], device=x.device)]
    experts = [pairs[pair] for pair in order]
    starts = [i for i in range(len(experts)) if i == 0 or experts[i] != experts[i - 1]]
    groups = [(experts[i], slice(i, j)) for i, j in zip(starts, [*starts[1:], len(experts)], strict=True)]

    gate_up_M2F, y_MK = x.new_empty(len(pairs), w13.shape[1]), x.new_empty(len(pairs), x.shape[1])
    for expert, rows in groups:
        torch.mm(rows_MK[rows], w13[expert].t(), out=gate_up_M2F[rows])
    if b13 is not None:
        gate_up_M2F += b13[experts]
    hidden_MF = activation(*gate_up_M2F.chunk(2, dim=1))
    for expert, rows in groups:
        torch.mm(hidden_MF[rows], w2[expert].t(), out=y_MK[rows])
    if b2 is not None:
        y_MK += b2[experts]
    if len(x) == 1 and x.dtype != torch.float16:
        return torch.mm(weights.to(x.dtype), y_MK)
    row_of_pair = sorted(range(len(order)), key=order.__getitem__)
    return _mix(y_MK, torch.tensor(row_of_pair, device=x.device).view(indices.shape), weights)


def _check(x: Tensor, w13: Tensor, w2: Tensor, indices: Tensor, weights: Tensor) -> None:
    check_devices(x, w13=w13, w2=w2, indices=indices, weights=weights)
    if x.ndim != 2 or w13.ndim != 3 or w2.ndim != 3:
        raise ValueError(f"x has {x.ndim} axes, w13 {w13.ndim} and w2 {w2.ndim}; they must have 2, 3 and 3")
    num_experts, width, hidden = w2.shape
    if w13.shape != (num_experts, 2 * hidden, width) or x.shape[1] != width or num_experts == 0:
        raise ValueError(
            f"x {list(x.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)} must be [N, K], [E, 2F, K], [E, K, F]"
        )
    if not x.is_floating_point() or not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"x ({x.dtype}), w13 ({w13.dtype}) and w2 ({w2.dtype}) must have one floating dtype")
    if indices.dtype != torch.int64 or indices.ndim != 2 or indices.shape[0] != x.shape[0] or indices.shape[1] == 0:
        raise ValueError(f"indices ({indices.dtype} {list(indices.shape)}) must be int64 [{x.shape[0]}, A] with A > 0")
    if weights.shape != indices.shape or weights.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weights ({weights.dtype} {list(weights.shape)}) must be {list(indices.shape)} in {x.dtype} or float32"
        )


def _check_biases(x: Tensor, w13: Tensor, w2: Tensor, b13: Tensor | None, b2: Tensor | None) -> None:
    check_devices(x, b13=b13, b2=b2)
    for name, bias, shape in (("b13", b13, w13.shape[:2]), ("b2", b2, w2.shape[:2])):
        if bias is not None and (bias.shape != shape or bias.dtype != x.dtype):
            raise ValueError(f"{name} ({bias.dtype} {list(bias.shape)}) must be {list(shape)} in {x.dtype}")


@torch.library.custom_op("workbench_kernels::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    limit: float,
    alpha: float,
    offset: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    activation = GatedActivation(limit, alpha, offset)
    if fused:
        from workbench_kernels.fused import moe_mlp as twin

        out, gate_up, pair, row, offs = twin.forward(x, w13, w2, indices, weights, b13, b2, activation)
        return out, gate_up, pair, row, offs, pair.new_empty(0)
    return _forward(x, w13, w2, indices, weights, b13, b2, activation)


def _forward(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: GatedActivation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output and, for backward, the gate and up products and the order of the rows."""
    unit = group_unit(x.dtype, indices.numel(), w13.shape[0])
    order = sort_by_expert(indices, w13.shape[0], unit=unit)
    gate_up_M2F = rows_by_experts(take_rows(x, order), w13, order.offs_E)
    add_bias_(gate_up_M2F, b13, order.offs_E)
    gate_MF, up_MF = gate_up_M2F.chunk(2, dim=1)
    y_MK = rows_by_experts(activation.of_gate(gate_MF).mul_(activation.of_up(up_MF)), w2, order.offs_E)
    add_bias_(y_MK, b2, order.offs_E)
    pair_M, row_NA, offs_E, padding_P = order
    return _mix(y_MK, row_NA, weights), gate_up_M2F, pair_M, row_NA, offs_E, padding_P


@_moe_mlp.register_fake
def _(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    limit: float,
    alpha: float,
    offset: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts = w13.shape[0]
    num_padding = 0 if fused else num_experts * (group_unit(x.dtype, indices.numel(), num_experts) - 1)
    num_rows = indices.numel() + num_padding
    whole = torch.int32 if fused else torch.int64
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(num_rows, w13.shape[1]),
        indices.new_empty(num_rows, dtype=whole),
        indices.new_empty(indices.shape, dtype=whole),
        indices.new_empty(num_experts, dtype=torch.int32),
        indices.new_empty(num_padding, dtype=whole),
    )


@torch.library.custom_op("workbench_kernels::moe_mlp_grad", mutates_args=())
def _moe_mlp_grad(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    pair: Tensor,
    row: Tensor,
    offs: Tensor,
    padding: Tensor,
    b2: Tensor | None,
    has_b13: bool,
    limit: float,
    alpha: float,
    offset: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w13, w2, weights, b13 and b2; those of biases that are not there are empty."""
    activation = GatedActivation(limit, alpha, offset)
    if fused:
        from workbench_kernels.fused import moe_mlp as twin

        kept = (gate_up, pair, row, offs)
        return twin.backward(grad, x, w13, w2, indices, weights, *kept, b2, has_b13, activation)
    order = Order(pair, row, offs, padding)
    narrow = x.dtype == torch.float16  # holds few of the numbers that a float32 weight may be
    weight_M1 = weights.reshape(-1, 1).index_select(0, pair).to(weights.dtype if narrow else x.dtype)
    gate_MF, up_MF = gate_up.chunk(2, dim=1)
    gated_MF, raised_MF = activation.of_gate(gate_MF), activation.of_up(up_MF)
    hidden_MF = gated_MF * raised_MF

    grad_y_MK = take_rows(grad, order)  # of a row not yet weighted
    grad_hidden_MF = rows_by_experts(grad_y_MK, w2.transpose(1, 2), offs)
    sum_dtype = torch.promote_types(x.dtype, weights.dtype)
    grad_weight_M = (grad_hidden_MF * hidden_MF).sum(dim=1, dtype=sum_dtype)
    if b2 is not None:
        grad_weight_M += (grad_y_MK * bias_of_rows(b2, offs, len(pair))).sum(dim=1, dtype=sum_dtype)
    grad_weights = grad_weight_M.index_select(0, row.view(-1)).view_as(row).to(weights.dtype)
    if narrow:
        grad_w2 = rows_by_rows((grad_y_MK * weight_M1).to(x.dtype), hidden_MF, offs)
    else:
        grad_w2 = rows_by_rows(grad_y_MK, hidden_MF.mul_(weight_M1), offs)
    grad_b2 = x.new_empty(0) if b2 is None else group_sums((grad_y_MK * weight_M1).to(x.dtype), offs)

    grad_hidden_MF.mul_(weight_M1)
    grad_gate_up_M2F = torch.empty_like(gate_up)
    grad_gate_MF, grad_up_MF = grad_gate_up_M2F.chunk(2, dim=1)
    torch.mul(grad_hidden_MF, gated_MF, out=grad_up_MF)
    activation.grad_of_up_(grad_up_MF, up_MF)
    activation.grad_of_gate(grad_hidden_MF.mul_(raised_MF), gate_MF, out=grad_gate_MF)

    grad_rows_MK = rows_by_experts(grad_gate_up_M2F, w13.transpose(1, 2), offs)
    grad_w13 = rows_by_rows(grad_gate_up_M2F, take_rows(x, order, out=grad_y_MK), offs)
    grad_b13 = group_sums(grad_gate_up_M2F, offs) if has_b13 else x.new_empty(0)
    return _mix(grad_rows_MK, row, None), grad_w13, grad_w2, grad_weights, grad_b13, grad_b2


@_moe_mlp_grad.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    pair: Tensor,
    row: Tensor,
    offs: Tensor,
    padding: Tensor,
    b2: Tensor | None,
    has_b13: bool,
    limit: float,
    alpha: float,
    offset: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        w13.new_empty(w13.shape),
        w2.new_empty(w2.shape),
        weights.new_empty(weights.shape),
        w13.new_empty(w13.shape[:2]) if has_b13 else x.new_empty(0),
        x.new_empty(0) if b2 is None else w2.new_empty(w2.shape[:2]),
    )


def _mix(rows_MK: Tensor, row_NA: Tensor, weights_NA: Tensor | None) -> Tensor:
    """Sum each token's rows, one after the other and so the same in every run."""
    if row_NA.numel() == 0:
        return rows_MK.new_empty(row_NA.shape[0], rows_MK.shape[1])
    if weights_NA is None:
        return F.embedding_bag(row_NA, rows_MK, mode="sum")
    if rows_MK.dtype == torch.float16 and weights_NA.dtype == torch.float32:  # of which float16 holds few
        return F.embedding_bag(row_NA, rows_MK.float(), mode="sum", per_sample_weights=weights_NA).half()
    return F.embedding_bag(row_NA, rows_MK, mode="sum", per_sample_weights=weights_NA.to(rows_MK.dtype))


def _save(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w13, w2, indices, weights, b13, b2, *ctx.options = inputs
    _, *kept = output
    ctx.has_b13 = b13 is not None
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # otherwise a zero gradient of what is kept is made for every backward
    ctx.save_for_backward(x, w13, w2, indices, weights, *kept, b2)


def _backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    has_b2 = ctx.saved_tensors[-1] is not None
    grads = _moe_mlp_grad(grad, *ctx.saved_tensors, ctx.has_b13, *ctx.options)
    grad_x, grad_w13, grad_w2, grad_weights, grad_b13, grad_b2 = grads
    biases = (grad_b13 if ctx.has_b13 else None, grad_b2 if has_b2 else None)
    return (grad_x, grad_w13, grad_w2, None, grad_weights, *biases, None, None, None, None)


_moe_mlp.register_autograd(_backward, setup_context=_save)
