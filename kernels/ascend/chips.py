"""Which operators a chip has, by its name as torch_npu gives it ("Ascend910B2"), and which of them a call takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from attnfuse import reasons
from attnfuse.kernels.device import Device
from attnfuse.reasons import Reason
from attnfuse.spec import Attention

#: Families of chips, by how their names begin: what marketing calls 910C is 910_93 there.
FAMILIES = {"Ascend910B": "910B", "Ascend910_93": "910C", "Ascend310P": "310P"}
#: Those whose operators give gradients.
TRAINING = frozenset({"910B", "910C"})
#: Those that have the two older operators of inference alone.
INFERENCE = frozenset({"310P"})


def family(device: Device) -> str:
    """The family of a device's chip, '' of one that nothing is known of."""
    return next((found for begin, found in FAMILIES.items() if device.name.startswith(begin)), "")


def unfit(taken: frozenset[str], device: Device) -> Iterator[Reason]:
    """Why a kernel for these families does not run on a device."""
    if family(device) not in taken:
        yield reasons.KERNEL_CHIP(chip=device.name or "unknown", taken=", ".join(sorted(taken)))


def reduces(device: Device) -> bool:
    """Whether a chip has the operator for a product and the all-reduce of it: its documents name no other."""
    return family(device) == "910B"


class Most(NamedTuple):
    """Of an operator: the most batch elements, and rows of queries or keys of one, or packed of all."""

    batch: int
    rows: int


#: As the documents have it; those of the last two on 310P.
MOST = {
    "npu_fusion_attention": Most(2**21, 2**20),
    "npu_fusion_attention_v3": Most(2**21, 2**20),
    "npu_fused_infer_attention_score": Most(65536, 262144),
    "npu_prompt_flash_attention": Most(128, 65535),
    "npu_incre_flash_attention": Most(256, 65536),
}


def decodes(spec: Attention, batch: int, queries: int, keys: int, groups: int) -> bool:
    """Whether the operator for one query takes a call: 16 bits, up to 64 heads to a key head, nothing added, nothing dropped."""
    most = MOST["npu_fused_infer_attention_score"]
    fits = queries == 1 and groups <= 64 and batch <= most.batch and keys <= most.rows
    return fits and spec.qk_dtype != "float32" and not spec.dropout
