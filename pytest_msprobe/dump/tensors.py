# SPDX-License-Identifier: Apache-2.0
"""Saves tensors of a dump as msProbe does: one `torch.save` file a tensor."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

_LONGEST_NAME = 255


def file_name(call: str, slot: str) -> str:
    """File name of a tensor in a slot of a call.

    The sides are called `input`, `kwargs`, `output` and `parameters` in file names.
    """
    side, _, rest = slot.partition(".")
    side = {"input_args": "input", "input_kwargs": "kwargs"}.get(side, side)
    name = f"{call}.{side}.{rest}.pt" if rest else f"{call}.{side}.pt"
    # Keys of dictionaries and names of modules may hold anything; a file name may not.
    return name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")


def save_tensor(folder: Path, name: str, tensor: "torch.Tensor") -> str | None:
    """Saves a contiguous detached copy; returns the name, None if there is no data.

    Args:
        folder: The folder `dump_tensor_data`, made if missing.
        name: File name.
        tensor: Any dtype, any device.
    """
    import torch

    if tensor.is_meta or not _is_possible(name):
        return None
    try:
        if tensor.numel() == 0:
            return None
        content = io.BytesIO()
        plain = tensor.detach()
        if type(plain) is not torch.Tensor:  # which others could not load
            plain = plain.as_subclass(torch.Tensor)
        plain = plain.clone()
        if plain.layout is torch.strided:
            plain = plain.contiguous()
        torch.save(plain, content)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None  # a kind that cannot be saved; its row says so by the missing name
    _write(folder, name, content)
    return name


def save_array(
    folder: Path, name: str, array: "np.ndarray[tuple[int, ...], np.dtype[Any]]"
) -> str | None:
    """Saves an array of numpy as a tensor, or as .npy where torch has no such type.

    Args:
        folder: The folder `dump_tensor_data`, made if missing.
        name: File name, ending in .pt.
        array: Any array.

    Returns:
        The name of the file; None if there is no data, or an array of objects.
    """
    import numpy as np
    import torch

    if array.size == 0 or array.dtype.hasobject or not _is_possible(name):
        return None
    try:
        tensor = torch.from_numpy(np.array(array))
    except TypeError:
        name = f"{name.removesuffix('.pt')}.npy"
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        _write(folder, name, content)
        return name
    return save_tensor(folder, name, tensor)


def _is_possible(name: str) -> bool:
    try:
        return len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False


def _write(folder: Path, name: str, content: io.BytesIO) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.tmp"
    temporary.write_bytes(content.getbuffer())
    temporary.replace(folder / name)
