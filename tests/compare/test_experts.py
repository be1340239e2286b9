# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: what depends on another choice of a router is not judged."""

import math

import captures
import numpy as np
import pytest
from captures import KEY, OTHER_KEY, capture, module, request
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge, measure_noise
from pytest_msprobe.compare.tolerance import REROUTED_LOGPROB
from pytest_msprobe.dump.capture import StepLine
from pytest_msprobe.model.limits import Rule
from pytest_msprobe.model.names import CHOICE_CLASS

LAYERS = 3
PARTS = ("0.first", "0.prompt", "0.g1")
X = np.random.default_rng(0).standard_normal((2, 16))
IDS = np.array([[0, 2], [1, 3]])


def mixture(off=(), others=(), *, key=KEY, has_choices=True, factor=3.0, **header):
    """A capture of three layers with routers: a prefill and a decode step.

    Args:
        off: (layer, part, slot) of outputs that are off; slots `gate` and `mlp`.
        others: (layer, part) where the router chose other experts.
        key: Numerics key.
        has_choices: Whether choices were recorded.
        factor: How much an output that is off is changed by.
        header: Fields of the header.
    """
    result = capture([], steps=0, key=key, requests=[request()], **header)
    for step, parts in enumerate((PARTS[:2], PARTS[2:])):
        result.entries.append(captures.step_line(step))
        for name, depth, slots in _calls(parts, off, others, factor):
            if CHOICE_CLASS in name and not has_choices:
                continue
            part = capture([(name, depth, {}, slots)], steps=1)
            call = part.entries[1]
            for slot, ids in call.o.items():
                for old in ids:
                    number = len(result.tensors)
                    line = part.tensors[old]
                    line.t = number
                    result.tensors[number] = line
                    call.o[slot] = [*call.o[slot], number]
                call.o[slot] = call.o[slot][len(ids) :]
            result.entries.append(call)
    return result


def _calls(parts, off, others, factor):
    for layer in range(LAYERS):

        def of(slot, layer=layer):
            return {"output.0": [
                (part, X * (factor if (layer, part, slot) in off else 1.0))
                for part in parts
            ]}  # fmt: skip

        ids = [(part, IDS + ((layer, part) in others)) for part in parts]
        yield module(f"layers.{layer}.mlp.gate"), 2, of("gate")
        yield (
            module(f"layers.{layer}.mlp.experts.choice", CHOICE_CLASS),
            2,
            {"output.0": ids},
        )
        yield module(f"layers.{layer}.mlp"), 1, of("mlp")
    yield module("logits"), 0, of("mlp")


def verdict_of(golden, candidate):
    """The verdict on a candidate."""
    return judge(golden, candidate).verdict


def behind(layer, part):
    """Every output that depends on the choice of a layer at a position."""
    later = PARTS[PARTS.index(part) :]
    return {
        *((n, p, "mlp") for n in range(layer, LAYERS) for p in later),
        *((n, p, "gate") for n in range(layer + 1, LAYERS) for p in later),
    }


ALL = {(n, p, s) for n in range(LAYERS) for p in PARTS for s in ("gate", "mlp")}
OUTPUTS = st.sampled_from(sorted(ALL))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, LAYERS - 1), st.sampled_from(PARTS), OUTPUTS)
def test_what_depends_on_another_choice_is_not_judged(layer, part, output):
    """Behind another choice, at its position or later, any difference is allowed."""
    golden = mixture(key=OTHER_KEY)
    candidate = mixture(off={output}, others={(layer, part)})

    verdict = verdict_of(golden, candidate)

    assert verdict.mode == "cross"
    assert verdict.is_green == (output in behind(layer, part))
    assert verdict.rerouted == _rows(layer, part)
    assert f"other experts from layers.{layer}.mlp.experts on" in verdict.notes[1]
    assert "tokens and logprobs are" in verdict.notes[1]
    if not verdict.is_green:
        named = f"layers.{output[0]}.mlp" + ".gate" * (output[2] == "gate")
        assert named in (verdict.divergence.module, "layers.2.mlp")


def _rows(layer, part):
    """Rows behind a choice: outputs, later choices and logits."""
    later = len(PARTS) - PARTS.index(part)
    outputs = len(behind(layer, part))
    return outputs + 1 + (LAYERS - 1 - layer) * later + later


def test_other_choices_with_the_same_key_fail():
    """With the same key and scheduling nothing excuses another choice."""
    verdict = verdict_of(mixture(), mixture(others={(1, "0.prompt")}))

    assert verdict.status == "fail"
    assert verdict.rerouted == 0
    assert verdict.divergence.module == "layers.1.mlp.experts.choice"


def test_other_choices_under_other_scheduling_are_excused():
    """Batched otherwise, rounding may choose otherwise as well, with the same key."""
    golden = mixture()
    candidate = mixture(off=behind(1, "0.g1"), others={(1, "0.g1")})
    steps = [e for e in candidate.entries if isinstance(e, StepLine)]
    steps[1].requests = [(0, 1, 4), (1, 1, 4)]

    verdict = verdict_of(golden, candidate)

    assert verdict.status == "changed"
    assert verdict.rerouted == _rows(1, "0.g1")


