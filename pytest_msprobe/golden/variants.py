# SPDX-License-Identifier: Apache-2.0
"""Where the goldens of a test lie, and which of its variants is taken."""

import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pytest_msprobe.dump.capture import read_header
from pytest_msprobe.golden.key import device_kind

SUFFIX = ".jsonl"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.,=+\[\]@-]")
_LONGEST = 150


def safe_name(text: str) -> str:
    """A test's name as a folder name; changed names get a hash so that none collide."""
    safe = _UNSAFE.sub("_", text)[:_LONGEST]
    if safe == text and safe not in ("", ".", ".."):
        return safe
    return f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def captures_of(first: Path, test: str) -> list[Path]:
    """Goldens of all captures of a test, its first and those with names.

    Args:
        first: Folder of the goldens of its first capture.
        test: Its node id.
    """
    # Names that were changed end with a hash of their own.
    name = re.sub(r"-[0-9a-f]{8}$", "", first.name)[: _LONGEST - 1]
    folders = first.parent.glob(f"{glob.escape(name)}*")
    paths = (path for folder in sorted(folders) for path in folder.glob(f"*{SUFFIX}"))
    return [path for path in paths if read_header(path).test == test]


def test_folder(directory: Path, test_file: str, test_name: str) -> Path:
    """Folder of a test's goldens.

    Args:
        directory: Root of the golden tree.
        test_file: Path of the test file, relative to the configuration's folder.
        test_name: Name of the test, class and parameters included.
    """
    parts = [part for part in Path(test_file).parts if part not in ("..", "/", ".")]
    return directory.joinpath(*parts, safe_name(test_name))


def file_name(variant: str, rank: int) -> str:
    """File name of a variant's golden for a rank."""
    return f"{variant}{SUFFIX}" if rank == 0 else f"{variant}.rank{rank}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The golden that a capture is judged against.

    Attributes:
        path: The file, None where the test has no golden for this rank.
        variant: Its variant.
        is_same_key: Whether its numerics key is the capture's.
    """

    path: Path | None
    variant: str = ""
    is_same_key: bool = False


def variants_of(folder: Path, rank: int) -> dict[str, Path]:
    """Goldens of a test for a rank, by variant, sorted."""
    found: dict[str, Path] = {}
    tail = file_name("", rank)
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        variant = path.name[: -len(tail)]
        if path.name.endswith(tail) and not re.search(r"\.rank\d+$", variant):
            found[variant] = path
    return found


def ranks_of(folder: Path, variant: str) -> dict[int, Path]:
    """Goldens of one variant of a test, by rank, in order."""
    own = re.compile(rf"{re.escape(variant)}(?:\.rank(\d+))?{re.escape(SUFFIX)}")
    found: dict[int, Path] = {}
    for path in folder.glob(f"*{SUFFIX}"):
        match = own.fullmatch(path.name)
        if match is not None:
            found[int(match[1] or 0)] = path
    return dict(sorted(found.items()))


def choose(folder: Path, key: str, rank: int) -> Choice:
    """The variant of this numerics key, else one of the same kind of device, else any.

    Variants are named by their key.
    """
    variants = variants_of(folder, rank)
    if key in variants:
        return Choice(variants[key], key, is_same_key=True)
    if not variants:
        return Choice(None)
    kind = device_kind(key)
    near = [name for name in variants if device_kind(name) == kind]
    name = (near or list(variants))[0]
    return Choice(variants[name], name)
