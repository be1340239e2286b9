# SPDX-License-Identifier: Apache-2.0
"""Verdicts: what passes, what fails, and what the verdict says."""

import json
import math

import captures
import msgspec
import numpy as np
import pytest
import yaml
from captures import KEY, OTHER_KEY, Network, capture, module, request
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge, measure_noise
from pytest_msprobe.dump.capture import StepLine
from pytest_msprobe.model.limits import ROW_METRICS, Rule
from pytest_msprobe.model.verdict import Verdict
from pytest_msprobe.statistics.sketch import STORAGE_FLOOR

NETWORK = Network()


def verdict_of(golden, candidate, *rules, **options):
    """The verdict on a candidate."""
    return judge(golden, candidate, rules, **options).verdict


def single(array, **header):
    """A capture of one module with one output."""
    return capture([(module("m"), 0, {}, {"output.0": array})], **header)


def test_equal_captures_pass():
    """The same numbers are a pass, every row bit-identical."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run())

    assert verdict.status == "pass"
    assert verdict.judged == verdict.equal == 12
    assert verdict.divergence is None


def test_small_changes_within_limits_are_green():
    """Other bits within the limits are reported as changed."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run(after="a", factor=1 + 1e-5))

    assert verdict.status == "changed"
    assert verdict.is_green
    assert verdict.equal < verdict.judged


@pytest.mark.parametrize("after", ["a", "b.x", "b.y", "c"])
def test_faults_of_leaves_are_named(after):
    """The first module whose inputs agree while an output does not is the origin."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run(after=after))

    assert verdict.status == "fail"
    assert (verdict.divergence.kind, verdict.divergence.module) == ("origin", after)
    assert verdict.divergence.finding.row.slot == "output.0"


@pytest.mark.parametrize("inside", ["b", "model"])
def test_faults_of_a_parents_own_code_are_named(inside):
    """A child whose input differs although nothing before it did accuses its parent."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run(inside=inside))

    assert verdict.divergence.module == inside
    assert verdict.divergence.between.startswith("Module.b.")


@pytest.mark.parametrize("after", ["b", "model"])
def test_faults_behind_the_last_child_are_named(after):
    """A parent whose output differs while no child's does is the origin."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run(after=after))

    assert verdict.divergence.module == after


def test_other_inputs_of_the_model_are_no_modules_fault():
    """Where the model's inputs differ no module is accused."""
    other = Network(seed=0)
    other.start = other.start * 1.1

    verdict = verdict_of(NETWORK.run(), other.run())

    assert verdict.divergence.kind == "inputs"
    assert verdict.divergence.module == ""


