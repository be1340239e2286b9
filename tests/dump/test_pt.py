# SPDX-License-Identifier: Apache-2.0
"""Tensor files are read without torch and without unpickling."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from pytest_msprobe.dump.pt import read_tensor
from pytest_msprobe.errors import DumpFormatError

DTYPES = [
    *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "bool", "complex64"),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_type_are_read(tmp_path, dtype):
    """The bits are those that torch saved, the dtype has torch's name."""
    tensor = (torch.randn(3, 5, 7) * 9).to(getattr(torch, dtype))
    torch.save(tensor, tmp_path / "a.pt")

    found = read_tensor(tmp_path / "a.pt")

    bits = torch.from_numpy(np.array(found.bits)).view(torch.uint8)
    assert found.dtype == dtype
    assert torch.equal(bits, tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(6, 8).t(),
        torch.arange(20.0)[4:17:3],
        torch.tensor(3.5),
        torch.zeros(0, 4),
        torch.nn.Parameter(torch.randn(2, 3)),
    ],
    ids=["transposed", "strided", "0-d", "empty", "parameter"],
)
def test_views_and_parameters_are_read(tmp_path, tensor):
    """Offset, shape and strides are followed."""
    torch.save(tensor, tmp_path / "a.pt")

    found = read_tensor(tmp_path / "a.pt").bits

    assert np.array_equal(found, tensor.detach().numpy())


class Exploit:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return print, ("called",)


@pytest.mark.parametrize(
    "content", [{"a": torch.ones(2)}, [1, 2], Exploit(), torch.ones(2).to_sparse()]
)
def test_other_content_is_refused_and_nothing_is_called(tmp_path, capsys, content):
    """A file that holds no dense tensor is an error; its pickle is data, not code."""
    torch.save(content, tmp_path / "a.pt")

    with pytest.raises(DumpFormatError, match="something else than one tensor"):
        read_tensor(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_damaged_files_are_refused(tmp_path):
    """A file that is no archive, or whose bytes are fewer than its shape asks for."""
    path = tmp_path / "a.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(DumpFormatError, match="not a readable tensor file"):
        read_tensor(path)

    torch.save(torch.ones(64), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:-4] if name.endswith("data/0") else data)
    with pytest.raises(DumpFormatError, match="shorter than its shape"):
        read_tensor(tmp_path / "b.pt")


def test_reading_needs_no_torch():
    """Nothing of this imports torch or pickle's machine."""
    code = "import sys, pytest_msprobe.dump.pt; sys.exit('torch' in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True)
