"""The kernels for 7.0 and 7.5 on a newer GPU, as PTX that its driver compiles: right results on real hardware, and no more.

Where NVRTC is too new for a compute capability, PTX is taken from $ATTNFUSE_VOLTA_PTX, else .volta/ptx: `python tests/volta_ptx.py
FOLDER` makes it elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import volta_ptx
from repository import ROOT

from attnfuse.kernels.volta import driver, nvrtc
from attnfuse.kernels.volta.call import Launch

FOLDER = Path(os.environ.get("ATTNFUSE_VOLTA_PTX", ROOT / ".volta" / "ptx"))


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("name", volta_ptx.CASES)
def test_the_kernels_give_right_results_on_a_newer_gpu(name: str, capability: int, device: torch.device) -> None:
    if torch.version.hip is not None:
        pytest.skip("PTX is for NVIDIA's devices")
    if torch.cuda.get_device_capability() < (7, 5):
        pytest.skip("an older GPU runs them as they are")

    def run(launch: Launch) -> None:
        path = FOLDER / volta_ptx.name_of(launch.text, capability)
        if path.exists():
            text = path.read_text()
        elif nvrtc.available(capability) is None:
            text = volta_ptx.made(launch.text, capability)
        else:
            pytest.skip(f"no NVRTC for {capability / 10:.1f}, and no {path}")
        function = driver.function(text, launch.kernel, launch.tensors[0][0].device)
        driver.launch(function, launch.blocks, launch.threads, launch.shared, launch.argument)

    with device:
        volta_ptx.CASES[name](volta_ptx.Newer(capability, run))