def test_growth_below_three_is_drift():
    """A leaf that only amplifies an error within limits is no origin."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 32))
    d = rng.standard_normal((4, 32))

    def chain(errors):
        arrays = [x + d * e for e in (0.0, *errors)]
        calls = [
            (module(n), 0, {"input_args.0": arrays[i]}, {"output.0": arrays[i + 1]})
            for i, n in enumerate("abc")
        ]
        return capture(calls)

    verdict = verdict_of(chain((0, 0, 0)), chain((2e-4, 7e-4, 1.5e-3)))

    assert verdict.divergence.kind == "drift"
    assert verdict.divergence.module == "c"


def test_drift_names_a_leaf():
    """Where the error only grew, no module that others are in is named."""
    rng = np.random.default_rng(1)
    x, d = rng.standard_normal((2, 4, 32))

    def make(errors):
        v = [x + d * e for e in errors]
        calls = [
            (module("q.a"), 1, {"input_args.0": v[0]}, {"output.0": v[1]}),
            (module("q.b"), 1, {"input_args.0": v[1]}, {"output.0": v[2]}),
            (module("q"), 0, {"input_args.0": v[0]}, {"output.0": v[2]}),
            (module("c"), 0, {"input_args.0": v[2]}, {"output.0": v[3]}),
        ]
        return capture(calls)

    verdict = verdict_of(make((0, 0, 0, 0)), make((1e-4, 5e-4, 9e-4, 1.5e-3)))

    assert (verdict.divergence.kind, verdict.divergence.module) == ("drift", "c")


@pytest.mark.parametrize("segment", ["0.first", "0.prompt", "0.g1"])
def test_each_segment_is_judged(segment):
    """An error in one segment is seen whatever the others hold."""
    x = np.random.default_rng(0).standard_normal((3, 16))

    def make(value):
        arrays = [
            (s, x * (100 if s == "0.first" else 1))
            for s in ("0.first", "0.prompt", "0.g1")
        ]
        changed = [(s, a * value if s == segment else a) for s, a in arrays]
        return capture([(module("m"), 0, {}, {"output.0": changed})])

    verdict = verdict_of(make(1), make(1.01))

    assert [f.row.segment for f in verdict.worst] == [segment]


PLANTS = {
    "swapped heads": lambda x: np.concatenate([x[:, 16:], x[:, :16]], axis=1),
    "swapped rows": lambda x: x[[1, 0, *range(2, len(x))]],
    "one element": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 40, 3.0, x),
    "shift": lambda x: x + 0.02,
    "scale": lambda x: x * 1.01,
    "sign": lambda x: -x,
}


@pytest.mark.parametrize("plant", PLANTS)
def test_kinds_of_difference_are_seen(plant):
    """Permutations, single elements, shifts, scales and signs fail."""
    x = np.random.default_rng(3).standard_normal((8, 32))

    verdict = verdict_of(single(x), single(PLANTS[plant](x)))

    assert verdict.status == "fail"


@pytest.mark.parametrize(
    ("golden", "candidate", "metric"),
    [
        ([1.0, 2.0], [1.0, float("nan")], "nonfinite"),
        ([1.0, float("nan")], [1.0, 2.0], "nonfinite"),
        ([1.0, float("inf")], [1.0, float("-inf")], "nonfinite"),
        ([1.0, 2.0], [[1.0, 2.0]], "shape"),
        ([1, 2], [1, 3], "checksum"),
        ([1, 2], [1.0, 2.0], "dtype"),
    ],
)
def test_what_no_tolerance_allows(golden, candidate, metric):
    """NaN counts, shapes, dtypes and integers must be equal, whatever the limits."""
    generous = Rule("test", limits=dict.fromkeys(ROW_METRICS, 1e9))

    verdict = verdict_of(
        single(np.array(golden)), single(np.array(candidate)), generous
    )

    assert verdict.status == "fail"
    assert verdict.worst[0].metric == metric
    assert verdict.worst[0].detail


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_in_both_does_not_hide_a_difference(special):
    """Rows with the same non-finite elements are judged by their finite ones."""
    x = np.array([[1.0, 2.0, special, 4.0]])
    y = x.copy()
    y[0, 3] = 4.5

    assert verdict_of(single(x), single(x)).status == "pass"
    assert verdict_of(single(x), single(y)).status == "fail"


def test_zeros_that_are_no_longer_zero_fail():
    """Nothing divides by almost zero: a golden of zeros allows no change."""
    verdict = verdict_of(single(np.zeros((2, 4))), single(np.full((2, 4), 1e-9)))

    assert verdict.status == "fail"
    assert verdict.worst[0].ratio == "inf"


def test_missing_rows_fail():
    """A row, call or step of the golden that is not there is a failure."""
    golden = NETWORK.run()
    candidate = NETWORK.run()
    del candidate.entries[3]

    verdict = verdict_of(golden, candidate)

    assert verdict.status == "fail"
    assert verdict.missing == 2
    assert "Module.b.y" in verdict.missing_rows[0]


def test_new_rows_are_counted_and_green():
    """A row that the golden lacks is reported and not judged."""
    golden = NETWORK.run()
    del golden.entries[3]

    verdict = verdict_of(golden, NETWORK.run())

    assert verdict.is_green
    assert verdict.extra == 2


def test_no_common_row_is_never_a_pass():
    """If nothing could be judged, the verdict is red."""
    other = capture([(module("z"), 0, {}, {"output.0": np.ones((2, 2))})])
    empty = capture([])

    assert verdict_of(empty, other).status == "fail"
    assert verdict_of(NETWORK.run(), other).status == "fail"


@pytest.mark.parametrize(
    "change",
    [
        {"signature": {**captures.SIGNATURE, "level": "mix"}},
        {"signature": {"level": "L0", "model": {"dtype": "float32"}}},
        {"world": 2},
        {"requests": [request(prompt_sha256="bb")]},
        {"requests": []},
        {"requests": [request(), request(label=1)]},
    ],
)
def test_other_signatures_are_incomparable(change):
    """Another level, model, number of ranks or prompt is no regression."""
    header = {"requests": [request()], **change}

    verdict = verdict_of(NETWORK.run(requests=[request()]), NETWORK.run(**header))

    assert verdict.status == "incomparable"
    assert verdict.reasons
    assert not verdict.is_green


def test_provenance_is_reported_and_never_judged():
    """Another version or thread count shows among the changes."""
    verdict = verdict_of(
        NETWORK.run(provenance={"torch": "1", "same": 1}),
        NETWORK.run(provenance={"torch": "2", "same": 1}),
    )

    assert verdict.status == "pass"
    assert verdict.changes == [("torch", "1", "2")]


def test_another_key_judges_module_outputs_with_its_own_limits():
    """Across keys inputs and APIs do not count, and the verdict says so."""
    calls = [
        ("Functional.linear.0.forward", 1, {}, {"output.0": np.ones((2, 4))}),
        (
            module("m"),
            0,
            {"input_args.0": np.ones((2, 4))},
            {"output.0": np.ones((2, 4))},
        ),
    ]
    golden = capture(calls, key=OTHER_KEY)
    candidate = capture(
        [
            ("Functional.linear.0.forward", 1, {}, {"output.0": np.ones((2, 4)) * 3}),
            (module("m"), 0, {"input_args.0": np.ones((2, 4)) * 3},
             {"output.0": np.ones((2, 4)) * 1.005}),
        ]
    )  # fmt: skip

    verdict = verdict_of(golden, candidate)

    assert verdict.mode == "cross"
    assert verdict.judged == 1
    assert verdict.status == "changed"
    assert OTHER_KEY in verdict.notes[0]


def test_rescheduled_captures_have_wider_limits():
    """With another batching rows without a token dimension do not count."""
    x = np.random.default_rng(0).standard_normal((4, 16))
    calls = [(module("m"), 0, {}, {"output.0": x, "output.1": [("", x)]})]
    golden, candidate = capture(calls), capture(calls)
    moved = [(module("m"), 0, {}, {"output.0": x * 1.005, "output.1": [("", x * 9)]})]
    candidate = capture(moved)
    candidate.entries[0] = StepLine(0, 2, [(0, 2, 0)])

    verdict = verdict_of(golden, candidate)

    assert verdict.status == "changed"
    assert "batched or chunked differently" in verdict.notes[0]


def across_keys(golden, candidate, rules=()):
    """The verdict on one module's output, across keys."""
    sides = [
        capture([(module("m"), 0, {}, {"output.0": x})], key=key)
        for x, key in ((golden, KEY), (candidate, OTHER_KEY))
    ]
    return verdict_of(*sides, *rules)


