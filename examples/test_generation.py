# SPDX-License-Identifier: Apache-2.0
"""The demo: two precision regression tests of a vLLM model.

pytest --msprobe-config msprobe.yaml examples
"""

import pytest
from vllm import SamplingParams

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("the first layer to differ is the one to look at", id="layer"),
        pytest.param("the others only inherit it", id="inherit"),
    ],
)
def test_greedy(msprobe_engine, msprobe, prompt):
    """A prefill and two decode steps compute what the golden says."""
    with msprobe.capture(msprobe_engine):
        msprobe_engine.generate([prompt], GREEDY, use_tqdm=False)
    msprobe.check()


def test_two_requests(msprobe_engine):
    """Without the msprobe fixture everything the engine computes is judged."""
    prompts = ["precision is the number of digits", "explain gravity in one sentence"]
    outputs = msprobe_engine.generate(prompts, GREEDY, use_tqdm=False)
    assert len(outputs) == len(prompts)
