# SPDX-License-Identifier: Apache-2.0
"""msProbe's `slice` and `request_id`: only a part of each tensor is recorded."""

from collections.abc import Sequence

import torch

from pytest_msprobe.config.debugger_config import Cut
from pytest_msprobe.errors import ConfigError


def cut_tensor(tensor: torch.Tensor, cuts: Sequence[Cut]) -> torch.Tensor:
    """The part of a tensor that the rules keep, a view; the tensor where none applies.

    Args:
        tensor: Any tensor; only strided ones are cut.
        cuts: Rules; of two that apply to one dimension the last one counts.
    """
    if tensor.is_nested or tensor.layout is not torch.strided:
        return tensor
    index = [slice(None)] * tensor.ndim
    applies = False
    for cut in cuts:
        if cut.dim >= tensor.ndim or cut.size not in (None, tensor.shape[cut.dim]):
            continue
        index[cut.dim] = slice(cut.begin, cut.end)
        applies = True
    if not applies:
        return tensor
    part = tensor.detach()[tuple(index)]
    if tensor.requires_grad:
        part.requires_grad_()
    return part


def cut_of_request(
    request_id: str | None, scheduled: dict[str, int] | None
) -> Cut | None:
    """Rows of the configured request in a batch, None where all rows are recorded.

    Args:
        request_id: The configured request, None for all.
        scheduled: Tokens of each request in this step, in the order of the batch.

    Raises:
        ConfigError: `scheduled` is no such mapping.
        KeyError: The request is not in the batch.
    """
    if scheduled is None:
        return None
    if not isinstance(scheduled, dict) or not all(
        isinstance(name, str)
        and isinstance(count, int)
        and not isinstance(count, bool)
        and count >= 1
        for name, count in scheduled.items()
    ):
        message = f"scheduled_tokens {scheduled!r:.80}: expected ids and numbers >= 1"
        raise ConfigError(message, slug="scheduled-tokens")
    if request_id is None:
        return None
    names = list(scheduled)
    place = names.index(request_id) if request_id in names else None
    if place is None:
        raise KeyError(request_id)
    begin = sum(scheduled[name] for name in names[:place])
    total = sum(scheduled.values())
    return Cut(0, total, begin, begin + scheduled[request_id])