@pytest.mark.parametrize("size", [1, 4, 128])
def test_few_elements_are_no_average(size):
    """Across keys norms and means of few elements may be off by what elements may."""
    x = np.random.default_rng(1).standard_normal((1, size))
    change = 0.045 / np.sqrt(size)

    assert across_keys(x, x * (1 + change)).is_green
    assert not across_keys(x, x * (1 + 0.06)).is_green
    rule = Rule("own", limits={"norm": 1e-3})
    verdict = across_keys(x, x * (1 + change), [rule])
    assert (verdict.status, verdict.worst[0].rule) == ("fail", "own")


def test_a_wider_rel_l2_leaves_few_elements_their_other_limits():
    """A rule that allows more of rel_l2 narrows no limit; one that allows less does."""
    x = np.array([[1.0, -1.0, 2.0, -1.5, 0.6]])
    y = x + 0.018 * np.linalg.norm(x) / np.sqrt(x.size)  # the mean is off by 0.018

    wide = [Rule("wide", limits={"rel_l2": 0.2})]
    assert across_keys(x, y).is_green
    assert across_keys(x, y, wide).is_green
    verdict = across_keys(x, y, [Rule("narrow", limits={"rel_l2": 0.02})])
    assert [f.metric for f in verdict.worst] == ["mean"]


def gate(key, change, columns=1):
    """A gate of few columns over a prompt and a token for which it is near 0."""
    rng = np.random.default_rng(2)
    prompt = rng.standard_normal((8, columns))
    prompt /= np.sqrt((prompt**2).mean())
    rows = [("0.first", np.full((1, columns), 50.0)), ("0.prompt", prompt)]
    rows.append(("0.g1", np.full((1, columns), 0.01 + change)))
    integers = [("0.prompt", np.arange(8)), ("0.g1", np.arange(1))]
    slots = {"output.0": rows, "output.1": integers}
    return capture([(module("gate"), 0, {}, slots)], key=key)


def test_a_gate_near_zero_is_held_to_its_usual_size():
    """Across keys few elements are off by a part of what their slot usually is."""
    golden = gate(OTHER_KEY, 0.0)

    assert verdict_of(golden, gate(KEY, 0.045)).is_green
    verdict = verdict_of(golden, gate(KEY, 0.055))

    assert {f.row.segment for f in verdict.worst} == {"0.g1"}
    assert verdict.worst[0].observed == pytest.approx(0.055 / np.sqrt(8 / 9), rel=0.01)
    assert verdict_of(golden, gate(KEY, math.nan)).status == "fail"
    # With the same key it is held to its own size, as many elements always are.
    assert not verdict_of(gate(KEY, 0.0), gate(KEY, 0.001)).is_green
    assert not verdict_of(gate(OTHER_KEY, 0.0, 32), gate(KEY, 0.045, 32)).is_green


def test_noise_stands_beside_the_limits_that_judging_applies():
    """Calibration measures noise by the wider limits of few elements, like verdicts."""
    x = np.random.default_rng(1).standard_normal((1, 4))
    golden, candidate = (
        capture([(module("m"), 0, {}, {"output.0": array})], key=key)
        for array, key in ((x, KEY), (x * 1.01, OTHER_KEY))
    )

    found = measure_noise(golden, candidate)
    ruled = measure_noise(golden, candidate, [Rule("own", limits={"norm": 1e-3})])

    assert {metric: limits[0] for metric, limits in found.limits.items()} == {
        "rel_l2": 0.05,
        "max": 0.06,
        "min": 0.06,
        "norm": 0.025,
        "mean": 0.025,
    }
    assert ruled.limits["norm"][0] == 1e-3
    assert ruled.limits["mean"][0] == 0.025


def test_unlimited_distance_leaves_other_defaults():
    """A rule that lets every distance pass does not widen the default of the norm."""
    x = np.random.default_rng(1).standard_normal((1, 128))

    verdict = across_keys(x, x * 1.1, [Rule("own", limits={"rel_l2": np.inf})])

    assert verdict.worst[0].metric in ("norm", "max", "min")


SMALL = 1.005


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_more_or_fewer_steps_are_no_other_scheduling(steps):
    """Another number of steps leaves the limits of the common ones as they are."""
    golden = NETWORK.run(steps=3, requests=[request((5, 6, 7), (-0.1,) * 3)])
    tokens = (5, 6, 7, 8)[:steps]
    candidate = NETWORK.run(
        steps=steps,
        after="c",
        factor=SMALL,
        requests=[request(tokens, (-0.1,) * steps)],
    )

    verdict = verdict_of(golden, candidate)

    assert verdict.failed > 0
    assert verdict.worst[0].allowed < 2e-3
    assert not any("differently" in note for note in verdict.notes)


def test_an_end_behind_a_flip_is_no_other_scheduling():
    """A fault in the prefill is not hidden by a request that ended early."""
    golden = NETWORK.run(steps=3, requests=[tied((5, 6, 7), (50, 60, 70))])
    candidate = NETWORK.run(
        steps=2, after="c", factor=SMALL, requests=[tied((5, 60), (50, 6))]
    )

    verdict = verdict_of(golden, candidate)

    assert verdict.status == "fail"
    assert verdict.divergence.module == "c"


