# SPDX-License-Identifier: Apache-2.0
"""What people read."""

import json
import math

import captures
import numpy as np
import pytest
from captures import OTHER_KEY, Network, capture, module, request

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.limits import ROW_METRICS, Rule
from pytest_msprobe.model.verdict import StructureChange, Verdict
from pytest_msprobe.report.github import render_annotations, render_summary
from pytest_msprobe.report.html import render_page
from pytest_msprobe.report.record import read_verdict, write_verdict
from pytest_msprobe.report.terminal import (
    MAX_LINES,
    describe_tokens,
    render_failure,
    render_green,
    summary_line,
)

NETWORK = Network()
COMMAND = "pytest --msprobe-update=failing"


def verdict_of(golden=None, candidate=None, rules=()):
    """A verdict on a fault in b.x, or on the captures given."""
    golden = golden or NETWORK.run(requests=[request()], test="t.py::t")
    candidate = candidate or NETWORK.run(
        after="b.x", requests=[request()], test="t.py::t"
    )
    return judge(golden, candidate, rules).verdict


def test_failure_starts_with_the_module():
    """The first line starts with the guilty module, for pytest's short summary."""
    text = render_failure(verdict_of(), update_command=COMMAND)

    first = text.splitlines()[0]
    assert first.startswith("b.x: first to compute something else (")
    assert "allowed 0.001" in first


def test_failure_has_the_headline_second():
    """The second line has the greatest difference of log-probabilities."""
    moved = NETWORK.run(after="a", requests=[request(logprobs=(-0.1, -0.4))])

    lines = render_failure(
        verdict_of(candidate=moved), update_command=COMMAND
    ).splitlines()

    assert lines[1].startswith("tokens: 2 compared, greatest |Δlogprob| 0.2")
    assert "no token flipped" in lines[1]


def test_failure_shows_observed_allowed_ratio_and_rule():
    """Each row of the table has its metric, values, ratio and rule."""
    text = render_failure(verdict_of(), update_command=COMMAND)

    assert "row" in text
    assert "observed" in text
    row = next(line for line in text.splitlines() if line.startswith("  b.x output.0"))
    assert row.split()[-1] == "default"
    assert row.split()[-2] == "own"
    assert row.split()[-3].endswith("x")


def test_failure_ends_with_what_to_do():
    """The last lines name golden, capture and the exact command."""
    lines = render_failure(verdict_of(), update_command=COMMAND).splitlines()

    assert lines[-1].endswith(COMMAND)
    assert lines[-3].startswith("golden:")


