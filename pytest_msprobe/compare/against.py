# SPDX-License-Identifier: Apache-2.0
"""Judges one capture against another one that stands where a golden would.

Two engines of one test may be of another configuration on purpose. What may differ is
levelled, so that judging sees the numbers only, and is said in the verdict.
"""

from collections.abc import Sequence

import msgspec

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.signature import flatten
from pytest_msprobe.dump.capture import CaptureFile, TensorLine
from pytest_msprobe.model.dtypes import BY_CODE, element_type
from pytest_msprobe.model.limits import KeyMode, Rule
from pytest_msprobe.model.verdict import Verdict

# What of a model may differ between the two sides. The same of both decides nothing.
_FREE = ("dtype", "architecture")
# What changes the numbers so much that the limits for another key are taken.
_COARSE = ("model.dtype", "quantization", "ranks", "custom_ops", "attention")


def judge_against(
    reference: CaptureFile, candidate: CaptureFile, rules: Sequence[Rule] = ()
) -> Verdict:
    """The verdict on a candidate, with another capture in the place of a golden.

    Args:
        reference: The other capture, of the same prompts.
        candidate: What is judged.
        rules: Tolerances beyond the defaults, in order.
    """
    facts = [_facts(side) for side in (reference, candidate)]
    changes = [
        (name, facts[0].get(name), facts[1].get(name))
        for name in [*facts[0], *(name for name in facts[1] if name not in facts[0])]
        if facts[0].get(name) != facts[1].get(name)
    ]
    mode: KeyMode | None = None
    coarse = [name for name, _, _ in changes if name in _COARSE]
    if coarse:
        mode = "cross"
    dtypes = [str(side.get("model.dtype", "")) for side in facts]
    if dtypes[0] != dtypes[1]:
        narrow = min(dtypes, key=lambda name: element_type(name).size_bytes)
        reference, candidate = (
            _levelled(reference, narrow),
            _levelled(candidate, narrow),
        )
    else:
        reference = _with_free_facts(reference, candidate)
    if "quantization" in coarse:  # of two checkpoints, on purpose
        header = msgspec.structs.replace(reference.header, weights={})
        reference = CaptureFile(
            header, reference.tensors, reference.entries, reference.path
        )
    verdict = judge(reference, candidate, rules, mode=mode).verdict
    known = {name for name, _, _ in verdict.changes}
    verdict.changes += [change for change in changes if change[0] not in known]
    text = "judged against a capture of the same test in the place of a golden"
    if coarse:
        text += f"; not the same: {', '.join(coarse)}"
    verdict.notes.insert(0, text)
    return verdict


def _facts(capture: CaptureFile) -> dict[str, object]:
    """What made a capture, and those facts of its model that may differ."""
    model = capture.header.signature.get("model", {})
    free = {f"model.{name}": model[name] for name in _FREE if name in model}
    return {**flatten(capture.header.provenance), **free}


def _with_free_facts(reference: CaptureFile, candidate: CaptureFile) -> CaptureFile:
    """The reference with those facts of the candidate's model that may differ."""
    theirs = candidate.header.signature.get("model", {})
    free = {name: theirs[name] for name in _FREE if name in theirs}
    return _with_facts(reference, free)


def _with_facts(capture: CaptureFile, facts: dict[str, object]) -> CaptureFile:
    signature = dict(capture.header.signature)
    signature["model"] = {**signature.get("model", {}), **facts}
    header = msgspec.structs.replace(capture.header, signature=signature)
    return CaptureFile(header, capture.tensors, capture.entries, capture.path)


def _levelled(capture: CaptureFile, dtype: str) -> CaptureFile:
    """A capture whose float rows all count as one type, so that types do not differ.

    Args:
        capture: The capture.
        dtype: Name of the type that the limits go by.
    """
    code = element_type(dtype).code
    levelled = _with_facts(capture, {"dtype": dtype, "architecture": ""})
    levelled.tensors = {
        number: msgspec.structs.replace(line, d=code) if _is_float(line) else line
        for number, line in capture.tensors.items()
    }
    return levelled


def _is_float(line: TensorLine) -> bool:
    known = BY_CODE.get(line.d)
    return known is not None and known.kind == "float"