def test_only_what_was_scheduled_differently_has_wider_limits():
    """Batched otherwise from its second token on, a request's prefill stays strict."""
    x = np.random.default_rng(0).standard_normal((4, 16))

    def make(prompt, decode):
        outputs = [("0.first", x), ("0.prompt", x * prompt), ("0.g1", x * decode)]
        return capture(
            [(module("m"), 0, {}, {"output.0": outputs})], requests=[request()]
        )

    def judged(prompt, decode):
        golden, candidate = make(1, 1), make(prompt, decode)
        golden.entries.insert(1, captures.step_line(1))
        candidate.entries.insert(1, StepLine(1, 2, [(0, 1, 4), (1, 1, 4)]))
        return verdict_of(golden, candidate)

    assert judged(1, SMALL).status == "changed"
    assert "request 0 from position 4" in judged(1, SMALL).notes[0]
    assert judged(SMALL, 1).status == "fail"


def test_log_probabilities_are_wider_where_scheduling_differs():
    """A token's limit is that of the step which computed it."""
    golden = NETWORK.run(steps=2, requests=[request()])

    def judged(logprobs):
        candidate = NETWORK.run(steps=2, requests=[request(logprobs=logprobs)])
        steps = [e for e in candidate.entries if isinstance(e, StepLine)]
        steps[1].requests = [(0, 1, 4), (1, 1, 4)]
        return verdict_of(golden, candidate)

    assert judged((-0.1, -0.205)).is_green
    assert judged((-0.105, -0.2)).status == "fail"
    assert judged((-0.105, -0.205)).tokens.at == (0, 0)


def test_log_probabilities_alone_fail():
    """Rows within limits do not save a log-probability that moved too far."""
    verdict = verdict_of(
        NETWORK.run(requests=[request()]),
        NETWORK.run(requests=[request(logprobs=(-0.1, -0.3))]),
    )

    assert verdict.status == "fail"
    assert verdict.tokens.at == (0, 1)
    assert verdict.tokens.largest == pytest.approx(0.1)


def test_rows_behind_a_flipped_token_are_not_judged():
    """Decode is judged up to the first other token, and the verdict says so."""
    x = np.ones((2, 4))

    def make(value, tokens):
        outputs = [("0.prompt", x), ("0.g1", x), ("0.g2", x * value)]
        return capture(
            [(module("m"), 0, {}, {"output.0": outputs})],
            requests=[request(tokens, (-0.7, -0.7, -0.7))],
        )

    golden, candidate = make(1, (5, 6, 7)), make(3, (5, 9, 1))
    candidate.header.requests[0].top[1] = [(9, -0.7), (6, -0.7)]
    golden.header.requests[0].top[1] = [(6, -0.7), (9, -0.7)]

    verdict = verdict_of(golden, candidate)

    assert verdict.tokens.flipped == (0, 1)
    assert verdict.unjudged == 1
    assert verdict.is_green
    assert "first other token" in verdict.notes[0]


def test_forced_tokens_let_all_of_decode_be_judged():
    """Fed the golden's tokens, rows behind its own other token are judged."""
    x = np.ones((2, 4))
    ids = np.array([[6], [6]])

    def make(value, own, **header):
        outputs = [("0.prompt", x), ("0.g1", x), ("0.g2", x * value)]
        chosen = [("0.g1", ids + bool(own), "s")]
        made = tied((5, 6, 7), (50, 9, 70))
        made.own = own
        calls = [
            (module("m"), 0, {}, {"output.0": outputs}),
            ("Torch.argmax.0.forward", 0, {}, {"output.0": chosen}),
        ]
        return capture(calls, requests=[made], **header)

    told = {"provenance": {"teacher_forcing": True}}
    green = verdict_of(make(1, []), make(1, [5, 9, 7], **told))
    red = verdict_of(make(1, []), make(3, [5, 9, 7], **told))

    assert green.status == "changed"
    assert (green.unjudged, green.tokens.flipped) == (1, (0, 1))
    assert (red.status, red.failed, red.unjudged) == ("fail", 1, 1)
    assert red.worst[0].row.segment == "0.g2"
    assert red.notes[0].startswith("the golden's tokens were fed back")


def tied(tokens, other):
    """A request in which every token is a near tie with another one."""
    made = request(tokens, (-0.7,) * len(tokens))
    made.top = [[(t, -0.7), (o, -0.7)] for t, o in zip(tokens, other, strict=True)]
    return made


def test_tokens_that_were_not_recorded_fail():
    """Tokens that the steps must have sampled and nobody recorded are no flip."""
    golden = NETWORK.run(steps=2, requests=[request()])
    candidate = NETWORK.run(steps=2, after="b.x", requests=[request((), ())])

    verdict = verdict_of(golden, candidate)

    assert verdict.status == "fail"
    assert "request 0: 2 of 2 tokens were not recorded" in verdict.reasons
    assert verdict.tokens.flipped is None
    assert verdict.unjudged == 0
    assert "0.g1" in {finding.row.segment for finding in verdict.worst}


def test_some_tokens_that_were_not_recorded_fail():
    """Missing tokens alone are red, whatever the rows say, and come first."""
    golden = NETWORK.run(steps=2, requests=[request()])
    candidate = NETWORK.run(steps=2, requests=[request((5,), (-0.1,))])

    verdict = verdict_of(golden, candidate)

    assert (verdict.status, verdict.failed) == ("fail", 0)
    assert verdict.reasons == ["request 0: 1 of 2 tokens were not recorded"]
    assert verdict.judged == 24


