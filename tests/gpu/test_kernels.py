"""The cases of tests/interpreted/test_kernel_triton.py on a device, in float32, float16 and bfloat16."""

from __future__ import annotations

import types
from collections.abc import Iterator

import kernel_cases
import pytest
import torch
from interpreted import test_kernel_triton as shared

pytestmark = pytest.mark.gpu

for _name, _value in list(vars(shared).items()):
    if _name.startswith("test_"):
        globals()[_name] = _value

# the fixture of tests that tests/sink_cases.py shares
kernel = shared.kernel

#: Run in low precision too, within the minutes that `make gpu-check` has; the others are marked slow there.
QUICK = {
    "test_head_sizes",
    "test_lengths",
    "test_every_step_forward_and_backward",
    "test_documents_and_lengths",
    "test_tables_by_distance_and_by_row",
    "test_grouped_queries_share_keys",
    "test_strides_and_nan_beyond_a_slice_change_no_bit",
    "test_dropout_draws_the_reference_mask",
    "test_weight_steps_forward_and_backward",
}
#: What they expect is said to float32's rounding.
FLOAT32_ONLY = {
    "test_rows_made_zero_have_zero_gradients_under_an_added_fill",
    "test_operand_gradients_are_summed_over_broadcast_dims",
}
LOW = (torch.float16, torch.bfloat16)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.function.__name__
    marks = () if name in QUICK else pytest.mark.slow
    # a test that names its dtypes has them already
    alone = name in FLOAT32_ONLY or "dtype" in metafunc.fixturenames
    low = [] if alone else [pytest.param(dtype, marks=marks) for dtype in LOW]
    metafunc.parametrize("inputs_in", [torch.float32, *low], indirect=True, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def inputs_in(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tests' tensors are on the device and of that dtype; kernels run as they do for a user, without such defaults."""
    monkeypatch.setattr(kernel_cases, "DTYPE", request.param)
    monkeypatch.setattr(kernel_cases, "assert_close", _close_where_eager_is_finite)
    monkeypatch.setattr(shared, "triton", _without_default_device(shared.triton))
    with device:
        yield


def _without_default_device(module: types.ModuleType) -> types.SimpleNamespace:
    def outside(function):
        def called(*args):
            # a tensor that a kernel makes without naming its device must not land on the right one by chance
            with torch.device("cpu"):
                return function(*args)

        return called

    return types.SimpleNamespace(
        forward=outside(module.forward), backward=outside(module.backward), interpreted=module.interpreted
    )


_assert_close = kernel_cases.assert_close


def _close_where_eager_is_finite(got, oracle, eager, what, factor=2.0):
    if not eager.isfinite()[oracle.isfinite()].all():
        pytest.skip(f"eager has no finite result in {eager.dtype} to measure {what} against")
    _assert_close(got, oracle, eager, what, factor)
