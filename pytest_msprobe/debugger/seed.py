# SPDX-License-Identifier: Apache-2.0
"""`seed_all` with msProbe's signature."""

import functools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pytest_msprobe.errors import ConfigError

_LARGEST_SEED = 2**32 - 1
_PYTHON_NAMES = (
    "random randint randrange uniform choice choices sample shuffle gauss normalvariate"
)
_NUMPY_NAMES = (
    "rand randn randint random random_sample normal uniform choice permutation shuffle"
)
_TORCH_NAMES = (
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli "
    "multinomial poisson"
)
_TENSOR_NAMES = "random_ normal_ uniform_ bernoulli_ exponential_ multinomial bernoulli"


def seed_all(
    seed: int = 1234,
    mode: bool = False,  # noqa: FBT001, FBT002 - msProbe's signature
    rm_dropout: bool = False,  # noqa: FBT001, FBT002 - msProbe's signature
    is_enhanced: bool = False,  # noqa: FBT001, FBT002 - msProbe's signature
) -> None:
    """Seeds the random generators and sets torch's deterministic mode.

    Args:
        seed: 0 to 2**32 - 1, for random, numpy and torch, and PYTHONHASHSEED of
            processes started later.
        mode: Passed to `torch.use_deterministic_algorithms`, so False switches it off.
        rm_dropout: Replaces `torch.nn.functional.dropout`, `dropout2d` and
            `dropout3d` by functions that drop nothing, for the rest of the process.
        is_enhanced: Replaces the random functions of random, numpy and torch by ones
            that seed their generator before each call, so that every call of one form
            gives the same values, for the rest of the process.

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
    flags["is_enhanced"] = is_enhanced
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
    if is_enhanced:
        _seed_every_call(seed)


def _seed_every_call(seed: int) -> None:
    """Replaces random functions by ones that seed their generator first."""
    places: list[tuple[Any, str, Callable[[int], Any]]] = [
        (random, _PYTHON_NAMES, random.seed),
        (np.random, _NUMPY_NAMES, np.random.seed),
        (torch, _TORCH_NAMES, torch.manual_seed),
        (torch.Tensor, _TENSOR_NAMES, torch.manual_seed),
    ]
    for owner, names, sow in places:
        for name in names.split():
            found = getattr(owner, name)
            original = getattr(found, "_msprobe_original", found)
            setattr(owner, name, _seeded(original, sow, seed))


def _seeded(
    original: Callable[..., Any], sow: Callable[[int], Any], seed: int
) -> Callable[..., Any]:
    @functools.wraps(original)
    def draw(*args: Any, **kwargs: Any) -> Any:
        sow(seed)
        return original(*args, **kwargs)

    draw._msprobe_original = original  # type: ignore[attr-defined]  # noqa: SLF001
    return draw


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