def test_a_golden_without_tokens_asks_for_none():
    """Where the golden has no tokens (a pooling model) none are required."""
    nothing = [request((), ())]
    golden, candidate = (NETWORK.run(steps=2, requests=nothing) for _ in range(2))

    assert verdict_of(golden, candidate).status == "pass"


def test_a_golden_that_lacks_tokens_says_so():
    """Tokens that are missing in the golden hide no row, and the verdict names them."""
    golden = NETWORK.run(steps=2, requests=[request((), ())])
    candidate = NETWORK.run(steps=2, requests=[request()])

    verdict = verdict_of(golden, candidate)

    assert (verdict.status, verdict.judged) == ("pass", 24)
    assert verdict.notes == [
        "request 0: the golden lacks 2 of 2 tokens, which are not judged"
    ]


def test_an_end_behind_a_flip_is_green():
    """A flipped token may be the last one: what follows in the golden is not asked."""
    golden = NETWORK.run(steps=3, requests=[tied((5, 6, 7), (50, 60, 70))])
    candidate = NETWORK.run(steps=2, requests=[tied((5, 60), (50, 6))])

    verdict = verdict_of(golden, candidate)

    assert verdict.is_green, verdict
    assert verdict.tokens.flipped == (0, 1)
    assert verdict.missing == 0
    assert not any("differently" in note for note in verdict.notes)


def test_more_tokens_than_the_goldens_are_no_flip():
    """A longer capture is judged by the tokens that the golden has."""
    golden = NETWORK.run(steps=2, requests=[request()])
    longer = request((5, 6, 7), (-0.1, -0.2, -0.3))

    verdict = verdict_of(golden, NETWORK.run(steps=3, requests=[longer]))

    assert verdict.status == "pass"
    assert verdict.tokens.flipped is None
    assert verdict.extra == 12


def test_integers_of_a_flipped_token_are_not_judged():
    """A tolerated flip is not red because the sampled id is a row as well."""
    x = np.ones((1, 4))

    def make(token, request):
        sampled = [("0.prompt", np.array([5]), "s"), ("0.g1", np.array([token]), "s")]
        fed = [("0.g1", np.array([5]))]
        calls = [
            ("Torch.argmax.0.forward", 0, {}, {"output.0": sampled}),
            (module("m"), 0, {"input_args.0": fed}, {"output.0": x}),
        ]
        return capture(calls, requests=[request])

    golden = make(6, tied((5, 6), (50, 60)))
    candidate = make(60, tied((5, 60), (50, 6)))
    before = make(60, request((5, 6), (-0.7, -0.7)))

    verdict = verdict_of(golden, candidate)

    assert verdict.is_green, verdict
    assert (verdict.judged, verdict.unjudged) == (3, 1)
    # Without a flip the same row fails: only the flipped token is left out.
    assert verdict_of(golden, before).failed == 1


def test_logits_of_a_flipped_token_are_judged():
    """The sampled id may be another one, what it was sampled from may not."""
    logits = np.random.default_rng(0).standard_normal((1, 16))

    def make(factor, request):
        outputs = {"output.0": [("0.g1", logits * factor, "s")]}
        return capture([(module("lm_head"), 0, {}, outputs)], requests=[request])

    golden = make(1, tied((5, 6), (50, 60)))

    assert verdict_of(golden, make(1.1, tied((5, 60), (50, 6)))).failed == 1


def test_integers_that_were_fed_are_judged_at_the_flip():
    """Only what was sampled is left out there: positions and ids still count."""

    def make(position, request):
        ids = [("0.g1", np.array([position]))]
        return capture([(module("m"), 0, {"input_args.0": ids}, {})],
                       requests=[request])  # fmt: skip

    golden = make(4, tied((5, 6), (50, 60)))

    verdict = verdict_of(golden, make(9, tied((5, 60), (50, 6))))

    assert verdict.failed == 1


def test_whole_tensors_of_steps_behind_a_flip_are_not_judged():
    """Rows without a segment hold what was computed from the other token as well."""
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((3, 2, 8))

    def make(factor, request):
        result = capture([], steps=0, requests=[request])
        for step, array in enumerate(arrays):
            changed = array * factor if step == 2 else array
            part = capture([(module("m"), 0, {}, {"output.0": [("", changed)]})])
            result.tensors[step] = part.tensors[0]
            part.entries[1].o["output.0"] = [step]
            result.entries += [captures.step_line(step), part.entries[1]]
        return result

    golden = make(1, tied((5, 6, 7), (50, 60, 70)))
    flipped = make(2, tied((5, 60, 7), (50, 6, 70)))
    unflipped = make(2, tied((5, 6, 7), (50, 60, 70)))

    verdict = verdict_of(golden, flipped)

    assert verdict.is_green
    assert (verdict.judged, verdict.unjudged) == (2, 1)
    assert verdict_of(golden, unflipped).failed == 1


def test_rules_have_an_order_and_an_origin():
    """A later rule wins, and every failing row names the rule it broke."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="b.x", factor=1.01)
    loose = Rule("a.yaml:1", limits=dict.fromkeys(ROW_METRICS, 0.5))
    strict = Rule("a.yaml:2", rows="*b.x*output*", limits={"norm": 1e-6})

    verdict = verdict_of(golden, candidate, loose, strict)

    assert verdict.failed == 1
    assert verdict.worst[0].rule == "a.yaml:2"
    assert verdict.worst[0].metric == "norm"
    assert verdict_of(golden, candidate, strict, loose).is_green


def test_rules_for_the_other_key_do_not_apply():
    """A rule of mode cross leaves a same-key judgement alone."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="c", factor=1.1)
    rule = Rule("r", mode="cross", limits=dict.fromkeys(ROW_METRICS, 9.0))

    assert verdict_of(golden, candidate, rule).status == "fail"
    assert verdict_of(golden, candidate, rule, mode="cross").is_green


