# SPDX-License-Identifier: Apache-2.0
"""Keeps two processes from writing the dump of one rank into one folder."""

import os
from pathlib import Path

import filelock

from pytest_msprobe.errors import CaptureError


class DumpLock:
    """Held by the process that writes a rank's dump, as long as it writes."""

    def __init__(self, dump_path: Path, rank: str) -> None:
        """Takes the lock; the file holds the process's number.

        Args:
            dump_path: Folder of the dump, made if it is missing.
            rank: Name of the rank's folder.

        Raises:
            CaptureError: Another process holds it, or the folder cannot be written.
        """
        path = dump_path / f".{rank}.lock"
        try:
            dump_path.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path, is_singleton=False)
            self._lock.acquire(timeout=0)
            path.write_text(str(os.getpid()), encoding="ascii")
        except filelock.Timeout:
            owner = path.read_text(encoding="ascii", errors="replace").strip()
            message = f"{dump_path}: process {owner} is writing {rank} there"
            hint = "give every engine a dump_path of its own"
            raise CaptureError(message, slug="dump-locked", hint=hint) from None
        except OSError as error:
            message = f"{dump_path}: cannot be written ({error.strerror})"
            hint = "make it writable, or change dump_path"
            raise CaptureError(message, slug="dump-unwritable", hint=hint) from error

    def release(self) -> None:
        """Gives the folder free."""
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
