# SPDX-License-Identifier: Apache-2.0
"""Ranks, rules and goldens of a whole run."""

import json

import pytest
from plugin_project import (
    CONFIG,
    PluginProject,
    assert_failed,
    assert_usage_error,
    text_of,
)

TWO_RANKS = "engine: {model: any, ranks: 2}\n"
ONE = "def test_a(msprobe_engine):\n    msprobe_engine.generate()\n"
TWO = """
def test_first(msprobe_engine):
    msprobe_engine.generate(layer="one")

def test_second(msprobe_engine):
    msprobe_engine.generate(layer="two")
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose tests are to be written."""
    return PluginProject(pytester, monkeypatch)


def names(project):
    """File names of the goldens."""
    return [path.rpartition("/")[2] for path in project.goldens()]


def test_a_rank_that_was_not_recorded_fails(project):
    """A golden of rank 1 and a capture of rank 0 only is no pass."""
    project.configure(TWO_RANKS)
    project.write(ONE)
    project.record()
    assert names(project) == ["cpu-avx2-amd.jsonl", "cpu-avx2-amd.rank1.jsonl"]
    assert project.run().ret == 0

    project.configure(CONFIG)
    result = project.run()

    line = "rank 1 has a golden and was not recorded"
    assert_failed(result, f"test_a - {line}", failed=1)
    verdicts = (project.folder / ".msprobe").rglob("verdict.json")
    newest = max(verdicts, key=lambda path: path.stat().st_mtime_ns)
    assert json.loads(newest.read_text())["reasons"] == [line]
    assert_failed(project.run("--msprobe-update=new"), line, failed=1)


def test_ranks_that_disagree_fail_and_make_no_golden(project):
    """Copies that differ between ranks fail a test, golden or not, and name the row."""
    project.configure("engine: {model: any, ranks: 2, drift: 0.1}\n")
    project.write(ONE)
    phrase = (
        "ranks 0 and 1 disagree first at Module.layer.M.forward.0.output.0@0.prompt"
    )

    result = project.run("--msprobe-update=all")

    assert_failed(result, phrase, "rel_l2 0.1", failed=1)
    assert names(project) == []
    project.configure(TWO_RANKS)
    project.record()
    project.configure("engine: {model: any, ranks: 2, drift: 0.1}\n")
    assert_failed(project.run(), phrase, failed=1)


def test_a_rank_that_is_not_selected_is_not_missed(project):
    """Where the settings select ranks, goldens of other ranks are not looked at."""
    project.configure(TWO_RANKS)
    project.write(ONE)
    project.record()

    project.configure(TWO_RANKS + "capture: {rank: [0]}\n")
    selected = project.run()
    project.configure(CONFIG + "capture: {rank: [0, 1]}\n")
    missed = project.run()

    assert selected.ret == 0, text_of(selected)
    assert_failed(missed, "rank 1 has a golden", failed=1)


def test_an_update_removes_goldens_of_ranks_that_are_gone(project):
    """Accepting a capture of fewer ranks leaves no golden behind that would fail."""
    project.configure(TWO_RANKS)
    project.write(ONE)
    project.record()
    project.configure(CONFIG)

    result = project.run("--msprobe-update=failing")

    assert result.ret == 0, text_of(result)
    result.stdout.fnmatch_lines(["golden removed: *cpu-avx2-amd.rank1.jsonl"])
    assert names(project) == ["cpu-avx2-amd.jsonl"]
    assert project.run().ret == 0


def rule(rows):
    """A configuration with one rule."""
    return (
        f"{CONFIG}tolerances:\n  rules:\n    - {{rows: '{rows}', rel_l2: 0.5}}\n"
        "    - {mode: cross, max: 0.5}\n"
    )


UNMATCHED = (
    "msprobe.yaml:4: rows '*three*' matches no row; the nearest rows are Module."
)


def test_a_rule_that_matches_nothing_is_an_error_of_a_whole_run(project):
    """With all tests judged and passed, a rule without rows is wrong use."""
    project.write(TWO)
    project.record()
    project.configure(rule("*three*"))

    result = project.run()

    assert_usage_error(result, UNMATCHED)
    result.assert_outcomes(passed=2)