def test_ignored_rows_are_not_judged():
    """Ignore takes rows out, the others still count."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="c", factor=1.1)

    ignored = [Rule("r", rows=f"Module.{n}.*", ignore=True) for n in ("c", "model")]

    assert verdict_of(golden, candidate, *ignored).is_green
    assert verdict_of(
        golden, candidate, Rule("r", rows="Module.a.*", ignore=True)
    ).failed


def test_ignored_rows_may_be_missing():
    """A rule may ignore a row that is gone, and it counts as matched."""
    golden, candidate = NETWORK.run(), NETWORK.run()
    del candidate.entries[3]
    rule = Rule("r", rows="Module.b.y.*", ignore=True)

    judgement = judge(golden, candidate, [rule])

    assert judgement.verdict.status == "pass"
    assert judgement.verdict.missing == 0
    assert judgement.unmatched == []
    assert verdict_of(golden, candidate).status == "fail"


def test_rules_may_match_new_rows():
    """A rule for a row that the golden has not yet is no mistake."""
    golden = NETWORK.run()
    del golden.entries[3]

    judgement = judge(golden, NETWORK.run(), [Rule("r", rows="*b.y*", ignore=True)])

    assert judgement.unmatched == []
    assert any("b.y" in name for name in judgement.names)


def test_ignored_rows_accuse_nobody():
    """A row that is not judged does not name the module where it began."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="b.x")
    noisy = NETWORK.run(after="a")
    number = noisy.entries[1].o["output.0"][0]
    candidate.tensors[number] = noisy.tensors[number]

    ignored = Rule("r", rows="Module.a.*", ignore=True)

    assert verdict_of(golden, candidate).divergence.module == "a"
    assert verdict_of(golden, candidate, ignored).divergence.module == "b.x"


def crossed(*, position=1, factor=1.0, operator=1.0, handed=1.0):
    """A capture whose second module is off, with inputs that are not judged."""
    x = np.random.default_rng(0).standard_normal((4, 16))
    ids = np.array([position, 2, 3, 4])
    calls = [
        (module("a"), 1, {"input_args.0": ids}, {"output.0": x}),
        ("Tensor.mul.0.forward", 1, {}, {"output.0": x * operator}),
        (module("b"), 1, {"input_args.0": x * handed},
         {"output.0": x * factor * handed}),
        (module("model"), 0, {"input_args.0": ids},
         {"output.0": x * factor * handed}),
    ]  # fmt: skip
    return capture(calls, key=KEY if position == 1 else OTHER_KEY)


def test_unjudged_rows_accuse_nobody_across_keys():
    """Other integers and operators across keys are no sign of where it began."""
    verdict = verdict_of(crossed(), crossed(position=9, factor=2, operator=3))

    assert verdict.mode == "cross"
    assert verdict.divergence.kind == "origin"
    assert verdict.divergence.module == "b"


def test_inputs_of_modules_that_agree_accuse_nobody_across_keys():
    """An unjudged input is no sign where its module computed the same from it."""
    rng = np.random.default_rng(0)
    x, scratch = rng.standard_normal((2, 4, 16))

    def make(noise, factor, key):
        calls = [
            (module("a"), 1, {"input_args.1": scratch * noise}, {"output.0": x}),
            (module("b"), 1, {"input_args.0": x}, {"output.0": x * factor}),
            (module("model"), 0, {}, {"output.0": x * factor}),
        ]
        return capture(calls, key=key)

    verdict = verdict_of(make(1, 1, KEY), make(9, 2, OTHER_KEY))

    assert verdict.divergence.module == "b"


def test_inputs_tell_whose_code_it_was_across_keys():
    """Where a module's output is off, its input tells that the parent handed it so."""
    verdict = verdict_of(crossed(), crossed(position=9, handed=2))

    assert verdict.divergence.module == "model"
    assert verdict.divergence.between == module("b")


def test_operators_alone_are_not_judged_across_keys():
    """Level L1 has no module outputs: its tokens are judged, which is said."""
    x = np.ones((2, 4))

    def make(factor, **header):
        calls = [("Tensor.mul.0.forward", 0, {}, {"output.0": x * factor})]
        signature = {**captures.SIGNATURE, "level": "L1"}
        return capture(calls, signature=signature, **header)

    golden = make(1, key=OTHER_KEY, requests=[request()])
    verdict = verdict_of(golden, make(3, requests=[request()]))
    moved = verdict_of(golden, make(3, requests=[request(logprobs=(-0.1, -0.9))]))
    nothing = verdict_of(make(1, key=OTHER_KEY), make(3))

    note = "level L1 holds no module outputs, which alone are judged across keys"
    assert (verdict.status, verdict.judged) == ("pass", 0)
    assert any(note in text for text in verdict.notes)
    assert moved.reasons == ["log-probabilities moved by more than is allowed"]
    assert nothing.reasons == ["there are no tokens to judge either"]


def test_wide_sketches_have_no_floor():
    """Sketches of float32 rows are exact enough for the limits of float32 models."""
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 8, 32))
    signature = {"level": "L0", "model": {"dtype": "float32"}}

    def make(size):
        outputs = {"output.0": [("", x + noise * size)]}
        return capture([(module("m"), 0, {}, outputs)], signature=signature)

    only = Rule("r", limits={m: 9.0 for m in ROW_METRICS if m != "rel_l2"})

    failed = verdict_of(make(0), make(5e-5), only)

    assert failed.worst[0].metric == "rel_l2"
    assert failed.worst[0].allowed == 1e-5
    assert verdict_of(make(0), make(5e-6), only).is_green


