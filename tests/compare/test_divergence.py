# SPDX-License-Identifier: Apache-2.0
"""Where a candidate diverged, what it inherits, and what has no partner."""

import captures
import numpy as np
import pytest
from captures import Network

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.model.limits import Rule
from pytest_msprobe.model.names import display_name
from pytest_msprobe.report.terminal import describe_divergence

NETWORK = Network()
GENERATOR = np.random.default_rng(5)


def verdict_of(golden, candidate, *rules):
    """The verdict on a candidate."""
    return judge(golden, candidate, rules).verdict


def test_worst_rows_are_shown_first():
    """Failing rows stand by their ratio, each tensor once."""
    x = GENERATOR.standard_normal((4, 32))
    names = [captures.module(name) for name in "abc"]
    golden = captures.capture([(n, 0, {}, {"output.0": x}) for n in names])
    outputs = [{"output.0": x * f, "output.1": x * f} for f in (1.1, 1.5, 1.2)]
    candidate = captures.capture(
        [(n, 0, {}, o) for n, o in zip(names, outputs, strict=True)]
    )

    worst = verdict_of(golden, candidate).worst

    assert [f.row.call for f in worst] == [names[1], names[2], names[0]]


def test_inherited_rows_are_counted_and_not_listed():
    """Rows that only hand on an error are counted; what brought it is listed."""
    verdict = verdict_of(NETWORK.run(), NETWORK.run(after="b.x"))

    assert {f.row.call for f in verdict.worst} == {captures.module("b.x")}
    assert verdict.inherited == verdict.failed - 1 > 3
    assert verdict.worst[0].growth == "inf"


def test_second_fault_is_listed_beside_the_first():
    """A call that makes an error it inherits much larger is listed with its growth."""
    golden, candidate = NETWORK.run(), NETWORK.run(after="a", factor=1.01)
    other = NETWORK.run(after="c", factor=1.5)
    number = next(c for _, c in other.calls() if ".c." in c.c).o["output.0"][0]
    candidate.tensors[number] = other.tensors[number]

    verdict = verdict_of(golden, candidate)

    assert verdict.divergence.module == "a"
    listed = {f.row.call: f.growth for f in verdict.worst}
    assert set(listed) == {captures.module("a"), captures.module("c")}
    assert 3 < listed[captures.module("c")] < 1000


def test_fault_that_its_parent_hides_is_named():
    """A call that is off is found where the call around it returns what it should."""
    x = GENERATOR.standard_normal((4, 32))

    def around(factor):
        calls = [
            (captures.module("b.x"), 1, {}, {"output.0": x * factor}),
            (captures.module("b"), 0, {}, {"output.0": -x}),
        ]
        return captures.capture(calls)

    verdict = verdict_of(around(1.0), around(1.1))

    assert verdict.failed == 1
    assert verdict.divergence.module == "b.x"


def renamed(capture, old, new):
    """A capture with calls named otherwise."""
    for _, call in capture.calls():
        call.c = call.c.replace(old, new)
    return capture


def test_renamed_module_is_matched():
    """A module that has another name is reported with its nearest match."""
    verdict = verdict_of(NETWORK.run(), renamed(NETWORK.run(), "b.y.M", "b.why.Other"))

    (change,) = verdict.structure
    assert change.gone == captures.module("b.y")
    assert change.new == captures.module("b.why", "Other")
    assert change.is_equal
    assert verdict.status == "fail"
    assert verdict.divergence is None


def test_judging_goes_on_around_a_renamed_module():
    """Beside a renamed module a fault is still found and named."""
    candidate = renamed(NETWORK.run(after="c"), "b.y.M", "b.why.M")

    verdict = verdict_of(NETWORK.run(), candidate)

    assert verdict.structure
    assert verdict.divergence.module == "c"


def test_new_and_fused_modules_are_reported():
    """Two modules that became one have it as their nearest; another one is new."""
    x = GENERATOR.standard_normal((4, 32))

    def layer(*names):
        calls = [
            (captures.module(f"l.{n}", k), 1, {}, {"output.0": x}) for n, k in names
        ]
        return captures.capture(
            [*calls, (captures.module("l"), 0, {}, {"output.0": x})]
        )

    golden = layer(("gate_proj", "Linear"), ("up_proj", "Linear"))
    candidate = layer(("gate_up_proj", "Merged"), ("monitor", "Probe"))
    for _, call in candidate.calls():
        if "monitor" in call.c:
            call.o = {"output.0": [captures._add(candidate, 0, "0.first", x[:1])]}

    changes = verdict_of(golden, candidate).structure

    pairs = [(display_name(c.gone), display_name(c.new)) for c in changes]
    assert pairs == [
        ("l.gate_proj", "l.gate_up_proj"),
        ("l.up_proj", "l.gate_up_proj"),
        ("", "l.monitor"),
    ]


@pytest.mark.parametrize("faulty", ["a", "b.x"])
def test_fault_in_a_renamed_module_is_its_own(faulty):
    """A module without a partner that gives something else is named, not its parent."""
    leaf = faulty.rpartition(".")[2]
    other = faulty[: -len(leaf)] + "renamed"
    candidate = renamed(NETWORK.run(after=faulty), f"{faulty}.M", f"{other}.M")

    divergence = verdict_of(NETWORK.run(), candidate).divergence

    assert (divergence.kind, divergence.module) == ("origin", other)
    assert divergence.handed_to
    assert describe_divergence(divergence).startswith(f"{other}: gave ")


