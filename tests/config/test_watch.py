# SPDX-License-Identifier: Apache-2.0
"""`dump_enable`: the file is looked at again while the program runs."""

import json
import os

import pytest

from pytest_msprobe.config.source import read_source
from pytest_msprobe.config.watch import OFF_INTERVAL, ON_INTERVAL, ConfigWatch


class File:
    """A configuration file and a clock that are moved by hand."""

    def __init__(self, folder, **config):
        self.path = folder / "config.json"
        self.now = 100.0
        self._stamp = 0
        self.write(**config)

    def write(self, text=None, **config):
        """Writes the file; its time of change always moves."""
        self.path.write_text(json.dumps(config) if text is None else text)
        self._stamp += 1
        os.utime(self.path, (self._stamp, self._stamp))

    def watch(self, **overrides):
        """Watches the file."""
        return ConfigWatch(read_source(self.path), overrides, lambda: self.now)


@pytest.mark.parametrize("is_on", [True, False])
def test_a_change_is_taken_over(tmp_path, is_on):
    """Recording is switched, and other keys are read as well."""
    file = File(tmp_path, dump_enable=is_on, level="L0")
    watch = file.watch()
    file.write(dump_enable=not is_on, level="mix")

    assert watch.is_on is is_on
    assert watch.look()
    assert watch.is_on is not is_on
    assert watch.config.level == "mix"
    assert not watch.look()


def test_a_file_without_the_key_is_not_watched(tmp_path):
    """Only a file that holds dump_enable at first is read again."""
    file = File(tmp_path, level="L0")
    watch = file.watch()
    file.write(dump_enable=False, level="mix")

    assert not watch.look()
    assert watch.is_on
    assert watch.config.level == "L0"


@pytest.mark.parametrize(
    ("is_on", "interval"), [(True, ON_INTERVAL), (False, OFF_INTERVAL)]
)
def test_the_file_is_looked_at_now_and_then(tmp_path, is_on, interval):
    """Between two looks lies half a second while on and three seconds while off."""
    file = File(tmp_path, dump_enable=is_on)
    watch = file.watch()
    watch.look()
    file.write(dump_enable=not is_on)

    file.now += 0.9 * interval
    assert not watch.look()
    file.now += 0.2 * interval
    assert watch.look()


def test_a_key_that_is_taken_out_keeps_its_value(tmp_path):
    """Removing dump_enable changes nothing, and the file is still watched."""
    file = File(tmp_path, dump_enable=False)
    watch = file.watch()
    file.write(level="L0")
    watch.look()
    assert not watch.is_on

    file.now += 2 * OFF_INTERVAL
    file.write(level="L0", dump_enable=True)
    assert watch.look()
    assert watch.is_on


@pytest.mark.parametrize("text", ["{", "[]", '{"dump_enable": 1}', '{"level": "L9"}'])
def test_a_broken_file_switches_off_until_it_is_whole(tmp_path, caplog, text):
    """What cannot be read is said once; a good file switches on again."""
    file = File(tmp_path, dump_enable=True)
    watch = file.watch()
    file.write(text)
    for _ in range(3):
        watch.look()
        file.now += 2 * OFF_INTERVAL

    assert not watch.is_on
    assert len(caplog.records) == 1
    assert str(file.path) in caplog.text
    file.write(dump_enable=True)
    assert watch.look()
    assert watch.is_on


def test_a_file_that_is_gone_switches_off(tmp_path, caplog):
    """A file that was removed is reported like one that cannot be read."""
    file = File(tmp_path, dump_enable=True)
    watch = file.watch()
    file.path.unlink()
    watch.look()

    assert not watch.is_on
    assert str(file.path) in caplog.text


def test_values_given_in_code_win_again(tmp_path):
    """Arguments of the constructor hold for a file that was read again too."""
    file = File(tmp_path, dump_enable=False, level="L0")
    watch = file.watch(level="L1")
    file.write(dump_enable=True, level="mix")
    watch.look()

    assert watch.config.level == "L1"
