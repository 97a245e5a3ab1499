"""How far the passes look, so that a graph of any size is read in bounded time. What lies further is refused, or stays as it is."""

from __future__ import annotations

#: Ops from the softmax back to the product of q and k, all ways that were tried together.
SCORE_OPS = 400
#: Ops from the softmax forward to the product with v.
WEIGHT_OPS = 40
#: Ops between that product and the division by the sum of its weights.
LATE_OPS = 8
#: Casts, views and copies looked through on the way to one op that something else depends on.
CASTS = 6
#: Views, casts and factors before q, k or v.
FACTORS = 16
#: Ops that a number is folded through.
CONSTANT_OPS = 8
#: Ops from a softmax to the products beside it, where it is only asked whether it looks like an attention.
NEARBY_OPS = 24
#: Elements of index arithmetic that are read for one mask or bias.
MASK_ELEMENTS = 2000
#: A mask of more operations, or operands, stays a tensor.
MASK_PARTS = 60
MASK_OPERANDS = 12
#: Nodes made again one inside of the other, where a value that the op takes is not there yet.
REPEATED_NODES = 200
