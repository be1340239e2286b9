# SPDX-License-Identifier: Apache-2.0
"""Options and usage errors: one line, exit code 4, no traceback."""

import pytest
from plugin_project import ADDOPTS, assert_usage_error

USER = """
def test_a(msprobe):
    pass
"""


@pytest.fixture(autouse=True)
def outside_ci(pytester, monkeypatch):
    """The children of these tests do not run in CI, and start fast."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PYTEST_ADDOPTS", ADDOPTS)


def run(pytester, *arguments, config="capture: {level: L0}\n", test=USER):
    """Runs pytest on a project with one test."""
    pytester.makepyfile(test_project=test)
    if config is not None:
        pytester.path.joinpath("msprobe.yaml").write_text(config)
    return pytester.runpytest_subprocess(*arguments)


def test_fixture_without_configuration_is_a_usage_error(pytester):
    """A test that asks for a fixture and no configuration is never a silent pass."""
    result = run(pytester, config=None)

    assert_usage_error(result, "test_project.py::test_a", "--msprobe-config FILE")


NOT_SELECTED = [
    ["-k", "plain"],
    ["-m", "not slow"],
    ["--deselect", "test_project.py::test_a"],
    ["test_project.py::test_plain"],
    ["--collect-only"],
]


@pytest.mark.parametrize("arguments", NOT_SELECTED, ids=lambda a: a[0])
@pytest.mark.parametrize("marker", ["slow", "msprobe(level='L9')"])
def test_tests_that_do_not_run_need_no_configuration(pytester, arguments, marker):
    """A deselected test that asks for a fixture does not stop the others."""
    pytester.makeini("[pytest]\nmarkers = slow\n")
    test = (
        f"import pytest\n\n@pytest.mark.slow\n@pytest.mark.{marker}\n"
        "def test_a(msprobe):\n    pass\n\ndef test_plain():\n    pass\n"
    )

    result = run(pytester, *arguments, config=None, test=test)

    assert result.ret == 0
    if arguments[0] != "--collect-only":
        result.assert_outcomes(passed=1, deselected=int(arguments[0][0] == "-"))


def test_settings_of_deselected_tests_are_not_checked(pytester):
    """A wrong marker of a test that does not run does not stop the others."""
    test = (
        "import pytest\n\n@pytest.mark.msprobe(level='L9')\n"
        "def test_a(msprobe_engine):\n    pass\n\ndef test_plain():\n    pass\n"
    )
    options = ["--msprobe-config", "msprobe.yaml"]

    assert run(pytester, *options, "-k", "plain", test=test).ret == 0
    assert_usage_error(run(pytester, *options, test=test), "level 'L9'")


def test_missing_configuration_file(pytester):
    """A file that is not there is named."""
    assert_usage_error(
        run(pytester, "--msprobe-config", "no.yaml"), "no.yaml: cannot be read"
    )


@pytest.mark.parametrize(
    ("config", "phrases"),
    [
        ("capture: {levle: L0}", ["msprobe.yaml:1: capture.levle", "'level'"]),
        ("a: 1\na: 2", ["msprobe.yaml:2: a: duplicate key"]),
        (
            "engine: {enforce_eager: false}",
            ["msprobe.yaml:1", "nothing can be recorded"],
        ),
        ("capture: {rank: 3}", ["capture.rank", "expected a list"]),
    ],
)
def test_bad_configuration(pytester, config, phrases):
    """A wrong key or value is one line with file, line and what was expected."""
    result = run(pytester, "--msprobe-config", "msprobe.yaml", config=config)

    assert_usage_error(result, *phrases)


def test_update_needs_a_configuration(pytester):
    """Goldens cannot be updated without knowing where they lie."""
    assert_usage_error(run(pytester, "--msprobe-update"), "needs --msprobe-config")


def test_update_mode_must_be_known(pytester):
    """Another mode is refused, with the known ones."""
    result = run(pytester, "--msprobe-config", "msprobe.yaml", "--msprobe-update=some")

    assert_usage_error(result, "new, failing, all")


def test_update_is_refused_in_ci(pytester, monkeypatch):
    """With CI set, an update is a usage error."""
    monkeypatch.setenv("CI", "true")

    result = run(pytester, "--msprobe-config", "msprobe.yaml", "--msprobe-update=new")

    assert_usage_error(result, "not written where CI is set")


def test_engine_fixture_needs_a_model(pytester):
    """msprobe_engine without engine.model says where to name one, before any test."""
    result = run(
        pytester,
        "--msprobe-config",
        "msprobe.yaml",
        test="def test_a(msprobe_engine):\n    pass\n",
    )

    assert_usage_error(result, "msprobe.yaml: engine: model: not set")
    assert "collected" in result.stdout.str()
    assert "passed" not in result.stdout.str()


@pytest.mark.parametrize(
    ("marker", "phrase"),
    [
        ("level='L9'", "expected one of"),
        ("nonsense=1", "nonsense: unknown key"),
        ("teacher_forcing=1", "teacher_forcing 1: expected True or False"),
        ("engine=3", "engine: expected a dict"),
        ("decode_steps=-1", "decode_steps -1"),
        ("tolerances={'rel_l3': 1}", "rel_l3: unknown metric"),
        ("tolerances={'max': -1}", "max -1: expected a number"),
        ("tolerances={'max': float('nan')}", "max nan: expected a number"),
        ("engine={'model': 'x', 1: 2}", "engine: expected a dict with texts"),
        ("'L0'", "expected keyword arguments"),
        ("engine={'enforce_eager': False}", "nothing can be recorded"),
    ],
)
def test_bad_markers(pytester, marker, phrase):
    """A wrong marker is a usage error in one line with the test's name."""
    result = run(
        pytester,
        "--msprobe-config",
        "msprobe.yaml",
        test=(
            "import pytest\n"
            f"@pytest.mark.msprobe({marker})\n"
            "def test_a(msprobe_engine):\n    pass\n"
        ),
        config="engine: {model: x}\n",
    )

    assert_usage_error(result, "test_project.py::test_a: @pytest.mark.msprobe", phrase)