def test_infinite_limits_are_text():
    """A limit may be infinite; the verdict is read back as it was written."""
    golden = NETWORK.run(requests=[request()])
    candidate = NETWORK.run(after="c", requests=[request(logprobs=(-0.1, -5.0))])
    limits = {"logprob": math.inf, **dict.fromkeys(ROW_METRICS, math.inf)}
    rule = Rule("r", limits={**limits, "norm": 1e-6})

    verdict = verdict_of(golden, candidate, rule)
    encoded = msgspec.json.encode(verdict)

    assert verdict.tokens.allowed == "inf"
    assert verdict.reasons == []
    assert msgspec.json.decode(encoded, type=Verdict) == verdict
    assert verdict.rules[0].rule() == rule
    assert verdict_of(golden, candidate, Rule("r", limits=limits)).is_green


def test_exact_rows_need_equal_checksums():
    """Exact fails on other bits, however small the difference."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="c", factor=1 + 1e-6)

    verdict = verdict_of(golden, candidate, Rule("r", rows="Module.c.*", exact=True))

    assert verdict.status == "fail"
    assert verdict.worst[0].metric == "checksum"


def test_exact_rules_hold_across_keys_only_if_they_say_so():
    """Another key has other bits: `exact` alone is for the golden's key."""
    golden = NETWORK.run(key=OTHER_KEY)
    candidate = NETWORK.run(after="c", factor=1 + 1e-6)
    exact = [Rule("r", exact=True, mode=mode) for mode in (None, "same", "cross")]

    found = [verdict_of(golden, candidate, rule).status for rule in exact]

    assert found == ["changed", "changed", "fail"]


def test_exact_rules_ask_for_the_same_threads():
    """Other threads sum in another order, which the verdict says beside its failure."""
    sides = [
        NETWORK.run(after=after, factor=1 + 1e-6, provenance={"threads": threads})
        for after, threads in ((None, 1), ("c", 2))
    ]

    noted = verdict_of(*sides, Rule("r", exact=True))
    silent = verdict_of(*sides)

    text = "exact rows need the golden's number of threads: 1, here 2"
    assert noted.status == "fail"
    assert text in noted.notes
    assert silent.notes == []


def test_an_absolute_limit_forgives_what_elements_may_differ_by():
    """Rtol and atol allow what they allow each element, also where the golden is 0."""
    zero, small = np.zeros((4, 8)), np.full((4, 8), 1e-4)
    # The distance is an estimate: it is left to its own limit.
    allowed = Rule("r", limits={"rtol": 0.0, "atol": 1.01e-4, "rel_l2": np.inf})
    too_little = Rule("r", limits={"rtol": 0.0, "atol": 0.9e-4, "rel_l2": np.inf})

    assert verdict_of(single(zero), single(small)).status == "fail"
    assert verdict_of(single(zero), single(small), allowed).is_green
    assert verdict_of(single(zero), single(small), too_little).status == "fail"


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 0.1), st.floats(1e-5, 0.1), st.integers(0, 2**32 - 1))
def test_what_allclose_allows_is_allowed(rtol, atol, seed):
    """Elements within rtol and atol of the golden's never fail, whatever the metric."""
    generator = np.random.default_rng(seed)
    golden = generator.standard_normal((4, 8)).astype(np.float32).astype(np.float64)
    # The distance is an estimate: it is left to its own limit.
    rule = Rule("r", limits={"rtol": rtol, "atol": atol, "rel_l2": np.inf})
    # Room for the rounding of the candidate to float32.
    allowed = 0.95 * (atol + rtol * np.abs(golden))
    candidate = golden + allowed * generator.uniform(-1, 1, golden.shape)

    verdict = verdict_of(single(golden), single(candidate), rule)

    assert verdict.is_green, verdict.worst


def test_only_rules_leave_the_other_rows_out():
    """Rows that no `only` rule names are not judged, and may be missing."""
    rule = Rule("r", rows="Module.a.*", only=True)

    verdict = verdict_of(NETWORK.run(), NETWORK.run(after="c"), rule)

    assert verdict.is_green
    assert verdict.judged == 2


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["a", "b.x", "c", "model"]),
    st.floats(1.002, 3.0),
    st.sampled_from([(), (Rule("loose", rows="*b.y*", limits={"norm": 10.0}),)]),
)
def test_the_printed_rule_lets_a_verdict_pass(after, factor, rules):
    """With the rule that a failing verdict names it passes, with 99 % it fails."""
    golden, candidate = NETWORK.run(), NETWORK.run(after=after, factor=factor)
    failing = verdict_of(golden, candidate, *rules)
    (entry,) = yaml.safe_load(failing.would_pass)
    rows, mode = entry.pop("rows"), entry.pop("mode")

    def judged_with(share):
        limits = {name: share * float(limit) for name, limit in entry.items()}
        rule = Rule("printed", rows, mode, limits)
        return verdict_of(golden, candidate, *rules, rule)

    assert failing.status == "fail"
    assert judged_with(1.0).is_green
    assert judged_with(0.99).status == "fail"


