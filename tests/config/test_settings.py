# SPDX-License-Identifier: Apache-2.0
"""The configuration file of a run."""

import json

import pytest
from test_debugger_config import SEED

from pytest_msprobe.config.settings import TASK_KEYS, read_settings
from pytest_msprobe.errors import ConfigError


def write(folder, text, name="msprobe.yaml"):
    """A configuration file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_config_json_is_taken_unchanged(tmp_path):
    """An msProbe config.json is a whole configuration; goldens lie beside it."""
    settings = read_settings(write(tmp_path, json.dumps(SEED), "config.json"))

    assert settings.capture.level == "mix"
    assert settings.golden.directory == tmp_path / "golden"
    assert settings.engine.arguments == {}


def test_yaml_sections(tmp_path):
    """Every section is read, with paths relative to the file."""
    (tmp_path / "model").mkdir()
    settings = read_settings(
        write(
            tmp_path,
            "capture: {level: mix}\n"
            "engine: {model: model, max_model_len: 99, env: {OMP_NUM_THREADS: 1}}\n"
            "tolerances:\n  same: {rel_l2: 1e-2}\n  rules:\n"
            "    - {rows: '*mlp*', max: 0.5, mode: cross}\n"
            "golden: {dir: g, decode_steps: all, teacher_forcing: true}\n",
        )
    )

    assert settings.capture.level == "mix"
    assert settings.engine.arguments["model"] == str(tmp_path / "model")
    assert settings.engine.environment == {"OMP_NUM_THREADS": "1"}
    assert settings.rules[0].limits == {"rel_l2": 0.01}
    assert settings.rules[1].origin == "msprobe.yaml:6"
    assert settings.rules[1].mode == "cross"
    assert settings.golden.directory == tmp_path / "g"
    assert settings.golden.decode_steps == -1
    assert settings.golden.is_teacher_forced


PYPROJECT = """
[project]
name = "x"

[tool.msprobe.engine]
model = "any"

[tool.msprobe.tolerances]
same = {rel_l2 = 1e-2}

[[tool.msprobe.tolerances.rules]]
rows = "*mlp*"
rtol = 1e-2
atol = 1e-3

