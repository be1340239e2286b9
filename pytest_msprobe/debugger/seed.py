# SPDX-License-Identifier: Apache-2.0
"""`seed_all` with msProbe's signature."""

import os
import random

import numpy as np
import torch

from pytest_msprobe.errors import ConfigError

_LARGEST_SEED = 2**32 - 1


def seed_all(
    seed: int = 1234,
    mode: bool = False,  # noqa: FBT001, FBT002 - msProbe's signature
    rm_dropout: bool = False,  # noqa: FBT001, FBT002 - msProbe's signature
) -> None:
    """Seeds the random generators and sets torch's deterministic mode.

    Args:
        seed: 0 to 2**32 - 1, for random, numpy and torch, and PYTHONHASHSEED of
            processes started later.
        mode: Passed to `torch.use_deterministic_algorithms`, so False switches it off.
        rm_dropout: Replaces `torch.nn.functional.dropout`, `dropout2d` and
            `dropout3d` by functions that drop nothing, for the rest of the process.

    Raises:
        ConfigError: An argument has the wrong type or range.

    Source: signature and effects of msProbe 26.2's seed_all.
    """
    if (
        isinstance(seed, bool)
        or not isinstance(seed, int)
        or not 0 <= seed <= _LARGEST_SEED
    ):
        message = f"seed {seed!r}: expected a whole number from 0 to {_LARGEST_SEED}"
        raise ConfigError(message, slug="seed")
    flags: dict[str, object] = {"mode": mode, "rm_dropout": rm_dropout}
    for name, value in flags.items():
        if not isinstance(value, bool):
            message = f"{name} {value!r}: expected True or False"
            raise ConfigError(message, slug="seed")
    random.seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    np.random.seed(seed)  # noqa: NPY002 - the legacy generator is what users draw from
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(mode)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if rm_dropout:
        _remove_dropout()


def _remove_dropout() -> None:
    functional = torch.nn.functional
    for name in ("dropout", "dropout2d", "dropout3d"):
        original = getattr(functional, name)
        if getattr(original, "_msprobe_inert", False):
            continue

        def keep(
            input: torch.Tensor,  # noqa: A002 - torch's name
            p: float = 0.5,
            training: bool = True,  # noqa: FBT001, FBT002 - torch's signature
            inplace: bool = False,  # noqa: FBT001, FBT002 - torch's signature
            *,
            _original: object = original,
        ) -> torch.Tensor:
            del p
            result: torch.Tensor = _original(input, 0.0, training, inplace)  # type: ignore[operator]
            return result

        keep._msprobe_inert = True  # type: ignore[attr-defined]  # noqa: SLF001
        setattr(functional, name, keep)
