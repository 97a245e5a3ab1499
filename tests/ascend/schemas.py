"""The schemas of the operators that kernels/ascend and passes/lowered call, as wheels of torch_npu have them.

python tests/ascend/schemas.py WHEEL... > tests/ascend/schemas.json
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
OPERATORS = (
    "npu_fusion_attention",
    "npu_fusion_attention_grad",
    "npu_fusion_attention_v3",
    "npu_fusion_attention_grad_v3",
    "npu_fused_infer_attention_score",
    "npu_prompt_flash_attention",
    "npu_incre_flash_attention",
    "npu_mm_all_reduce_base",
)


def arguments(schema: str) -> list[str]:
    """Each argument with its type and default, from 'name(type a, *, type b=1) -> result'."""
    inside = schema[schema.index("(") + 1 : schema.index(") ->")]
    return [part.strip() for part in re.split(r",\s*(?![^\[(]*[\])])", inside) if part.strip() != "*"]


def name_of(argument: str) -> str:
    return argument.split("=")[0].split()[-1]


def schemas(wheel: str | Path) -> dict[str, list[str]]:
    """{operator: its arguments} of a wheel; operators that it lacks are left out."""
    import yaml

    found: dict[str, list[str]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            text = re.sub(r"\s+", " ", str(value.get("func", "")))
            name = text.split("(")[0]
            if name in OPERATORS:
                found.setdefault(name, arguments(text))
            for part in value.values():
                walk(part)
        elif isinstance(value, list):
            for part in value:
                walk(part)

    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if "csrc/aten" in name and name.endswith(".yaml"):
                walk(yaml.safe_load(files.read(name)))
    return {name: found[name] for name in OPERATORS if name in found}


def kept() -> dict[str, dict[str, list[str]]]:
    """{version: {operator: its arguments}}."""
    return {version: same["schemas"] for same in json.loads(FILE.read_text()) for version in same["versions"]}


def grouped(found: dict[str, dict[str, list[str]]]) -> list[dict[str, Any]]:
    """Versions that have the same schemas together."""
    groups: list[dict[str, Any]] = []
    for version, own in found.items():
        same = next((group for group in groups if group["schemas"] == own), None)
        if same is None:
            groups.append({"versions": [version], "schemas": own})
        else:
            same["versions"].append(version)
    return groups


if __name__ == "__main__":
    versions = {re.search(r"torch_npu-([^-]+)-", wheel)[1]: schemas(wheel) for wheel in sys.argv[1:]}  # type: ignore[index]
    print(json.dumps(grouped(versions), indent=1))
