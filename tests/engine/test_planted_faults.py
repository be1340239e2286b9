# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe doctor`: does the gate see faults in the user's engine?"""

import json
import math
import random
import subprocess
import sys
from dataclasses import asdict

import pytest
import tools

from pytest_msprobe.cli import doctor
from pytest_msprobe.cli.main import main
from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.engine.client import ask_workers, converse
from pytest_msprobe.engine.plants import KINDS, Place
from pytest_msprobe.engine.trial import (
    Attempt,
    Order,
    Trial,
    examine,
    seeded_prompts,
    smallest_caught,
    stated_power,
)
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.limits import ROW_METRICS, Rule

POWER = stated_power("bfloat16")
# A gate that lets every number pass.
DEAD = Rule("dead", limits=dict.fromkeys((*ROW_METRICS, "logprob"), math.inf))
CONFIG = """
engine:
  model: {model}
  dtype: bfloat16
  max_model_len: 128
  env: {{OMP_NUM_THREADS: 1, HF_HUB_OFFLINE: 1, VLLM_CPU_KVCACHE_SPACE: 1}}
"""


def trial_of(engine, folder, rules=()):
    """A trial with the shared engine."""
    generator = random.Random(0)  # noqa: S311 - not for secrets
    prompts = seeded_prompts(320, 128, generator)[:1]
    config = DebuggerConfig(level="L0", extra_info=False)
    return Trial(engine, config, rules, folder, prompts)


@pytest.fixture
def configured(demo_model, tmp_path):
    """A user's configuration."""
    path = tmp_path / "msprobe.yaml"
    path.write_text(CONFIG.format(model=demo_model))
    return path


def test_all_faults_in_a_users_engine(configured):
    """Every kind above the power is caught and named, clean runs pass, exit code 0."""
    command = [sys.executable, "-m", "pytest_msprobe.cli.main", "doctor", "--json"]
    done = subprocess.run(
        [*command, "--quick", "--runs", "2", "--msprobe-config", str(configured)],
        env=tools.clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert found["begin"]["power"] == POWER
    assert [run["status"] for run in found["clean"]] == ["pass"] * 3
    assert {fault["fault"] for fault in found["faults"]} == set(KINDS)
    for fault in found["faults"]:
        first = fault["first"]
        assert float(first["moved"]) > 0, fault
        if fault["is_above"]:
            assert first["is_caught"], fault
            assert fault["is_right"], fault
            assert first["metric"], fault
    # One weight row x 1.01 is below the power of a bfloat16 gate, and only reported.
    (row,) = [fault for fault in found["faults"] if fault["fault"] == "weight_row"]
    assert not row["is_above"]


def answered(engine, folder, rules, monkeypatch, configured, *arguments):
    """Exit code of the command, with the shared engine in place of a new one."""

    def records(order, _variables):
        given = Order(**{**order, "faults": tuple(order["faults"])})
        power = POWER if given.power is None else given.power
        yield {"event": "begin", "model": "m", "dtype": "d", "level": "L0",
               "power": power}  # fmt: skip
        yield from examine(trial_of(engine, folder, rules), given, power)

    monkeypatch.setattr(doctor, "_records", records)
    options = ["--quick", "--runs", "1", *arguments]
    return main(["doctor", "--msprobe-config", str(configured), *options])


def test_a_dead_gate_is_found(engine, tmp_path, monkeypatch, configured, capsys):
    """With limits of infinity a scaled output is not caught: exit code 1, and said."""
    options = ("--faults", "scale,residual")

    code = answered(engine, tmp_path, [DEAD], monkeypatch, configured, *options)

    text = capsys.readouterr().out
    assert code == 1
    assert text.count("NOT CAUGHT") == 2
    problems = [line for line in text.splitlines() if line.startswith("PROBLEM: ")]
    assert len(problems) == 2
    assert all("above the power 0.0023, and was not caught" in p for p in problems)


def test_a_fault_below_the_power_is_only_reported(
    engine, tmp_path, monkeypatch, configured, capsys
):
    """What moves less than the power may be missed; but something must be above it."""
    options = ("--faults", "scale", "--power", "0.9")

    code = answered(engine, tmp_path, [DEAD], monkeypatch, configured, *options)

    text = capsys.readouterr().out
    assert "not caught; below the power" in text
    assert "PROBLEM: no fault moved its tensor by 0.9 or more" in text
    assert code == 1


def test_plants_change_and_can_be_taken_out(engine, tmp_path):
    """Each kind moves its tensor, and the run after it is bit-identical to before."""
    trial = trial_of(engine, tmp_path)
    golden = trial.capture()
    places = {place.kind: place for place in trial.places()}
    assert set(places) == set(KINDS)

    for kind, place in places.items():
        size = max(KINDS[kind].standard, 0.5)
        moved = trial.measure(place, size)
        again = trial.measure(place, size)

        assert moved > 0, kind
        assert moved == again, kind
    (candidate,) = trial.capture()
    assert tools.unequal_rows(golden[0], candidate) == []
    assert "forward" not in vars(tools.model_of(engine).model.layers[0].mlp.act_fn)


def test_what_is_planted_is_what_is_recorded(engine, tmp_path):
    """The tensor that a fault moved differs in the capture, its module's inputs not."""
    trial = trial_of(engine, tmp_path)
    (golden,) = trial.capture()
    place = Place("weight_row", "model.layers.2.mlp.gate_up_proj")

    with trial.planted(place, 0.5):
        (candidate,) = trial.capture()

    assert trial.measure(place, 0.5) > POWER
    tools.assert_changed(golden, candidate, place.module, inputs_equal=True)


def test_smallest_size_is_searched(engine, tmp_path):
    """The smallest size caught and the largest missed are within a factor of 1.5."""
    trial = trial_of(engine, tmp_path)
    goldens = trial.capture()
    place = Place("scale", "model.layers.1.self_attn.o_proj")
    first = trial.attempt(goldens, place, 0.05)

    attempts = [first, *smallest_caught(trial, goldens, place, first)]

    caught = min(a.size for a in attempts if a.is_caught)
    missed = max((a.size for a in attempts if not a.is_caught), default=0.0)
    assert missed < caught
    assert caught / 1.5 <= missed or caught == KINDS["scale"].least
    assert all(a.is_caught for a in attempts if a.moved >= POWER)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("scale", "model.layers.9.mlp"), "no place for scale: model.layers.9"),
        (Place("nothing", "model.layers.0.mlp"), "no place for nothing"),
    ],
)
def test_a_wrong_place_is_an_error(engine, place, message):
    """A place that the model does not have is refused, and nothing is planted."""
    with pytest.raises(CaptureError, match=message):
        converse(engine, ask_workers("plant", place=asdict(place), size=1.0))

    (reply,) = converse(engine, ask_workers("unplant"))
    assert reply["calls"] == 0


def test_wrong_options(configured, capsys, tmp_path):
    """Wrong use is exit code 4 before an engine is started."""
    given = ["doctor", "--msprobe-config", str(configured)]

    assert main([*given, "--places", "0"]) == 4
    assert "--places: expected 1 or more" in capsys.readouterr().err
    assert main([*given, "--faults", "scale,sacle"]) == 4
    assert "'sacle': known: scale, element" in capsys.readouterr().err
    assert main(["doctor", "--msprobe-config", str(tmp_path / "none.yaml")]) == 4


def test_an_attempt_holds_plain_values():
    """What goes over the wire is JSON, infinity as text."""
    record = Attempt(1.0, math.inf, is_caught=True).as_json()

    assert json.loads(json.dumps(record, allow_nan=False))["moved"] == "inf"
