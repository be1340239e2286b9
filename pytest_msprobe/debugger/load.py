# SPDX-License-Identifier: Apache-2.0
"""msProbe's `load`: inputs of modules are replaced by those of an earlier dump."""

from pathlib import Path
from typing import Any

import torch

from pytest_msprobe.config.debugger_config import Load
from pytest_msprobe.dump import layout
from pytest_msprobe.errors import CaptureError


class Loader:
    """Replaces the inputs of the listed calls by the tensors of a dump.

    Attributes:
        loaded: Names of the calls that had inputs replaced.
    """

    def __init__(self, load: Load, rank: str) -> None:
        """Prepares; reads nothing yet.

        Args:
            load: Which dump and which calls.
            rank: Name of this rank's folder.
        """
        self.loaded: set[str] = set()
        self._load = load
        self._rank = rank if load.rank is None else f"rank{load.rank}"
        self._folder = Path()
        self._count = 0

    @property
    def unused(self) -> list[str]:
        """Listed calls that were never made."""
        return [name for name in self._load.modules if name not in self.loaded]

    def begin_step(self, number: int) -> None:
        """Looks the folder of a step up.

        Raises:
            CaptureError: The dump has no tensors for this step and rank.
        """
        wanted = number if self._load.step is None else self._load.step
        step = Path(self._load.path) / f"step{wanted}"
        ranks = layout.ranks_of(step) if step.is_dir() else {}
        folder = ranks.get(self._rank)
        if folder is None and len(ranks) == 1 and "proc" in min(ranks):
            folder = next(iter(ranks.values()))
        if folder is None or not (folder / layout.TENSORS).is_dir():
            message = f"load: {step / self._rank}: no dump with tensors there"
            hint = "name a dump of the task tensor with this step and rank"
            raise CaptureError(message, slug="load", hint=hint)
        self._folder = folder / layout.TENSORS

    def replace(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call with the dump's tensors, where it is listed.

        Raises:
            CaptureError: The dump has no inputs of the call, or of another form.
        """
        if name not in self._load.modules:
            return args, kwargs
        self._count = 0
        new_args = self._exchange(args, f"{name}.input")
        new_kwargs = self._exchange(kwargs, f"{name}.kwargs")
        if not self._count:
            message = f"load: {self._folder}: no inputs of {name}"
            raise CaptureError(message, slug="load", hint="name a call of that dump")
        self.loaded.add(name)
        return new_args, new_kwargs

    def _exchange(self, value: Any, stem: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._read(value, stem)
        if type(value) is dict:
            return {k: self._exchange(v, f"{stem}.{k}") for k, v in value.items()}
        if type(value) in (list, tuple):
            items = [self._exchange(v, f"{stem}.{i}") for i, v in enumerate(value)]
            return type(value)(items)
        return value

    def _read(self, tensor: torch.Tensor, stem: str) -> torch.Tensor:
        path = self._folder / f"{stem}.pt"
        if not path.is_file():
            return tensor
        found: torch.Tensor = torch.load(
            path, map_location=tensor.device, weights_only=True
        )
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            here, there = ((t.dtype, tuple(t.shape)) for t in (tensor, found))
            message = f"load: {path}: {there}, the call has {here}"
            raise CaptureError(message, slug="load", hint="give the same inputs")
        self._count += 1
        return found.requires_grad_(tensor.requires_grad)
