"""Tensor memory of compute capability 10.0, by the names that Triton 3.6 to 3.9 have for it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    tensor_memory_descriptor,
    tensor_memory_descriptor_type,
)

#: Warps of a group, of which each reads and writes a quarter of the rows.
WARPS = 4


@gluon.constexpr_function
def registers_of(dtype, rows, columns):
    """The layout of a tile of tensor memory in the registers of a group: a row for each thread."""
    layout = TensorMemoryLayout([rows, columns], col_stride=1)
    if hasattr(blackwell, "get_tmem_reg_layout"):
        return blackwell.get_tmem_reg_layout(dtype, [rows, columns], layout, WARPS)
    made = tensor_memory_descriptor_type(dtype, [rows, columns], layout, [rows, columns])
    return made.get_reg_layout(num_warps=WARPS)


if hasattr(tensor_memory_descriptor, "reinterpret"):

    @gluon.jit
    def weights_in(scores, dtype: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
        """Where the weights of a tile are: in the first half of the columns of its scores."""
        layout: gl.constexpr = TensorMemoryLayout([BM, BN], col_stride=1)
        return scores.reinterpret(dtype, [BM, 2 * BN], layout).slice(0, BN)

else:

    @gluon.jit
    def weights_in(scores, dtype: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
        """Where the weights of a tile are: in the first half of the columns of its scores."""
        layout: gl.constexpr = TensorMemoryLayout([BM, BN], col_stride=1)
        return scores._reinterpret(dtype, [BM, 2 * BN], layout).slice(0, BN)
