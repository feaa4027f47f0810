"""Which number format a run computes in."""

from typing import Any

import pytest
import torch

from pcae_training.number_format import choose_dtype, describe_slow, is_bfloat16_fast

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True),
     ({"avx512_bf16": False, "avx2": True}, False), ({}, False)],
)  # fmt: skip
def test_a_cpu_needs_instructions(
    capabilities: Any, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert is_bfloat16_fast("cpu") is fast
    assert choose_dtype("auto", "cpu") is (BFLOAT16 if fast else FLOAT32)
    assert choose_dtype("bf16", "cpu") is BFLOAT16
    assert choose_dtype("fp32", "cpu") is FLOAT32
    warning = describe_slow("bf16", "cpu")
    assert warning is None if fast else "about 6 times slower" in str(warning)
    assert describe_slow("fp32", "cpu") is describe_slow("auto", "cpu") is None