def test_a_rule_without_rows_never_hides_a_failure(project):
    """A failing test stays exit code 1."""
    project.write(TWO)
    project.record()
    project.configure(rule("*three*"))
    project.write(TWO.replace('"two"', '"two", factor=2.0'))

    assert_failed(project.run(), f"ERROR: {UNMATCHED}", passed=1, failed=1)


PARTIAL = [
    ["-k", "first"],
    ["test_project.py::test_first"],
    ["--deselect", "test_project.py::test_second"],
    ["-m", "not other"],
    ["test_more.py"],
]


def test_a_partial_run_only_warns(project):
    """A rule for a test that was not selected is no error."""
    project.write(TWO.replace("def test_second", "@pytest.mark.other\ndef test_second"))
    project.write(TWO.replace("_first", "_third"), "test_more.py")
    project.pytester.makeini("[pytest]\nmarkers = other\n")
    project.record()
    project.configure(rule("*three*"))

    for arguments in PARTIAL:
        result = project.run(*arguments)

        assert result.ret == 0, text_of(result)
        assert f"WARNING: {UNMATCHED}" in text_of(result)
        assert "not all tests were judged" in text_of(result)


def test_a_rule_for_a_skipped_test_only_warns(project):
    """A test that did not run may have the rows of a rule, with a golden or not."""
    skipped = "\n@pytest.mark.skip\ndef test_new(msprobe_engine):\n    pass\n"
    project.write(TWO)
    project.record()
    project.write(TWO + skipped)
    project.configure(rule("*three*"))

    result = project.run()

    assert result.ret == 0, text_of(result)
    assert f"WARNING: {UNMATCHED}" in text_of(result)


def test_rules_match_rows_of_goldens_and_of_captures(project):
    """A rule counts as matched by a row that only one of the two has."""
    project.write(TWO + ONE.replace("generate()", 'generate(layer="gone")'))
    project.record()
    project.write(TWO + ONE.replace("generate()", 'generate(layer="new")'))
    globs = ("*one*", "*two*", "*gone*", "*new*", "*three*")
    rules = "".join(f"    - {{rows: '{glob}', max: 0.5}}\n" for glob in globs)
    project.configure(f"{CONFIG}tolerances:\n  rules:\n{rules}")

    result = project.run()

    assert_failed(result, "msprobe.yaml:8: rows '*three*'", passed=2, failed=1)
    assert text_of(result).count("matches no row") == 1


def test_two_rules_in_one_line_are_two(project):
    """Rules are told apart where they stand in one line of the file."""
    project.write(TWO)
    project.record()
    project.configure(
        CONFIG + "tolerances: {rules: [{rows: '*one*', max: 1}, "
        "{rows: '*three*', max: 1}]}\n"
    )

    assert_usage_error(project.run(), "rows '*three*' matches no row")


def test_the_printed_update_command_works_where_it_was_printed(project):
    """Run in another folder than pytest's root, the command names the test's file."""
    project.write(ONE, "tests/test_deep.py")
    project.pytester.mkdir("elsewhere")
    here = project.folder / "elsewhere"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)

        result = project.run("../tests", config="../msprobe.yaml")
        (line,) = (
            line for line in result.outlines if line.startswith("write it and review")
        )
        command = line.partition(": ")[2]
        assert command == (
            "pytest --msprobe-config ../msprobe.yaml --msprobe-update=new "
            "../tests/test_deep.py::test_a"
        )
        written = project.run_command(command)

    assert written.ret == 0, text_of(written)
    assert project.goldens() == ["tests/test_deep.py/test_a/cpu-avx2-amd.jsonl"]


@pytest.mark.parametrize(("limit", "is_told"), [(100, True), (100_000, False)])
def test_a_large_golden_is_reported(project, limit, is_told):
    """A golden above golden.size_warning_bytes is a warning when it is written."""
    project.configure(f"{CONFIG}golden: {{size_warning_bytes: {limit}}}\n")
    project.write(ONE)

    result = project.record()

    warning = f"more than golden.size_warning_bytes, {limit}; record fewer"
    assert (warning in text_of(result)) is is_told
    assert (f"WARNING: {project.folder}/golden" in text_of(result)) is is_told