def test_the_printed_rule_covers_log_probabilities():
    """Where tokens moved by too much, the rule says by how much they may."""
    golden = NETWORK.run(requests=[request(logprobs=(-0.1, -0.2))])
    candidate = NETWORK.run(requests=[request(logprobs=(-0.1, -0.4))])

    failing = verdict_of(golden, candidate)
    (entry,) = yaml.safe_load(failing.would_pass)

    assert set(entry) == {"rows", "mode", "logprob"}
    rule = Rule("r", limits={"logprob": float(entry["logprob"])})
    assert verdict_of(golden, candidate, rule).is_green


def test_no_rule_is_printed_where_none_would_do():
    """Missing rows, other shapes, NaN and exact rows have no tolerance."""
    golden = np.ones((4, 8))
    broken = np.where(np.arange(32).reshape(4, 8) == 3, np.nan, golden)
    exact = Rule("r", exact=True)

    assert verdict_of(single(golden), single(broken)).would_pass == ""
    assert verdict_of(single(golden), single(golden[:3])).would_pass == ""
    assert verdict_of(single(golden), single(golden * 1.00001), exact).would_pass == ""
    assert verdict_of(NETWORK.run(), single(golden)).would_pass == ""


def test_noise_of_the_golden_raises_limits():
    """A row's limit is the larger of the rule and four times its golden's noise."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="c", factor=1.004)
    for line in golden.tensors.values():
        line.n = [0.0009] * 5
    noisy = verdict_of(golden, candidate)
    for line in golden.tensors.values():
        line.n = [0.0012] * 5
    raised = verdict_of(golden, candidate)

    assert noisy.status == "fail"
    assert noisy.worst[0].allowed == pytest.approx(0.0036, rel=0.05)
    assert noisy.worst[0].noise == pytest.approx(0.25, rel=0.05)
    assert noisy.worst[0].rule == "noise x4, above default"
    assert raised.is_green
    assert raised.noisy == 2
    assert any("2 rows have their limits from the noise" in n for n in raised.notes)


def test_unmatched_rules_are_returned():
    """A glob that matches no row is handed to the session."""
    rule = Rule("x:1", rows="Module.nothing*", ignore=True)

    judgement = judge(NETWORK.run(), NETWORK.run(), [rule])

    assert judgement.unmatched == [rule]


def test_changed_weights_come_first():
    """Where fingerprints differ, the first module that owns one is named."""
    golden = NETWORK.run(weights={"a": {"a.weight": "1"}, "c": {"c.weight": "1"}})
    candidate = NETWORK.run(
        after="c", weights={"a": {"a.weight": "1"}, "c": {"c.weight": "2"}}
    )

    divergence = verdict_of(golden, candidate).divergence

    assert (divergence.kind, divergence.module) == ("weights", "c")
    assert divergence.parameter == "c.weight"


def test_apis_keep_their_place_when_one_is_added():
    """One operator more in one module does not shift the rows of the others."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4, 8))

    def make(*, has_more):
        inner = [("Tensor.mul.0.forward", 1, {}, {"output.0": x})]
        if has_more:
            inner.append(("Tensor.mul.1.forward", 1, {}, {"output.0": x * 5}))
        number = len(inner)
        return capture(
            [
                *inner,
                (module("a"), 0, {}, {"output.0": x}),
                (f"Tensor.mul.{number}.forward", 1, {}, {"output.0": y}),
                (module("b"), 0, {}, {"output.0": y}),
            ]
        )

    verdict = verdict_of(make(has_more=False), make(has_more=True))

    assert verdict.is_green
    assert (verdict.extra, verdict.missing) == (1, 0)


def test_apis_are_counted_step_by_step():
    """One operator more in one step does not shift the rows of the next."""
    x, y = np.random.default_rng(0).standard_normal((2, 2, 8))

    def make(*, has_more):
        result = capture([], steps=0)
        for step in (0, 1):
            count = 2 if has_more and step == 0 else 1
            calls = [
                (f"Tensor.mul.{n}.forward", 0, {}, {"output.0": [("", (x, y)[n])]})
                for n in range(count)
            ]
            part = capture(calls)
            result.entries.append(captures.step_line(step))
            for call in part.entries[1:]:
                number = len(result.tensors)
                result.tensors[number] = part.tensors[call.o["output.0"][0]]
                call.o["output.0"] = [number]
                result.entries.append(call)
        return result

    verdict = verdict_of(make(has_more=False), make(has_more=True))

    assert (verdict.status, verdict.judged) == ("pass", 2)
    assert (verdict.extra, verdict.missing) == (1, 0)


@settings(max_examples=25, deadline=None)
@given(st.floats(2e-3, 0.3), st.integers(0, 50))
def test_the_ratio_tells_the_tolerance_that_would_pass(size, seed):
    """A limit at the observed value passes, 0.99 of it fails."""
    network = Network(seed)
    golden, candidate = network.run(), network.run(after="c", factor=1 + size)
    finding = verdict_of(golden, candidate).worst[0]
    floor = STORAGE_FLOOR if finding.metric == "rel_l2" else 0.0
    everything = {m: 9.0 for m in ROW_METRICS if m != finding.metric}

    def rule(share):
        limit = finding.observed * share - floor
        return Rule("r", limits={**everything, finding.metric: max(limit, 0.0)})

    assert verdict_of(golden, candidate, rule(1.0001)).is_green
    assert not verdict_of(golden, candidate, rule(0.99)).is_green


def test_a_verdict_survives_json():
    """A verdict is data: it is read back as it was written."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run(after="b.x"))

    encoded = msgspec.json.encode(verdict)

    assert msgspec.json.decode(encoded, type=Verdict) == verdict
    assert json.loads(encoded)["divergence"]["module"] == "b.x"
