"""Every supported version of torch_npu has the arguments that are given, with the defaults that are counted on."""

from __future__ import annotations

import pytest
import torch
from schemas import OPERATORS, kept, name_of
from test_mistakes import MISTAKES

VERSIONS = kept()


def test_the_installed_version_has_the_schemas_that_are_kept():
    import torch_npu

    version = torch_npu.__version__.split("+")[0]
    for name in OPERATORS:
        schema = getattr(torch.ops.npu, name).default._schema
        assert [a.name for a in schema.arguments] == [name_of(a) for a in VERSIONS[version][name]], name


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_given_is_what_a_version_takes(version, once):
    # the cases ask for every operator but that of tensor-parallel projections
    for case in {case for case, _ in MISTAKES.values()}:
        case()
    assert {name for name, _ in once.calls} == set(OPERATORS) - {"npu_mm_all_reduce_base"}
    for name, given in once.calls:
        assert given.keys() <= {name_of(a) for a in VERSIONS[version][name]}, (version, name)
    assert VERSIONS[version].keys() == set(OPERATORS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_supported_versions_of_torch_are_covered(version):
    assert {v.rsplit(".post", 1)[0] for v in VERSIONS} >= {"2.11.0", "2.12.0", "2.13.0", "2.14.0"}
    # not given, as it is what is wanted
    defaults = dict(a.split("=") for a in VERSIONS[version]["npu_fusion_attention_v3"] if "=" in a)
    assert defaults["Tensor? sink"] == "None" and defaults["int inner_precise"] == "0"
