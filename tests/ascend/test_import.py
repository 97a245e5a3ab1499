"""attnfuse leaves torch_npu alone until a tensor is on an NPU, whether or not it is installed."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import FOLDER
from repository import ROOT

_PROGRAM = """
import sys
import torch
import attnfuse
from attnfuse import kernels
from attnfuse.kernels import ascend

def attend(q, k, v):
    return (q @ k.mT * 0.25).softmax(-1) @ v

q, k, v = torch.randn(3, 1, 2, 8, 16).unbind()
compiled = torch.compile(attend, backend="attnfuse", options={"inner": "aot_eager"})
torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
assert [site.kernel for report in attnfuse.reports() for site in report.sites] == ["cpu"]
assert not [name for name in sys.modules if name.split(".")[0] == "torch_npu"]
"""


def test_torch_npu_is_not_imported_for_a_cpu():
    path = os.pathsep.join([str(ROOT), str(FOLDER / "site")])
    env = {**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
