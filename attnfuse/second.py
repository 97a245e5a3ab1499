"""The derivative of `attention_backward`, for gradients of gradients: plain PyTorch, differentiable once more.

The kernels have no formula for it. It holds the whole score tensor, as eager does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import precision
from attnfuse.spec import Attention

Grads = Sequence[torch.Tensor | None]


def differentiate(
    spec: Attention,
    given: Grads,
    needs: Sequence[bool],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    inputs: Inputs,
) -> list[torch.Tensor | None]:
    """The gradients of dout, dlse and of each of q, k, v and the operands; None where nothing depends on it.

    given: those of what attention_backward returned, one for each True in needs. The result and the statistics that
    attention_backward was given too count as functions of the inputs here, so that they have no gradient of their own. With
    dropout the seed gives the mask that was used.
    """
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # other names for the tensors, so that what made them takes no part
        dout, *own = [x.view_as(x) if x.requires_grad else x.detach() for x in (dout, *inputs.tensors)]
        dlse = None if dlse is None else dlse.view_as(dlse)
        roots = [x if x.requires_grad or not need else x.requires_grad_() for x, need in zip(own, needs, strict=True)]
        values, lines = reference.attend(spec, inputs.with_tensors(roots), precision(spec))
        results = [(values, dout)] if dlse is None else [(values, dout), (reference.log_sum_exp(lines), dlse)]
        wanted = [x for x, need in zip(roots, needs, strict=True) if need]
        first = _grad([(result, grad.to(result.dtype)) for result, grad in results], wanted, create=True)
        leaves = [x for x in (dout, dlse, *roots) if x is not None and x.requires_grad]
        found = _grad(list(zip(first, given, strict=True)), leaves, create)
    by_leaf = {id(x): g for x, g in zip(leaves, found, strict=True)}
    return [None if x is None else by_leaf.get(id(x)) for x in (dout, dlse, *roots)]


def _grad(
    outputs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]], inputs: Sequence[torch.Tensor], create: bool
) -> Grads:
    """The gradients of inputs from those pairs of a value and its gradient that have any."""
    known = [(x, g) for x, g in outputs if x is not None and g is not None and x.requires_grad]
    if not known or not inputs:
        return [None] * len(inputs)
    values, grads = zip(*known, strict=True)
    return torch.autograd.grad(values, inputs, grads, create_graph=create, allow_unused=True)
