# SPDX-License-Identifier: Apache-2.0
"""Chooses the adapter for a model runner by its class."""

from typing import Any

from pytest_msprobe.config.settings import ALL_STEPS
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.engine.attach import Attachment
from pytest_msprobe.engine.runner_v1 import RunnerV1
from pytest_msprobe.engine.runner_v2 import MODULE, RunnerV2


def runner_version(runner: Any) -> int:
    """1 or 2: which of vLLM's model runners this is, or derives from."""
    modules = {base.__module__ for base in type(runner).__mro__}
    return 2 if MODULE in modules else 1


def attachment_for(
    runner: Any,
    recorder: Recorder,
    *,
    decode_steps: int = ALL_STEPS,
    first_step: int = 0,
) -> Attachment:
    """The adapter for a model runner.

    Args:
        runner: vLLM's model runner.
        recorder: Where steps are recorded.
        decode_steps: Decode steps behind the prefill to record, -1 for all.
        first_step: Number of the first step.
    """
    kind = RunnerV2 if runner_version(runner) == 2 else RunnerV1  # noqa: PLR2004
    return kind(runner, recorder, decode_steps=decode_steps, first_step=first_step)