def test_noise_is_measured_without_what_depends_on_other_choices():
    """What is not judged is no noise either, and is counted."""
    golden = mixture(key=OTHER_KEY)
    candidate = mixture(off=behind(1, "0.first"), others={(1, "0.first")})

    noise = measure_noise(golden, candidate)

    assert len(noise.rows) == 0
    assert noise.rerouted == _rows(1, "0.first")


@pytest.mark.parametrize(
    ("factor", "has_choices", "key", "is_green"),
    [
        (1.08, True, OTHER_KEY, True),
        (1.08, False, OTHER_KEY, False),
        (1.12, True, OTHER_KEY, False),
        (1.01, True, KEY, False),
    ],
)
def test_mixtures_have_wider_limits_across_keys(factor, has_choices, key, is_green):
    """A router's noise goes into the experts' shares, whatever it chooses."""
    off = {(1, "0.g1", "mlp")}
    golden = mixture(key=key, has_choices=has_choices)
    candidate = mixture(off, factor=factor, has_choices=has_choices)

    # All metrics but the norm, for which a common factor is the worst case.
    rules = [Rule("norm", limits={"norm": math.inf})]
    verdict = judge(golden, candidate, rules).verdict

    assert verdict.is_green == is_green


MOVED = -0.2 - 0.6 * REROUTED_LOGPROB
LOST = -0.2 - 1.2 * REROUTED_LOGPROB


@pytest.mark.parametrize(
    ("part", "logprobs", "is_green"),
    [
        # Of two tokens the first is computed with the prompt, the second with g1.
        ("0.first", (-0.1, MOVED), True),
        ("0.prompt", (-0.1, MOVED), True),
        ("0.g1", (-0.1, MOVED), True),
        ("0.prompt", (MOVED, -0.2), True),
        ("0.g1", (MOVED, -0.2), False),
        ("0.first", (-0.1, LOST), False),
        ("0.first", (-0.1, math.nan), False),
    ],
)
def test_tokens_behind_other_choices_have_a_limit_of_their_own(
    part, logprobs, is_green
):
    """Another expert moves what follows by more than rounding, and not by anything."""
    golden = mixture(key=OTHER_KEY)
    candidate = mixture(others={(0, part)})
    candidate.header.requests = [request(logprobs=logprobs)]

    verdict = verdict_of(golden, candidate)

    assert verdict.is_green == is_green
    if not is_green:
        reason = "log-probabilities moved by more than is allowed"
        assert verdict.reasons == [reason]
    rule = Rule("own", limits={"logprob": 0.05})
    assert not judge(golden, candidate, [rule]).verdict.is_green
    candidate.header.requests = golden.header.requests
    assert verdict_of(golden, candidate).is_green


def test_other_requests_tokens_keep_their_limit():
    """A router's other choice for one request excuses no other request's tokens."""
    golden, candidate = mixture(key=OTHER_KEY), mixture(others={(0, "0.first")})
    for side, moved in ((golden, 0.0), (candidate, 0.8 * REROUTED_LOGPROB)):
        other = request(label=1, logprobs=(-0.1 - moved, -0.2))
        side.header.requests = [*side.header.requests, other]

    verdict = verdict_of(golden, candidate)

    assert not verdict.is_green
    assert verdict.tokens.at == (1, 0)


def test_choices_of_no_single_request_reach_every_token():
    """A choice that is not split by requests may be anybody's."""

    def make(key, shift, logprob):
        ids = {"output.0": [("", IDS + shift)]}
        calls = [
            (module("a"), 0, {}, {"output.0": X}),
            (module("m.choice", CHOICE_CLASS), 1, {}, ids),
        ]
        requests = [request(logprobs=(-0.1, logprob))]
        return capture(calls, key=key, requests=requests)

    assert verdict_of(make(OTHER_KEY, 0, -0.2), make(KEY, 1, MOVED)).is_green
    assert not verdict_of(make(OTHER_KEY, 0, -0.2), make(KEY, 0, MOVED)).is_green


@pytest.mark.parametrize("of_golden", [True, False])
def test_choices_that_one_side_does_not_tell_are_said(of_golden):
    """Without choices on a side all rows are judged, and the verdict says so."""
    golden = mixture(key=OTHER_KEY, has_choices=not of_golden)
    candidate = mixture(has_choices=of_golden)

    verdict = verdict_of(golden, candidate)

    assert verdict.is_green
    assert verdict.missing == 0
    side = "the golden" if of_golden else "this capture"
    assert any(f"{side} does not tell which experts" in n for n in verdict.notes)
    assert not verdict.structure


def test_other_requests_are_judged():
    """Another choice for one request excuses nothing of the others."""

    def make(key, shift, factor):
        ids = [("0.prompt", IDS + shift), ("1.prompt", IDS)]
        out = [("0.prompt", X * factor), ("1.prompt", X)]
        bad = [("0.prompt", X), ("1.prompt", X * factor)]
        calls = [
            (module("m.choice", CHOICE_CLASS), 1, {}, {"output.0": ids}),
            (module("a"), 0, {}, {"output.0": out}),
            (module("b"), 0, {}, {"output.0": bad}),
        ]
        return capture(calls, key=key)

    verdict = verdict_of(make(OTHER_KEY, 0, 1), make(KEY, 1, 3))

    assert [f.row.text for f in verdict.worst] == [
        "Module.b.M.forward.0.output.0@1.prompt"
    ]
