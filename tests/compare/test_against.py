# SPDX-License-Identifier: Apache-2.0
"""One capture judged against another, without a golden."""

import captures
import msgspec
import pytest

from pytest_msprobe.compare.against import judge_against

BFLOAT16 = captures.SIGNATURE
FLOAT32 = {**BFLOAT16, "model": {**BFLOAT16["model"], "dtype": "float32"}}


def network(*, signature=BFLOAT16, **options):
    """A capture of the small network."""
    return captures.Network().run(signature=signature, **options)


def as_float32(capture):
    """The same capture with rows of a float32 model."""
    for number, line in capture.tensors.items():
        capture.tensors[number] = msgspec.structs.replace(line, d="f32")
    return capture


def test_equal_captures_pass():
    """Two captures of the same numbers pass, and the verdict says what was judged."""
    verdict = judge_against(network(), network())

    assert verdict.status == "pass"
    assert verdict.mode == "same"
    assert verdict.notes[0].startswith("judged against a capture")


def test_fault_is_named():
    """A module that computes something else on one side is named."""
    verdict = judge_against(network(), network(after="b.y"))

    assert verdict.status == "fail"
    assert verdict.divergence.module == "b.y"


@pytest.mark.parametrize("swapped", [False, True])
def test_other_dtype_is_levelled(swapped):
    """Element types that differ on purpose are no findings; wider limits hold."""
    sides = [network(), as_float32(network(signature=FLOAT32))]

    verdict = judge_against(*(reversed(sides) if swapped else sides))

    assert verdict.status in ("pass", "changed")
    assert verdict.mode == "cross"
    assert verdict.judged
    assert "model.dtype" in verdict.notes[0]
    assert ("model.dtype", "bfloat16", "float32") in verdict.changes or swapped


@pytest.mark.parametrize(
    ("name", "value"), [("custom_ops", ["none"]), ("attention", ["TRITON_ATTN"])]
)
def test_other_kernels_round_otherwise(name, value):
    """With other kernels on one side the limits for another key hold."""
    off = {"provenance": {name: value}}

    verdict = judge_against(network(), network(after="b.y", factor=1.01, **off))

    assert verdict.status == "changed"
    assert verdict.mode == "cross"
    assert name in verdict.notes[0]
    alike = judge_against(network(**off), network(after="b.y", factor=1.01, **off))
    assert (alike.status, alike.mode) == ("fail", "same")


def test_fault_beside_another_dtype_is_named():
    """A fault is found between a float32 and a bfloat16 engine too."""
    wide = as_float32(network(signature=FLOAT32))

    verdict = judge_against(wide, network(after="b.y", factor=1.3))

    assert verdict.status == "fail"
    assert verdict.divergence.module == "b.y"


def test_quantization_widens_the_limits():
    """Where only one side is quantized the limits for another key hold."""
    plain = network(provenance={"quantization": None})

    verdict = judge_against(plain, network(provenance={"quantization": "fp8"}))

    assert verdict.mode == "cross"
    assert "quantization" in verdict.notes[0]


@pytest.mark.parametrize(("other", "kind"), [("fp8", "origin"), (None, "weights")])
def test_weights_of_a_quantized_checkpoint_are_no_finding(other, kind):
    """Of two checkpoints on purpose the first module that is off is named."""
    plain = network(provenance={"quantization": None}, weights={"a": {"a.w": "1"}})
    candidate = network(
        after="b.y",
        factor=1.5,
        provenance={"quantization": other},
        weights={"a": {"a.w": "2"}},
    )

    divergence = judge_against(plain, candidate).divergence

    assert divergence.kind == kind
    assert divergence.module == {"origin": "b.y", "weights": "a"}[kind]


def test_architecture_may_differ():
    """Another class of the model is a change, no reason not to compare."""
    other = {**BFLOAT16, "model": {**BFLOAT16["model"], "architecture": "Other"}}

    verdict = judge_against(network(), network(signature=other))

    assert verdict.status == "pass"
    assert ("model.architecture", None, "Other") in verdict.changes


def test_another_model_is_incomparable():
    """Models of other sizes are not compared."""
    other = {**BFLOAT16, "model": {**BFLOAT16["model"], "hidden_size": 16}}

    verdict = judge_against(network(), network(signature=other))

    assert verdict.status == "incomparable"
