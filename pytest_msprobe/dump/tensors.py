# SPDX-License-Identifier: Apache-2.0
"""Saves tensors of a dump as msProbe does: one `torch.save` file a tensor."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LONGEST_NAME = 255


def file_name(call: str, slot: str) -> str:
    """File name of a tensor in a slot of a call.

    The sides are called `input`, `kwargs`, `output` and `parameters` in file names.
    """
    side, _, rest = slot.partition(".")
    side = {"input_args": "input", "input_kwargs": "kwargs"}.get(side, side)
    return f"{call}.{side}.{rest}.pt" if rest else f"{call}.{side}.pt"


def save_tensor(folder: Path, name: str, tensor: "torch.Tensor") -> str | None:
    """Saves a contiguous detached copy; returns the name, None if there is no data.

    Args:
        folder: The folder `dump_tensor_data`, made if missing.
        name: File name.
        tensor: Any dtype, any device.
    """
    import torch

    if tensor.numel() == 0 or tensor.is_meta or len(name) > _LONGEST_NAME:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.tmp"
    torch.save(tensor.detach().clone().contiguous(), temporary)
    temporary.replace(folder / name)
    return name
