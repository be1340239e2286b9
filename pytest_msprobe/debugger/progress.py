# SPDX-License-Identifier: Apache-2.0
"""Notes the running call in a small file, so that it is known where a process died.

The file is mapped into memory: what was written last is there however the process
ended, at the cost of copying a name.
"""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

_SIZE = 512
_NAME = 64


class Progress:
    """Writes the file of one process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{os.getpid()}\n".encode().ljust(_SIZE, b" "))
        self.path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._names: dict[str, bytes] = {}
        self._step = b""

    def begin_step(self, number: int) -> None:
        """Notes that a step begins."""
        self._step = b"%d " % number
        self._map[32:_NAME] = self._step.ljust(_NAME - 32)
        self.note("")

    def note(self, name: str) -> None:
        """Notes the call that begins, and when."""
        text = self._names.get(name)
        if text is None:
            room = _SIZE - _NAME
            text = self._names[name] = name.encode()[:room].ljust(room)
        self._map[12:32] = b"%20d" % time.monotonic_ns()
        self._map[_NAME:_SIZE] = text

    def close(self) -> None:
        """Removes the file: the process has ended its capture."""
        self._map.close()
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class LastSeen:
    """What a process noted last.

    Attributes:
        pid: The process.
        when: Monotonic nanoseconds of the machine.
        step: Number of the step, None before the first.
        call: Name of the call, empty between calls.
    """

    pid: int
    when: int
    step: int | None
    call: str


def read_progress(path: Path) -> LastSeen:
    """Reads what a process noted last.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such a file.
    """
    data = path.read_bytes()
    pid = int(data[:12].split(b"\n")[0])
    when = int(data[12:32].strip() or b"0")
    step = data[32:_NAME].strip()
    call = data[_NAME:].decode(errors="replace").strip()
    return LastSeen(pid, when, int(step) if step else None, call)
