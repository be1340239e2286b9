# SPDX-License-Identifier: Apache-2.0
"""Which rank this process is."""

import torch


def current_rank() -> int | None:
    """Rank in the default process group, None while there is none."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return None