[[tool.msprobe.tolerances.rules]]
only = true
"""


def test_settings_may_live_in_pyproject(tmp_path):
    """`[tool.msprobe]` has the same sections, and its rules their own lines."""
    settings = read_settings(write(tmp_path, PYPROJECT, "pyproject.toml"))

    assert settings.engine.arguments["model"] == "any"
    assert [rule.origin for rule in settings.rules] == [
        "pyproject.toml:9",
        "pyproject.toml:11",
        "pyproject.toml:16",
    ]
    assert settings.rules[1].limits == {"rtol": 0.01, "atol": 0.001}
    assert settings.rules[2].only


def test_tolerances_of_a_config_json_stand_in_pyproject(tmp_path):
    """Beside an msProbe config.json, [tool.msprobe] holds what it has no place for."""
    write(tmp_path, PYPROJECT, "pyproject.toml")
    path = write(tmp_path, json.dumps(SEED), "config.json")

    settings = read_settings(path)

    assert settings.capture.level == "mix"
    assert settings.engine.arguments["model"] == "any"
    assert len(settings.rules) == 3

    text = PYPROJECT + '[tool.msprobe.capture]\nlevel = "L0"\n'
    write(tmp_path, text, "pyproject.toml")
    with pytest.raises(ConfigError, match="capture: stands in config"):
        read_settings(path)


@pytest.mark.parametrize(
    ("old", "new", "phrase"),
    [
        ('"*mlp*"', '"*mlp*', "not valid TOML"),
        ("msprobe", "other", "[tool.msprobe]: not there"),
        ("atol = 1e-3", "", "pyproject.toml:11: tolerances.rules.0: expected both"),
        ("rtol", "rrtol", "pyproject.toml:13: tolerances.rules.0.rrtol: unknown"),
    ],
)
def test_mistakes_in_pyproject_are_named(tmp_path, old, new, phrase):
    """A wrong table is one line with file and line."""
    assert old in PYPROJECT
    path = write(tmp_path, PYPROJECT.replace(old, new), "pyproject.toml")

    with pytest.raises(ConfigError) as error:
        read_settings(path)

    assert phrase in str(error.value)


def test_empty_yaml_has_defaults(tmp_path):
    """An empty file records L0 with a prefill and two decode steps."""
    settings = read_settings(write(tmp_path, ""))

    assert settings.capture.level == "L0"
    assert settings.golden.decode_steps == 2


def test_empty_task_sections_have_defaults(tmp_path):
    """A section without content is as good as none."""
    settings = read_settings(write(tmp_path, "capture:\n  statistics:\n"))

    assert settings.capture.data_mode == ("all",)


def test_json_may_hold_any_key(tmp_path):
    """A config.json is taken with keys that nobody knows, in its sections too."""
    data = {**SEED, "new": 1, "statistics": {**SEED["statistics"], "newer": 2}}

    settings = read_settings(write(tmp_path, json.dumps(data), "config.json"))

    assert settings.capture.level == SEED["level"]


LOAD = {"path": ".", "modules": ["Module.a.B.forward.0"]}


@pytest.mark.parametrize("key", TASK_KEYS)
def test_keys_of_task_sections_are_known(tmp_path, key):
    """Every documented key of a section is taken, or refused with a reason."""
    path = write(tmp_path, f"capture: {{statistics: {{{key}: [1]}}}}")

    with pytest.raises(ConfigError) as caught:
        read_settings(path)

    assert "unknown key" not in str(caught.value)


@pytest.mark.parametrize(
    ("capture", "key"),
    [
        ({"level": "debug"}, "level"),
        ({"level": "L0", "load": LOAD}, "load"),
        ({"statistics": {"request_id": "a"}}, "request_id"),
        ({"task": "diff_check", "diff_check": {"bench_path": "."}}, "bench_path"),
    ],
)
def test_what_needs_a_program_of_ones_own_is_refused(tmp_path, capture, key):
    """Captures of engines cannot save by hand, load inputs or pick a request."""
    path = write(tmp_path, json.dumps(capture), "config.json")

    with pytest.raises(ConfigError, match=f"{key}: .*PrecisionDebugger itself"):
        read_settings(path)


BAD = [
    ("capture: {levle: L0}", 1, "did you mean 'level'"),
    ("captrue: {}", 1, "did you mean 'capture'"),
    ("capture:\n  level: L0\n  level: mix", 3, "duplicate key"),
    ("engine:\n  model: a\nengine: {}", 3, "duplicate key"),
    ("capture: [1]", 1, "expected keys and values"),
    ("capture:\n  statistics:\n    scop: []", 3, "did you mean 'scope'"),
    ("capture: {task: tensor, statistics: {lst: []}}", 1, "did you mean 'list'"),
    ("capture: {tensor: {level: L0}}", 1, "capture.tensor.level: unknown key"),
    ("capture: {structure: [1]}", 1, "expected keys and values"),
    ("- a\n- b", None, "expected sections"),
    ("just text", None, "expected sections"),
    ("capture: {level: L0", 1, "not valid YAML"),
    ("a: b: c", 1, "not valid YAML"),
    ("capture:\n\t- x", 2, "not valid YAML"),
    ("? [a]\n: 1", 1, "plain word"),
    ("engine: {model: 3}", 1, "engine.model: expected text"),
    ("engine: {3: x}", 1, "engine.3: expected the name"),
    ("engine: {env: [A]}", 1, "engine.env"),
    ("engine: {env: {A: [1]}}", 1, "engine.env.A"),
    ("engine: {env: {A: true}}", 1, "engine.env.A"),
    ("engine:\n  enforce_eager: false", 2, "nothing can be recorded"),
    ("engine: {enforce_eager: 1}", 1, "enforce_eager"),
    ("golden: {dir: 3}", 1, "golden.dir"),
    ("golden: {dir: ''}", 1, "golden.dir"),
    ("golden: {decode_steps: -1}", 1, "decode_steps"),
    ("golden: {decode_steps: true}", 1, "decode_steps"),
    ("golden: {teacher_forcing: 1}", 1, "teacher_forcing"),
    ("golden: {decode_steps: 1.5}", 1, "decode_steps"),
    ("golden: {size_warning_bytes: 0}", 1, "size_warning_bytes"),
    ("golden: {where: x}", 1, "unknown key"),
    ("tolerances: {rel_l2: 1}", 1, "unknown key"),
    ("tolerances: {same: {rel_l3: 1}}", 1, "did you mean 'rel_l2'"),
    ("tolerances: {same: {max: -1}}", 1, "a number >= 0"),
    ("tolerances: {same: {max: big}}", 1, "a number >= 0"),
    ("tolerances: {same: {max: true}}", 1, "a number >= 0"),
    ("tolerances: {same: {max: .nan}}", 1, "a number >= 0"),
    ("tolerances: {same: 3}", 1, "expected metrics"),
    ("tolerances: {same: {}}", 1, "expected a limit"),
    ("tolerances: {rules: {a: 1}}", 1, "expected a list"),
    ("tolerances:\n  rules:\n    - 5", 3, "expected metrics"),
    ("tolerances:\n  rules:\n    - {rows: 5, max: 1}", 3, "a glob"),
    ("tolerances:\n  rules:\n    - {rows: 'a'}", 3, "expected a limit"),
    ("tolerances:\n  rules:\n    - {mode: other, max: 1}", 3, "same or cross"),
    ("tolerances:\n  rules:\n    - {ignore: 1}", 3, "true or false"),
    ("tolerances:\n  rules:\n    - {only: 1}", 3, "true or false"),
    ("tolerances:\n  rules:\n    - {rtol: 1}", 3, "both rtol and atol"),
    ("tolerances: {same: {atol: 1}}", 1, "both rtol and atol"),
]


@pytest.mark.parametrize(("text", "line", "expected"), BAD)
def test_bad_yaml_is_refused_in_one_line(tmp_path, text, line, expected):
    """A wrong file is one line with file, line and what was expected."""
    path = write(tmp_path, text)

    with pytest.raises(ConfigError) as caught:
        read_settings(path)

    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: " if line else str(path))
    assert expected in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", "{", "config.json:1: not valid JSON"),
        ("config.json", "[1]", "expected a JSON object"),
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.ini", "", "ending '.ini'"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, expected):
    """A file of the wrong kind or form is one line."""
    with pytest.raises(ConfigError, match=expected):
        read_settings(write(tmp_path, content, name))


def test_missing_file_is_refused(tmp_path):
    """A missing file is named."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        read_settings(tmp_path / "nowhere.yaml")


def test_file_that_is_no_text_is_refused(tmp_path):
    """A file that is not UTF-8 is named."""
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="not UTF-8"):
        read_settings(path)
