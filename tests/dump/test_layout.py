# SPDX-License-Identifier: Apache-2.0
"""Folders of a dump, reading one, and saved tensors."""

import json

import pytest
import torch

from pytest_msprobe.dump.layout import rank_folder, rank_name, ranks_of, steps_of
from pytest_msprobe.dump.reader import read_dump
from pytest_msprobe.dump.tensors import file_name, save_tensor
from pytest_msprobe.errors import DumpFormatError


def test_folders_are_found_in_order(tmp_path):
    """Steps and ranks are found by number, whatever else lies there."""
    for step in (10, 2):
        for rank in (1, 0):
            folder = rank_folder(tmp_path, step, rank_name(rank, 5))
            folder.mkdir(parents=True)
            (folder / "dump.json").write_text("{}")
    (tmp_path / "step3.txt").write_text("")
    (tmp_path / "step2" / "rank7").mkdir()

    assert list(steps_of(tmp_path)) == [2, 10]
    assert list(ranks_of(tmp_path / "step2")) == ["rank0", "rank1"]
    assert rank_name(None, 5) == "proc5"


def test_dump_with_bare_nan_is_read(tmp_path):
    """NaN as msProbe writes it is read as a float."""
    (tmp_path / "dump.json").write_text(
        '{"task": "statistics", "level": "L0", "data": {"a": {"output": [NaN]}}}'
    )

    found = read_dump(tmp_path)

    assert found.data["a"]["output"][0] != found.data["a"]["output"][0]
    assert (found.task, found.level) == ("statistics", "L0")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": []}'])
def test_other_files_are_no_dumps(tmp_path, content):
    """A file without data is refused with its path."""
    (tmp_path / "dump.json").write_text(content)

    with pytest.raises(DumpFormatError, match=r"dump\.json"):
        read_dump(tmp_path)


@pytest.mark.parametrize(
    ("slot", "name"),
    [
        ("input_args.0.1", "Torch.cat.0.forward.input.0.1.pt"),
        ("input_kwargs.y", "Torch.cat.0.forward.kwargs.y.pt"),
        ("output.0", "Torch.cat.0.forward.output.0.pt"),
        ("parameters.weight", "Torch.cat.0.forward.parameters.weight.pt"),
    ],
)
def test_file_names_of_tensors(slot, name):
    """Tensors are named as msProbe names them."""
    assert file_name("Torch.cat.0.forward", slot) == name


def test_saved_tensor_is_a_contiguous_copy(tmp_path):
    """A view is saved as a tensor of its own, and empty ones are not saved."""
    tensor = torch.arange(12.0).reshape(3, 4).t()

    assert save_tensor(tmp_path, "a.pt", tensor) == "a.pt"
    assert save_tensor(tmp_path, "b.pt", torch.zeros(0)) is None
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded.is_contiguous()
    assert loaded.equal(tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_reading_our_own_dump(tmp_path):
    """What the reader gives is what json reads."""
    (tmp_path / "dump.json").write_text(json.dumps({"task": "t", "data": {"x": {}}}))

    assert read_dump(tmp_path / "dump.json").data == {"x": {}}
