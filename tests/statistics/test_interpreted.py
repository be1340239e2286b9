# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_msprobe.compat import has_module

CONTRACT = Path(__file__).parents[1] / "contract"


@pytest.mark.skipif(not has_module("triton"), reason="Triton is not installed")
def test_kernels_keep_the_contract_when_interpreted():
    """Triton's interpreter gives the reference's numbers for kernels and queue."""
    command = [sys.executable, "-m", "pytest", str(CONTRACT), "-q", "-p", "no:randomly"]

    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", "cuda or queue"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
