# SPDX-License-Identifier: Apache-2.0
"""Finds what the paths of `compare` hold: captures, goldens or dumps."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pytest_msprobe.dump import layout
from pytest_msprobe.dump.capture import CaptureFile, read_capture
from pytest_msprobe.dump.convert import dump_capture, has_checksums, whole_capture
from pytest_msprobe.dump.reader import DumpFile, read_dump
from pytest_msprobe.errors import DumpFormatError

_STEP = re.compile(r"step(\d+)")
_RANK = re.compile(r"(?:capture\.)?(.*?)(?:\.?rank(\d+))?\.jsonl")


@dataclass(slots=True)
class Ranks:
    """What one test or run left, by rank.

    Attributes:
        files: Capture files or goldens.
        dumps: Dumps by step, where there are no such files.
    """

    files: dict[int, Path] = field(default_factory=dict)
    dumps: dict[int, dict[int, DumpFile]] = field(default_factory=dict)


def find_ranks(path: Path) -> dict[str, Ranks]:
    """What a path holds, by its place below the path; `` for itself.

    Args:
        path: A capture file or golden, a dump.json, the folder of a rank, a step, a
            dump, a test's goldens or a run.

    Raises:
        DumpFormatError: Nothing that could be compared.
    """
    if path.is_file():
        if path.suffix == ".jsonl":
            return {"": Ranks(files={0: path})}
        return {"": Ranks(dumps={0: {_step_of(path): read_dump(path)}})}
    if not path.is_dir():
        raise DumpFormatError(f"{path}: cannot be read (no such file or folder)")
    files = _capture_files(path)
    if files:
        return files
    dumps = _dumps(path)
    if dumps:
        return {"": Ranks(dumps=dumps)}
    message = f"{path}: holds no capture, golden or dump.json"
    hint = "name a .jsonl file, a dump.json, or a folder that holds one of them"
    raise DumpFormatError(message, hint=hint)


def _capture_files(path: Path) -> dict[str, Ranks]:
    found: dict[str, Ranks] = {}
    for file in sorted(path.rglob("*.jsonl")):
        match = _RANK.fullmatch(file.name)
        if match is None or file.name == "capture.combined.jsonl":
            continue
        place = str(file.parent.relative_to(path))
        variant = "" if file.name.startswith("capture.") else match[1]
        label = "" if place == "." else place
        if variant:
            label = f"{label}/{variant}" if label else variant
        found.setdefault(label, Ranks()).files[int(match[2] or 0)] = file
    return {"": found.popitem()[1]} if len(found) == 1 else found


def _dumps(path: Path) -> dict[int, dict[int, DumpFile]]:
    if (path / layout.DUMP).is_file():
        return {0: {_step_of(path): read_dump(path)}}
    steps = layout.steps_of(path) or {_step_of(path): path}
    found: dict[int, dict[int, DumpFile]] = {}
    for step, folder in steps.items():
        for number, rank in enumerate(layout.ranks_of(folder).values()):
            found.setdefault(number, {})[step] = read_dump(rank)
    return found


def _step_of(path: Path) -> int:
    """Number of the step that a path below one belongs to, 0 where none is named."""
    found = [_STEP.fullmatch(part) for part in path.absolute().parts]
    return next((int(match[1]) for match in reversed(found) if match), 0)


def read_pairs(
    golden: Ranks, candidate: Ranks
) -> list[tuple[CaptureFile, CaptureFile]]:
    """Captures of both sides, rank by rank, in the order of their numbers.

    Where one side is a dump, a capture is taken as the dump it would be.

    Raises:
        DumpFormatError: The sides have different numbers of ranks.
    """
    old, new = (sorted(s.files) or sorted(s.dumps) for s in (golden, candidate))
    if len(old) != len(new):
        message = f"ranks: {len(old)} in the golden, {len(new)} in the candidate"
        raise DumpFormatError(message)
    if golden.files and candidate.files:
        sides = zip(golden.files.values(), candidate.files.values(), strict=True)
        return [(read_capture(a), read_capture(b)) for a, b in sides]
    pairs = []
    for a, b in zip(old, new, strict=True):
        steps = golden.dumps.get(a, {}), candidate.dumps.get(b, {})
        if all(len(dumps) == 1 for dumps in steps):  # of whatever numbers
            first_step, second_step = (next(iter(dumps.values())) for dumps in steps)
            steps = {0: first_step}, {0: second_step}
        # One step of a dump stands for that step of a capture.
        known = {*steps[0], *steps[1]}
        wanted = known if len(known) == 1 else None
        # Checksums tell what is equal where both sides have them.
        use = all(s and has_checksums(next(iter(s.values()))) for s in steps)
        both = zip(steps, (golden, candidate), (a, b), strict=True)
        first, second = (
            dump_capture(dumps, rank=a, world=len(old), has_checksums=use)
            if dumps
            else whole_capture(read_capture(side.files[rank]), wanted)
            for dumps, side, rank in both
        )
        second.header.world = first.header.world
        pairs.append((first, second))
    return pairs
