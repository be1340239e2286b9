# SPDX-License-Identifier: Apache-2.0
"""The demo's model is used only if its bytes are the known ones."""

import os
import subprocess

import pytest
import tools


@pytest.fixture
def maker():
    """The script that makes the model."""
    return tools.example("tiny_qwen2")


@pytest.fixture
def demo(maker):
    """The script that runs the demo; it imports the maker."""
    return tools.example("demo")


def test_a_model_with_other_bytes_is_not_moved_into_place(
    maker, monkeypatch, tmp_path, capsys
):
    """Where the hash is wrong, no file appears and nothing half made is left."""
    folder = tmp_path / "model"
    monkeypatch.setattr(maker, "SEED", maker.SEED + 1)
    monkeypatch.setattr("sys.argv", ["tiny_qwen2.py", str(folder)])

    assert maker.main() == 1

    assert list(folder.iterdir()) == []
    assert f"expected {maker.SHA256}; not written" in capsys.readouterr().err


def test_a_good_model_replaces_an_old_one(maker, monkeypatch, tmp_path):
    """The files in place are exactly those that were checked."""
    (tmp_path / maker.WEIGHTS).write_text("old")
    monkeypatch.setattr("sys.argv", ["tiny_qwen2.py", str(tmp_path)])

    assert maker.main() == 0

    assert {path.name for path in tmp_path.iterdir()} == set(maker.FILES)
    assert maker.hash_model(tmp_path) == maker.SHA256


def test_the_demo_refuses_another_model(maker, demo, monkeypatch, tmp_path, capsys):
    """The demo says what is wrong with its model before it runs anything."""
    monkeypatch.setattr(demo, "MODEL", tmp_path)
    monkeypatch.setattr(demo, "run_tests", lambda _fault: pytest.fail("it ran"))

    assert demo.main() == 1
    assert "cannot be read" in capsys.readouterr().err

    maker.write_model(tmp_path)
    assert demo.check_model(tmp_path) is None
    with (tmp_path / maker.WEIGHTS).open("ab") as stream:
        stream.write(b"0")

    assert demo.main() == 1
    text = capsys.readouterr().err
    assert f"expected {maker.SHA256}" in text
    assert f"rm -r {tmp_path} && make demo" in text


def test_make_deletes_what_a_failing_command_left(tmp_path):
    """A model that a failing script wrote is not taken for made by the next make."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text('#!/bin/sh\necho half > "$2/model.safetensors"\nexit 1\n')
    python.chmod(0o755)
    (venv / ".ready").write_text("")
    os.utime(venv / ".ready", (2**33, 2**33))
    model = tmp_path / "model"
    model.mkdir()

    done = subprocess.run(
        ["make", f"VENV={venv}", f"MODEL={model}", f"{model}/model.safetensors"],
        cwd=tools.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert "Deleting file" in done.stderr
    assert list(model.iterdir()) == []
