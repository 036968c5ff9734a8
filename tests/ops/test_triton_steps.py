"""A training step of every method runs through the Triton kernels, and is the step that the truths make."""

import json
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_step_cases.py")
GAINS = {"multiply_", "gain_sums_"}
CALLED: dict[str, set[str]] = {
    "lora with dropout": {"drop"},
    "dora": {"row_lengths", *GAINS},
    "ia3": GAINS,
    "bitfit": {"add_", "column_sums"},
    "prefix": set(),
    "together": {"drop", "add_", "column_sums", "row_lengths", *GAINS},
}
"""Which kernels a method asks for, beside the base's own."""
LOSS = {"float32": 5e-7, "bfloat16": 2e-3}
GRADIENTS = {"float32": 2e-6, "bfloat16": 4e-2}
"""Relative, in norms: an order of summation apart, or as many roundings to bf16 as a value goes through in two layers,
which the interpreter cuts off instead."""


@pytest.mark.slow
def test_a_step_of_every_method_is_the_truths(triton, interpreted) -> None:
    found = [json.loads(line) for line in interpreted(CASES, TOPWORK_NO_NATIVE="1")]
    wanted = [*((name, "float32") for name in CALLED), ("together", "bfloat16")]
    assert [(case["name"], case["dtype"]) for case in found] == wanted
    for case in found:
        sums = {"add_and_round"} if case["dtype"] == "bfloat16" else set()  # one type needs none but torch's own
        assert set(case["called"]) == CALLED[case["name"]] | sums, case
        for what, far in case["far"].items():
            assert far < (LOSS if what.startswith("loss") else GRADIENTS)[case["dtype"]], (case["name"], what, far)
