# SPDX-License-Identifier: Apache-2.0
"""Runs the main job twice: against the goldens, and with a planted fault.

Exit code 0 if the first run passes and the second one fails and names the module.
"""

import os
import subprocess
import sys
from pathlib import Path

from tiny_qwen2 import SHA256, hash_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".demo" / "tiny-qwen2"
FAULT = "model.layers.2.post_attention_layernorm"
COMMAND = ["-m", "pytest", "--msprobe-config", "msprobe.yaml", "examples"]


def run_tests(fault: str) -> tuple[int, str]:
    """Runs the example tests; returns pytest's exit code and what it printed."""
    print(f"\n$ pytest {' '.join(COMMAND[2:])}", flush=True)
    environment = {**os.environ, "MSPROBE_DEMO_FAULT": fault}
    environment.pop("CI", None)
    done = subprocess.run(  # noqa: S603 - our own interpreter and arguments
        [sys.executable, *COMMAND],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def check_model(folder: Path) -> str | None:
    """What is wrong with the demo model's files, None if they are the known ones."""
    again = f"make it again: rm -r {folder} && make demo"
    try:
        found = hash_model(folder)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror}); {again}"
    if found != SHA256:
        return f"{folder}: SHA-256 {found}, expected {SHA256}; {again}"
    return None


def main() -> int:
    """Runs both and says what came of them."""
    problem = check_model(MODEL)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    clean, clean_text = run_tests("")
    faulty, faulty_text = run_tests(FAULT)
    found = [line for line in faulty_text.splitlines() if line.startswith(FAULT)]
    is_named = faulty == 1 and bool(found)
    print("verdicts")
    print(f"  clean run:         {'passed' if clean == 0 else 'FAILED'}")
    print(f"  fault planted in:  {FAULT}")
    print(f"  the gate said:     {found[0] if found else 'nothing about it'}")
    print("left behind")
    for text in (clean_text, faulty_text):
        runs = [line for line in text.splitlines() if line.startswith("run: ")]
        print(f"  {runs[-1].removeprefix('run: ') if runs else 'no run'}")
    print(f"  goldens: {ROOT / 'golden'}")
    return 0 if clean == 0 and is_named else 1


if __name__ == "__main__":
    sys.exit(main())
