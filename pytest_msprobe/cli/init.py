# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe init`: a configuration and a first test to start from."""

from pathlib import Path

from pytest_msprobe.errors import ConfigError

CONFIG = """\
capture:
  level: L0

engine:
  model: {model}
  dtype: bfloat16
  max_model_len: 1024
  env:
    OMP_NUM_THREADS: 1

golden:
  dir: golden
"""
TEST = """\
from vllm import SamplingParams


def test_greedy(msprobe_engine, msprobe):
    parameters = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    with msprobe.capture(msprobe_engine):
        msprobe_engine.generate(["The capital of France is"], parameters)
    msprobe.check()
"""
FILES = {"msprobe.yaml": CONFIG, "tests/test_precision.py": TEST}


def init(model: str) -> int:
    """Writes the files; says what to run next.

    Args:
        model: Name or folder of the model.

    Raises:
        ConfigError: One of them is there already; nothing is written.
    """
    for name in FILES:
        if Path(name).exists():
            message = f"{name}: is there already"
            raise ConfigError(message, slug="init", hint="nothing was written")
    for name, text in FILES.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("{model}", model), encoding="utf-8")
        print(f"written: {path}")
    print("record goldens: pytest --msprobe-config msprobe.yaml --msprobe-update=new")
    return 0
