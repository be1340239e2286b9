# SPDX-License-Identifier: Apache-2.0
"""Folders and file names of a dump, as msProbe lays them out."""

import re
from pathlib import Path

DUMP = "dump.json"
DEBUG = "debug.json"
STACK = "stack.json"
CONSTRUCT = "construct.json"
TENSORS = "dump_tensor_data"

_STEP = re.compile(r"step(\d+)")
_RANK = re.compile(r"(rank|proc)(\d+)?")


def rank_name(rank: int | None, pid: int) -> str:
    """Folder of one process: `rank<R>`, or `proc<pid>` while no rank is known."""
    return f"proc{pid}" if rank is None else f"rank{rank}"


def rank_folder(dump_path: Path, step: int, name: str) -> Path:
    """Folder of one rank in one step."""
    return dump_path / f"step{step}" / name


def steps_of(dump_path: Path) -> dict[int, Path]:
    """Step folders of a dump by number, in order."""
    found = {}
    for entry in sorted(dump_path.iterdir()) if dump_path.is_dir() else ():
        match = _STEP.fullmatch(entry.name)
        if match and entry.is_dir():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def ranks_of(step_folder: Path) -> dict[str, Path]:
    """Rank folders of a step that hold a dump, by name, in order of number."""
    found = []
    for entry in step_folder.iterdir():
        match = _RANK.fullmatch(entry.name)
        if match and (entry / DUMP).is_file():
            found.append((int(match[2] or 0), entry))
    return {entry.name: entry for _, entry in sorted(found)}