@pytest.mark.parametrize("fixture", ["msprobe", "request"])
def test_bad_markers_without_the_engine_fixture(pytester, fixture):
    """A wrong marker is found for every test that has one, whatever it asks for."""
    test = (
        "import pytest\n@pytest.mark.msprobe(engine={'enforce_eager': False})\n"
        f"def test_a({fixture}):\n    pass\n"
    )

    result = run(pytester, "--msprobe-config", "msprobe.yaml", test=test)

    assert_usage_error(
        result, "@pytest.mark.msprobe: engine.enforce_eager: expected true"
    )


def test_check_without_capture_fails(pytester):
    """A test that checks what it never captured fails."""
    result = run(
        pytester,
        "--msprobe-config",
        "msprobe.yaml",
        test="def test_a(msprobe):\n    msprobe.check()\n",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*nothing was captured in this test*"])


def test_an_own_failure_stays_the_tests_own(pytester):
    """A test that fails for its own reasons reports its own failure."""
    result = run(
        pytester,
        "--msprobe-config",
        "msprobe.yaml",
        test="def test_a(msprobe):\n    assert 1 == 2\n",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_an_engine_that_listens_to_nobody_is_explained(pytester):
    """Workers that lack our method give the remedy, not an attribute error."""
    result = run(
        pytester,
        "--msprobe-config",
        "msprobe.yaml",
        test="""
class Engine:
    def collective_rpc(self, method, args):
        assert method == "__dir__"
        return [["__dir__"]]

def test_a(msprobe):
    with msprobe.capture(Engine()):
        pass
""",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*asked to attach; *MSPROBE_ATTACH=1*"])
    assert "collective_rpc" not in result.stdout.str()


def test_header_names_the_configuration(pytester):
    """A run with a configuration says which; others have no line of ours."""
    result = run(pytester, "--msprobe-config", "msprobe.yaml")
    result.stdout.fnmatch_lines(["msprobe: *msprobe.yaml"])

    plain = run(pytester, config=None, test="def test_a():\n    pass\n")
    assert "msprobe:" not in plain.stdout.str()
    plain.assert_outcomes(passed=1)


def test_help_and_markers_are_documented(pytester):
    """The options and the marker describe themselves."""
    result = run(pytester, "--help", config=None)
    result.stdout.fnmatch_lines(["*--msprobe-config=FILE*", "*--msprobe-update*"])

    result = run(pytester, "--markers", config=None)
    result.stdout.fnmatch_lines(["@pytest.mark.msprobe(level*"])
