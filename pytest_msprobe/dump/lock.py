# SPDX-License-Identifier: Apache-2.0
"""Keeps two processes from writing the dump of one rank into one folder.

The system's own lock is used, not filelock: before its version 4 a process that is
refused empties the file that names the owner, and one that was forked frees the lock
when it ends.
"""

import contextlib
import errno
import fcntl
import os
import weakref
from pathlib import Path

from pytest_msprobe.errors import CaptureError

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class DumpLock:
    """Held by the process that writes a rank's dump, as long as it writes.

    The system frees it when that process ends, however it ends; a file that is left
    behind is no lock. Forked processes do not hold it.
    """

    def __init__(self, dump_path: Path, rank: str) -> None:
        """Takes the lock; the file holds the process's number.

        Args:
            dump_path: Folder of the dump, made if it is missing.
            rank: Name of the rank's folder.

        Raises:
            CaptureError: Another process holds it, or the folder cannot be written.
        """
        self._path = _place(dump_path, rank)
        self._file: int | None = None
        try:
            dump_path.mkdir(parents=True, exist_ok=True)
            self._file = _open_locked(self._path)
            _HELD.add(self)
        except BlockingIOError:
            owner = _owner(self._path)
            process = f"process {owner}" if owner else "another process"
            message = f"{dump_path}: {process} is writing {rank} there"
            hint = "give every engine and every program a dump_path of its own"
            raise CaptureError(message, slug="dump-locked", hint=hint) from None
        except OSError as error:
            message = f"{dump_path}: cannot be written ({error.strerror})"
            hint = "make it writable, or change dump_path"
            raise CaptureError(message, slug="dump-unwritable", hint=hint) from error

    def is_for(self, dump_path: Path, rank: str) -> bool:
        """Whether it is the lock of a rank's dump."""
        return self._path == _place(dump_path, rank)

    def others(self) -> list[str]:
        """What other running processes write into the same folder, as text."""
        found = []
        for path in sorted(self._path.parent.glob(".*.lock")):
            owner = _owner(path)
            if path != self._path and owner is not None and _is_running(owner):
                found.append(f"process {owner} ({path.stem[1:]})")
        return found

    def release(self) -> None:
        """Gives the folder free."""
        if self._file is None:
            return
        # While it is held: who has opened this file meanwhile sees that it is gone.
        with contextlib.suppress(OSError):
            self._path.unlink()
        self.forget()

    def forget(self) -> None:
        """Closes the file; the lock is free once no process has it open."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        """Gives the folder free."""
        self.release()


_HELD: weakref.WeakSet[DumpLock] = weakref.WeakSet()


def _place(dump_path: Path, rank: str) -> Path:
    return dump_path.absolute() / f".{rank}.lock"


def _open_locked(path: Path) -> int:
    """Opens a file that no other process holds, with this process's number in it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _TAKEN:
                    raise BlockingIOError from None  # else locks are unknown here
            if os.fstat(file).st_nlink:
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # removed by the process that held it


def _owner(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii"))
    return None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _forget_all() -> None:
    """In a forked process: the locks are the parent's, which alone frees them."""
    for lock in _HELD:
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
