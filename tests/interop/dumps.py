# SPDX-License-Identifier: Apache-2.0
"""Reads dumps as they lie in their folders and finds what differs between two."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

# A mean is summed by the real tool in float32 and rounded to the tensor's type.
ROUNDING = {
    "torch.float16": 2**-10,
    "torch.bfloat16": 2**-7,
    "torch.float32": 3e-6,
    "torch.complex64": 3e-6,
    "torch.complex128": 1e-12,
}
TENSOR_KEYS = ("Max", "Min", "Mean", "Norm")


@dataclass(frozen=True)
class Difference:
    """One thing that our dump has otherwise than the real tool's.

    Attributes:
        step: Name of the step's folder.
        record: Name of the record, empty for the set of files.
        place: Path inside the record.
        theirs: What the real tool has there.
        ours: What we have there.
    """

    step: str
    record: str
    place: str
    theirs: object
    ours: object

    def __str__(self):
        text = f"{self.step} {self.record} {self.place}"
        return f"{text}: theirs {self.theirs!r:.160}, ours {self.ours!r:.160}"


@dataclass(frozen=True)
class Intended:
    """A difference that is meant, with its reason.

    Attributes:
        record: Pattern of the record's name.
        place: Pattern of the path inside the record.
        reason: Why it is so.
        programs: Programs in which it may occur, empty for all.
    """

    record: str
    place: str
    reason: str
    programs: tuple[str, ...] = ()

    def covers(self, program, difference):
        return (
            (not self.programs or program in self.programs)
            and re.fullmatch(self.record, difference.record) is not None
            and re.fullmatch(self.place, difference.place) is not None
        )


def read_steps(folder):
    """Content of the one rank folder of each step: file name to data."""
    found = {}
    for step in sorted(Path(folder).glob("step*")):
        ranks = [path for path in sorted(step.iterdir()) if path.is_dir()]
        assert len(ranks) == 1, f"{step}: {ranks}"
        files = {
            path.name: json.loads(path.read_text()) for path in ranks[0].glob("*.json")
        }
        tensors = ranks[0] / "dump_tensor_data"
        files["tensors"] = sorted(path.name for path in tensors.glob("*.pt"))
        found[step.name] = files
    return found


def differences(theirs, ours):
    """All differences between two dumps, `theirs` by the real tool."""
    left, right = read_steps(theirs), read_steps(ours)
    found = []
    for step in sorted(left.keys() | right.keys()):
        if step not in left or step not in right:
            found.append(Difference(step, "", "step", step in left, step in right))
            continue
        found.extend(_step(step, left[step], right[step]))
    return found


def _step(step, theirs, ours):
    name = "debug.json" if "debug.json" in theirs else "dump.json"
    for key in ("task", "level", "framework"):
        if theirs[name][key] != ours.get(name, {}).get(key):
            yield Difference(
                step, "", key, theirs[name][key], ours.get(name, {}).get(key)
            )
    if (theirs[name]["dump_data_dir"] is None) != (ours[name]["dump_data_dir"] is None):
        yield Difference(
            step,
            "",
            "dump_data_dir",
            theirs[name]["dump_data_dir"],
            ours[name]["dump_data_dir"],
        )
    yield from _records(step, theirs[name]["data"], ours[name]["data"])
    for file in sorted(set(theirs["tensors"]) ^ set(ours["tensors"])):
        yield Difference(
            step, file, "file", file in theirs["tensors"], file in ours["tensors"]
        )
    for file in ("stack.json", "construct.json"):
        if (file in theirs) != (file in ours):
            yield Difference(step, file, "file", file in theirs, file in ours)
    if "construct.json" in theirs and "construct.json" in ours:
        recorded = theirs[name]["data"].keys() & ours[name]["data"].keys()
        for record in sorted(recorded):
            left, right = (
                files["construct.json"].get(record, "-") for files in (theirs, ours)
            )
            if left != right:
                yield Difference(step, record, "parent", left, right)


def _records(step, theirs, ours):
    for record in [*theirs, *(name for name in ours if name not in theirs)]:
        if record not in theirs or record not in ours:
            yield Difference(step, record, "record", record in theirs, record in ours)
        else:
            for place, left, right in _values(theirs[record], ours[record], ""):
                yield Difference(step, record, place, left, right)
    common = [name for name in theirs if name in ours]
    if common != [name for name in ours if name in theirs]:
        yield Difference(step, "", "order", common, [n for n in ours if n in theirs])


def _values(theirs, ours, place):
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if "dtype" in theirs and "shape" in theirs:
            yield from _tensors(theirs, ours, place)
            return
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            inner = f"{place}.{key}".lstrip(".")
            if key not in theirs or key not in ours:
                yield inner, theirs.get(key, "absent"), ours.get(key, "absent")
            else:
                yield from _values(theirs[key], ours[key], inner)
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            yield f"{place}.length", len(theirs), len(ours)
        for index, (left, right) in enumerate(zip(theirs, ours, strict=False)):
            yield from _values(left, right, f"{place}.{index}")
    elif not same(theirs, ours):
        yield place, theirs, ours


def _tensors(theirs, ours, place):
    if [k for k in theirs if k in ours] != [k for k in ours if k in theirs]:
        yield f"{place}.keys", list(theirs), list(ours)
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        left, right = theirs.get(key, "absent"), ours.get(key, "absent")
        close = ROUNDING.get(theirs["dtype"]) if key in ("Mean", "Norm") else None
        # A sum of terms that cancel is as exact as the terms are large.
        floor = _largest(ours) if key == "Mean" else 0.0
        if not same(left, right, close, floor):
            yield f"{place}.{key}", left, right


def _largest(tensor):
    ends = [tensor.get(key) for key in ("Max", "Min")]
    finite = [abs(end) for end in ends if end is not None and math.isfinite(end)]
    return max(finite, default=0.0)


def same(theirs, ours, relative=None, scale=0.0):
    """Whether two JSON values are equal, floats within a distance relative to both."""
    if type(theirs) is not type(ours):
        return False
    if isinstance(theirs, float):
        if math.isnan(theirs) or math.isnan(ours):
            return math.isnan(theirs) and math.isnan(ours)
        return theirs == ours or math.isclose(
            theirs, ours, rel_tol=relative or 0.0, abs_tol=(relative or 0.0) * scale
        )
    return theirs == ours
