"""How fast ranks talk and compute, by device type: what plans are made from where nobody says better.

The figures are taken, never measured: plans must be equal on all ranks. They are those of one common machine of each kind, from
its makers' data sheets, and say in which order of magnitude a transfer and a product are; `seconds` of a plan are no better than
they are. Another machine is `replace(links_of("cuda"), between=...)`.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The part of the peak that attention kernels are taken to reach.
REACHED = 0.5


@dataclass(frozen=True)
class Links:
    """within, between    bytes a second that one rank sends to a rank of its node, and of another node
    latency, far_latency  seconds until a message begins to arrive, likewise
    flops                 products and sums a second of one rank's matrix units, in 16 bits; REACHED of it is counted on
    node                  ranks of a node
    source                where the figures are from
    """

    within: float
    between: float
    latency: float
    far_latency: float
    flops: float
    node: int
    source: str


#: A megabyte a second is 1e6 bytes, and data sheets count both directions of NVLink.
DEFAULTS: dict[str, Links] = {
    "cuda": Links(
        450e9, 50e9, 5e-6, 10e-6, 989e12, 8,
        "NVIDIA H100 SXM data sheet (NVLink 900 GB/s in both directions, 989 TFLOP/s in bfloat16 without sparsity) and "
        "DGX H100 user guide (one 400 Gb/s port a GPU); latencies are assumed",
    ),
    "npu": Links(
        28e9, 25e9, 10e-6, 20e-6, 300e12, 8,
        "assumed for an Ascend 910B server (one HCCS link of a full mesh, one 200 Gb/s port a chip): no data sheet was found",
    ),
    "xpu": Links(
        50e9, 25e9, 10e-6, 20e-6, 400e12, 8,
        "assumed: no data sheet was looked at",
    ),
    "cpu": Links(
        5e9, 1.25e9, 30e-6, 60e-6, 0.5e12, 2,
        "assumed: gloo over loopback, 10 Gb/s Ethernet, 16 cores with AVX-512",
    ),
}  # fmt: skip


def links_of(device_type: str) -> Links:
    """The defaults of a device type; those of 'cuda' for one that is not listed."""
    return DEFAULTS.get(device_type, DEFAULTS["cuda"])
