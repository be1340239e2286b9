# SPDX-License-Identifier: Apache-2.0
"""Tolerances of markers and calls, settings in pyproject.toml, captures left out."""

import pytest
from plugin_project import PluginProject, assert_failed, text_of

MARKED = """
@pytest.mark.msprobe(tolerances=[{"rows": "*layer*", "rel_l2": LIMIT, "max": 1}])
def test_a(msprobe_engine, msprobe):
    with msprobe.capture(msprobe_engine):
        msprobe_engine.generate(factor=FACTOR)
    msprobe.check(tolerances={"norm": 1.0, "min": 1.0, "mean": 1.0})
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose tests are to be written."""
    return PluginProject(pytester, monkeypatch)


def marked(limit, factor):
    """The test with a limit in its marker, of an engine that is off by a factor."""
    return MARKED.replace("LIMIT", limit).replace("FACTOR", factor)


def test_rules_of_marker_and_call_are_applied_and_named(project):
    """Limits of the marker and of the call count, and a failing row names its own."""
    project.write(marked("0.4", "1.0"))
    project.record()
    project.write(marked("0.4", "1.3"))
    assert project.run().ret == 0

    project.write(marked("0.2", "1.3"))

    assert_failed(project.run(), "test_project.py:5", failed=1)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"*layer*"', '"*lair*"', "test_project.py:5: rows '*lair*'"),
        ('{"norm"', '{"rows": "*lair*", "norm"', "test_project.py:9: rows '*lair*'"),
    ],
)
def test_a_rule_of_a_test_without_rows_fails_it(project, old, new, where):
    """A marker's or call's glob that names no row of its test fails that test."""
    project.write(marked("0.4", "1.0"))
    project.record()
    project.write(marked("0.4", "1.0").replace(old, new))

    assert_failed(project.run(), where, "the nearest rows are Module.layer", failed=1)


def test_settings_in_pyproject_are_found(project):
    """Without --msprobe-config, [tool.msprobe] of the root's pyproject.toml is used."""
    (project.folder / "pyproject.toml").write_text(
        '[tool.msprobe.engine]\nmodel = "any"\n'
    )
    project.write("def test_a(msprobe_engine):\n    msprobe_engine.generate()\n")
    project.run("--msprobe-update=new", config=None)

    result = project.run(config=None)

    assert result.ret == 0, text_of(result)
    assert "msprobe: " in text_of(result)
    assert "pyproject.toml" in text_of(result)


TWO = """
def test_a(msprobe_engine, msprobe):
    for name in (None, "second"):
        with msprobe.capture(msprobe_engine, name):
            msprobe_engine.generate()
"""


def test_a_capture_that_is_no_longer_made_fails(project):
    """The golden of a test's second capture is missed, and removed by an update."""
    project.write(TWO)
    project.record()
    assert project.run().ret == 0
    project.write(TWO.replace(', "second"', ","))

    assert_failed(project.run(), "there are goldens: test_a@second", failed=1)
    result = project.run("--msprobe-update=failing")

    assert result.ret == 0, text_of(result)
    assert project.goldens() == ["test_project.py/test_a/cpu-avx2-amd.jsonl"]


def test_goldens_of_other_tests_are_not_missed(project):
    """A test whose name begins with another one's is none of its captures."""
    both = TWO + TWO.replace("test_a", "test_ab")
    project.write(both)
    project.record()

    assert project.run().ret == 0
    assert len(project.goldens()) == 4


AGAIN = """
def test_a(msprobe_engine, msprobe):
    capture = msprobe.capture(msprobe_engine)
    with capture:
        msprobe_engine.generate()
    capture.check()
    with capture:
        msprobe_engine.generate(factor=FACTOR)
"""


def test_a_block_that_is_entered_again_is_judged_again(project):
    """What a checked capture records in a second block is judged as well."""
    project.write(AGAIN.replace("FACTOR", "1.0"))
    project.record()
    assert project.run().ret == 0

    project.write(AGAIN.replace("FACTOR", "2.0"))

    assert_failed(project.run(), "layer", failed=1)


def test_a_block_is_not_entered_again_before_it_was_judged(project):
    """What the first block recorded would be lost unjudged."""
    project.write(AGAIN.replace("FACTOR", "1.0"))
    project.record()
    project.write(AGAIN.replace("FACTOR", "1.0").replace("    capture.check()\n", ""))

    assert_failed(project.run(), "entered again before its check", failed=1)


@pytest.mark.skipif(
    int(pytest.__version__.partition(".")[0]) < 9, reason="subtests came with pytest 9"
)
def test_failing_subtests_write_no_golden(project):
    """A test whose subtest fails leaves no golden, however it ends."""
    project.write(
        "def test_a(msprobe_engine, subtests):\n"
        "    msprobe_engine.generate()\n"
        "    with subtests.test('first'):\n"
        "        assert False\n"
    )

    result = project.run("--msprobe-update=new")

    assert result.ret == 1, text_of(result)
    assert project.goldens() == []