def test_failure_is_at_most_forty_lines():
    """However much differs, the message stays readable."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((60, 2, 4))

    def make(factor):
        calls = [
            (module(f"m{i}"), 0, {}, {"output.0": v * factor})
            for i, v in enumerate(values)
        ]
        return capture(calls, provenance={f"p{i}": factor for i in range(30)})

    text = render_failure(verdict_of(make(1), make(2)), update_command=COMMAND)

    assert len(text.splitlines()) <= MAX_LINES
    assert COMMAND in text


def test_another_key_is_said_in_the_first_lines():
    """A judgement across keys says so before the table."""
    golden = NETWORK.run(key=OTHER_KEY)
    text = render_failure(
        verdict_of(golden, NETWORK.run(after="a", factor=2)), update_command=COMMAND
    )

    assert any("another key" in line for line in text.splitlines()[:4])


def test_missing_golden_prints_the_command():
    """A missing golden says where it would be and how to write it."""
    verdict = Verdict(test="t.py::t", status="missing", golden="g", capture="c")

    text = render_failure(verdict, update_command=COMMAND)

    assert text.splitlines()[0] == "no golden for t.py::t"
    assert COMMAND in text


def test_incomparable_captures_give_their_reasons():
    """Another prompt or level is explained, not shown as a regression."""
    other = NETWORK.run(requests=[request(prompt_sha256="bb")])

    text = render_failure(verdict_of(candidate=other), update_command=COMMAND)

    assert text.startswith("cannot be compared with the golden: request 0: another")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"inside": "b"}, "b: its own code changed the input of b.y"),
        ({"inside": "model"}, "model: its own code changed the input of b"),
        ({"after": "c"}, "c: first to compute something else"),
    ],
)
def test_phrases_for_origins(options, phrase):
    """Each kind of origin has its phrase."""
    assert summary_line(verdict_of(candidate=NETWORK.run(
        requests=[request()], **options))).startswith(phrase)  # fmt: skip


def test_phrase_for_weights():
    """Changed weights are named with their parameter."""
    golden = NETWORK.run(weights={"c": {"c.weight": "1"}})
    candidate = NETWORK.run(after="c", weights={"c": {"c.weight": "2"}})

    text = summary_line(verdict_of(golden, candidate))

    assert text.startswith("c: weights differ from the golden's: c.weight")


def test_phrase_for_operators():
    """At mix the operator is named together with the module around it."""
    x = np.ones((2, 4))

    def make(value):
        return capture(
            [
                ("Functional.linear.3.forward", 1, {"input_args.0": x},
                 {"output.0": x * value}),
                (module("a"), 0, {"input_args.0": x}, {"output.0": x * value}),
            ]
        )  # fmt: skip

    text = summary_line(verdict_of(make(1), make(2)))

    assert text.startswith("a: first to compute something else in Functional.linear.3")


def test_phrases_for_tokens():
    """Flips, bounds and early ends are told in words."""
    golden = [request((5, 6), (-0.1, -0.1))]
    flipped = verdict_of(
        NETWORK.run(requests=golden),
        NETWORK.run(requests=[request((5, 60), (-0.1, -0.1))]),
    )
    ended = verdict_of(
        NETWORK.run(requests=golden), NETWORK.run(requests=[request((5,), (-0.1,))])
    )

    assert "at least" in describe_tokens(flipped.tokens)
    assert "first flipped: token 1 of request 0, 6 became 60" in describe_tokens(
        flipped.tokens
    )
    assert "one side ends there" in describe_tokens(ended.tokens)
    assert describe_tokens(Verdict("t", "pass").tokens) == "tokens: none compared"


def test_green_line_counts_rows():
    """A pass is one line with how much was judged."""
    text = render_green(verdict_of(candidate=NETWORK.run(requests=[request()])))

    assert text.endswith("12 rows judged, 0 outside their limits, 12 bit-identical")


def test_verdict_files_round_trip(tmp_path):
    """A written verdict is read back; another schema is refused."""
    verdict = verdict_of()
    path = tmp_path / "verdict.json"
    write_verdict(verdict, path)

    assert read_verdict(path) == verdict

    path.write_text(path.read_text().replace('"schema": 3', '"schema": 7'))
    with pytest.raises(DumpFormatError, match="schema 7"):
        read_verdict(path)
    path.write_text("{}")
    with pytest.raises(DumpFormatError, match="not a verdict"):
        read_verdict(path)


def test_verdict_files_move_with_their_run(tmp_path):
    """Paths in the file are relative to it, and absolute once it is read."""
    verdict = verdict_of()
    verdict.golden = str(tmp_path / "golden" / "t.py" / "t" / "key.jsonl")
    verdict.capture = str(tmp_path / "runs" / "1" / "t.py" / "t" / "capture.jsonl")
    folder = tmp_path / "runs" / "1" / "t.py" / "t"
    folder.mkdir(parents=True)

    write_verdict(verdict, folder / "verdict.json")
    stored = json.loads((folder / "verdict.json").read_text())
    there = read_verdict(folder / "verdict.json")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = read_verdict(tmp_path / "elsewhere" / "1" / "t.py" / "t" / "verdict.json")

    assert stored["golden"] == "../../../../golden/t.py/t/key.jsonl"
    assert stored["capture"] == "capture.jsonl"
    assert str(tmp_path) not in json.dumps(stored)
    assert there == verdict
    assert moved.golden == verdict.golden
    assert moved.capture == verdict.capture.replace("/runs/", "/elsewhere/")


def test_verdict_files_of_the_last_schema_are_read(tmp_path):
    """A file of schema 2, without what schema 3 adds, is still read."""
    path = tmp_path / "verdict.json"
    old = {"test": "t", "status": "pass", "schema": 2, "golden": "/g/a.jsonl"}
    path.write_text(json.dumps(old))

    verdict = read_verdict(path)

    assert (verdict.schema, verdict.golden, verdict.rules) == (2, "/g/a.jsonl", [])


def test_infinite_limits_survive_the_file(tmp_path):
    """A verdict under infinite limits is read back and shown as such."""
    everything = dict.fromkeys((*ROW_METRICS, "logprob"), math.inf)
    rule = Rule("msprobe.yaml:3", limits={**everything, "norm": 1e-6})
    verdict = verdict_of(rules=[rule])
    path = tmp_path / "verdict.json"

    write_verdict(verdict, path)

    assert read_verdict(path) == verdict
    assert read_verdict(path).rules[0].rule() == rule
    assert "(allowed inf)" in render_failure(verdict, update_command=COMMAND)
    assert "(allowed inf)" in render_page([verdict])


def test_notes_are_printed_under_green_lines():
    """What was judged otherwise is said where nothing failed as well."""
    golden = NETWORK.run(key=OTHER_KEY)

    lines = render_green(verdict_of(golden, NETWORK.run())).splitlines()

    assert lines[0].endswith("golden of another key")
    assert lines[1].startswith(f"  the golden is of {OTHER_KEY}, this is ")
    assert render_green(verdict_of(golden, golden)).count("\n") == 0


def test_the_end_of_a_failure_is_never_cut_off():
    """However many notes there are, golden, capture and command are shown."""
    verdict = verdict_of()
    verdict.notes = [f"note {i}" for i in range(60)]

    lines = render_failure(verdict, update_command=COMMAND).splitlines()

    assert len(lines) == MAX_LINES
    assert lines[-1].endswith(COMMAND)
    assert lines[-3].startswith("golden:")


@pytest.mark.parametrize("status", ["fail", "incomparable", "missing"])
def test_no_command_is_made_up(status):
    """Where nobody knows the command, none is shown."""
    verdict = verdict_of()
    verdict.status, verdict.reasons = status, ["reason"]

    text = render_failure(verdict, update_command=None)

    assert "update it" not in text
    assert "write it" not in text


def test_every_report_has_the_same_findings():
    """HTML, summary and annotations name the module and the test."""
    red, green = verdict_of(), verdict_of(candidate=NETWORK.run(requests=[request()]))
    page, summary = render_page([green, red]), render_summary([green, red])
    annotations = list(render_annotations([green, red]))

    assert "1 of 2 red" in page
    assert "1 of 2 red" in summary
    assert page.index("b.x: first") < page.index("12 rows within")
    assert "b.x: first" in summary
    assert len(annotations) == 1
    assert annotations[0].startswith("::error file=t.py,title=precision%3A t.py")
    assert "\n" not in annotations[0]


def test_html_escapes_names():
    """A test's name cannot inject markup."""
    verdict = verdict_of()
    verdict.test = "<script>alert(1)</script>"

    assert "<script>" not in render_page([verdict])


def test_github_limits_are_kept():
    """At most ten annotations, and a summary below the size that is dropped."""
    verdict = verdict_of()
    many = [verdict] * 30_000

    assert len(list(render_annotations(many[:50]))) == 10
    assert len(render_summary(many).encode()) < 1_000_000
    assert captures.KEY in verdict.key


def test_structure_and_inherited_rows_are_said():
    """Renamed, fused and new modules and the rows that inherit stand in all reports."""
    verdict = verdict_of()
    verdict.inherited = 7
    verdict.structure = [
        StructureChange(module("a.gate"), module("a.gate_up", "Merged")),
        StructureChange(module("a.act"), module("a.silu"), is_equal=True),
        StructureChange(gone=module("a.old")),
        StructureChange(new=module("a.new")),
    ]

    text = render_failure(verdict, update_command=None)

    lines = [
        "gone: a.gate (M); nearest here: a.gate_up (Merged)",
        "gone: a.act (M); nearest here: a.silu (M), with the same numbers",
        "gone: a.old (M)",
        "new: a.new (M)",
    ]
    page = render_page([verdict])
    assert all(f"  {line}\n" in text and f"<p>{line}</p>" in page for line in lines)
    assert "(7 inherited)" in text
    assert "7 failing rows are inherited" in page