@pytest.mark.parametrize("faulty", ["a", "b.x"])
def test_fault_in_an_ignored_module_is_its_own(faulty):
    """A module whose rows are ignored is named where what it gave fails elsewhere."""
    rule = Rule("r", rows=f"Module.{faulty}.M.*", ignore=True)

    divergence = verdict_of(NETWORK.run(), NETWORK.run(after=faulty), rule).divergence

    assert (divergence.module, bool(divergence.handed_to)) == (faulty, True)


@pytest.mark.parametrize("inside", ["b", "model"])
def test_parents_are_named_beside_renamed_modules(inside):
    """A parent that changes what its child gave is named, renamed or not."""
    first = {"b": "b.x", "model": "a"}[inside]
    candidate = renamed(NETWORK.run(inside=inside), f"{first}.M", f"{first}2.M")

    divergence = verdict_of(NETWORK.run(), candidate).divergence

    assert (divergence.module, divergence.handed_to) == (inside, "")


def test_code_around_the_modules_is_named():
    """What changed between two modules without a parent is no input of the model."""
    x = GENERATOR.standard_normal((4, 32))

    def around(factor):
        calls = [
            (captures.module("model"), 0, {"input_args.0": x}, {"output.0": -x}),
            (captures.module("head"), 0, {"input_args.0": -x * factor},
             {"output.0": x * factor}),
        ]  # fmt: skip
        return captures.capture(calls)

    divergence = verdict_of(around(1.0), around(1.1)).divergence

    assert (divergence.kind, divergence.between) == ("origin", captures.module("head"))
    text = describe_divergence(divergence)
    assert text.startswith(
        "the code around the modules: its own code changed the input"
    )


def test_other_weights_are_said_also_where_nothing_fails():
    """Fingerprints that differ are noted in a verdict that is green."""
    golden = NETWORK.run(weights={"a": {"a.weight": "1", "a.bias": "1"}, "c": {}})
    candidate = NETWORK.run(weights={"a": {"a.weight": "2", "a.bias": "3"}, "c": {}})

    verdict = verdict_of(golden, candidate)

    assert verdict.status == "changed"
    (note,) = verdict.notes
    assert note.startswith("2 weights differ from the golden's, the first is a.bias")


def test_parent_that_hands_on_another_childs_output_is_named():
    """A judged module that returned what it should accuses the parent that mixed up."""
    x, y = GENERATOR.standard_normal((2, 4, 32))

    def model(given):
        calls = [
            (captures.module("m.a"), 1, {}, {"output.0": x}),
            (captures.module("m.b"), 1, {}, {"output.0": y}),
            (captures.module("m.c"), 1, {"input_args.0": given}, {"output.0": -given}),
            (captures.module("m"), 0, {}, {"output.0": -given}),
        ]
        return captures.capture(calls)

    divergence = verdict_of(model(y), model(x)).divergence

    assert (divergence.module, divergence.handed_to) == ("m", "")
    assert divergence.between == captures.module("m.c")


@pytest.mark.parametrize("has_next", [False, True])
def test_code_that_only_adds_up_errors_is_no_origin(has_next):
    """A sum may be outside its limits where its terms are not: drift, not its fault."""
    w, v, noise = GENERATOR.standard_normal((3, 4, 32))

    def model(size):
        error = size * np.sqrt(5) * noise
        a, b = v + 2 * w + error, v - 2 * w + error
        added = a + b
        last = [(captures.module("m.c"), 1, {"input_args.0": added}, {"output.0": v})]
        calls = [
            (captures.module("m.a"), 1, {}, {"output.0": a}),
            (captures.module("m.b"), 1, {}, {"output.0": b}),
            *(last if has_next else []),
            (captures.module("m"), 0, {}, {"output.0": v if has_next else added}),
        ]
        return captures.capture(calls)

    verdict = verdict_of(model(0), model(7e-4))

    assert verdict.failed == 1
    assert verdict.divergence.kind == "drift"
    assert verdict.divergence.module in ("m.a", "m.b")


def test_nan_beside_noise_is_an_origin():
    """Across keys a leaf that adds a NaN to inputs full of noise is named itself."""
    generator = np.random.default_rng(3)
    x, y, z = generator.standard_normal((3, 6, 32))
    noise = 1 + 0.01 * generator.standard_normal((6, 32))
    bad = z * noise
    bad[np.unravel_index(np.abs(z).argmin(), z.shape)] = np.nan
    sides = [
        captures.capture(
            [
                (captures.module("a"), 1, {"input_args.0": x}, {"output.0": a}),
                (captures.module("b"), 1, {"input_args.0": a}, {"output.0": b}),
                (captures.module("model"), 0, {"input_args.0": x}, {"output.0": b}),
            ],
            key=key,
        )
        for a, b, key in (
            (y, z, captures.KEY),
            (y * noise, bad, captures.OTHER_KEY),
        )
    ]

    verdict = judge(*sides).verdict

    assert verdict.mode == "cross"
    assert verdict.divergence.kind == "origin"
    assert verdict.divergence.module == "b"
    assert verdict.divergence.finding.metric == "nonfinite"
