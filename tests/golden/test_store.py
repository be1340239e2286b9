# SPDX-License-Identifier: Apache-2.0
"""Writing goldens and choosing among them."""

import multiprocessing
import os

import pytest
from captures import KEY, OTHER_KEY, Network
from filelock import FileLock, Timeout
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.errors import GoldenError
from pytest_msprobe.golden import store
from pytest_msprobe.golden.guard import UPDATE_MODES, is_ci, is_written
from pytest_msprobe.golden.store import golden_bytes, locked, remove, write_bytes
from pytest_msprobe.golden.variants import (
    choose,
    file_name,
    ranks_of,
    safe_name,
    variants_of,
)
from pytest_msprobe.golden.variants import (
    test_folder as folder_of_test,
)


def test_a_golden_holds_what_was_captured(tmp_path):
    """Judging a capture against the golden made of it is a pass, bit for bit."""
    capture = Network().run(steps=2)
    path = tmp_path / "g.jsonl"
    write_bytes(path, golden_bytes(capture, "test_a.py::test", KEY), tmp_path / "l")

    golden = read_capture(path)
    verdict = judge(golden, capture).verdict

    assert golden.header.kind == "golden"
    assert golden.header.test == "test_a.py::test"
    assert verdict.status == "pass"
    assert verdict.equal == verdict.judged == 24


def test_writing_twice_gives_the_same_bytes():
    """A golden does not depend on when it was written."""
    first, second = (golden_bytes(Network().run(), "t", KEY) for _ in range(2))

    assert first == second


def test_a_crash_leaves_the_old_content(tmp_path, monkeypatch):
    """If writing breaks off before the rename, the golden is untouched."""
    path = tmp_path / "g.jsonl"
    write_bytes(path, b"old\n", tmp_path / "locks")

    def crash(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new\n", tmp_path / "locks")

    assert path.read_bytes() == b"old\n"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["g.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """A read-only golden tree is an error with the path."""
    tmp_path.chmod(0o500)

    with pytest.raises(GoldenError, match="cannot be written"):
        write_bytes(tmp_path / "a" / "g.jsonl", b"", tmp_path / "locks")


def test_a_file_in_the_way_is_named(tmp_path):
    """A folder that cannot be made is an error with the path."""
    (tmp_path / "a").write_text("")

    with pytest.raises(GoldenError, match=r"g\.jsonl: cannot be written"):
        write_bytes(tmp_path / "a" / "g.jsonl", b"", tmp_path / "locks")


def test_a_golden_can_be_removed(tmp_path):
    """Removing leaves nothing and may be repeated; what is no file is named."""
    path, locks = tmp_path / "golden" / "g.jsonl", tmp_path / "locks"
    write_bytes(path, b"x", locks)

    remove(path, locks)
    remove(path, locks)

    assert list(path.parent.iterdir()) == []
    path.mkdir()
    with pytest.raises(GoldenError, match=r"g\.jsonl: cannot be removed"):
        remove(path, locks)


def _write(path, locks, number):
    for _ in range(20):
        write_bytes(path, b"%d\n" % number * 1000, locks)


def test_two_writers_never_mix(tmp_path):
    """Concurrent writers leave the content of one of them."""
    path = tmp_path / "g.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_write, args=(path, tmp_path / "locks", number))
        for number in (1, 2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert path.read_bytes() in {b"%d\n" % n * 1000 for n in (1, 2)}


def test_temporary_files_are_not_goldens(tmp_path):
    """What a crash may leave is never taken for a variant."""
    (tmp_path / ".abc.tmp").write_text("")
    (tmp_path / f"{KEY}.jsonl").write_text("")

    assert list(variants_of(tmp_path, 0)) == [KEY]


@pytest.mark.parametrize(
    ("variants", "key", "expected", "same"),
    [
        ([KEY, OTHER_KEY], KEY, KEY, True),
        ([OTHER_KEY], KEY, OTHER_KEY, False),
        (["cuda-sm90", OTHER_KEY], KEY, OTHER_KEY, False),
        (["cuda-sm90"], KEY, "cuda-sm90", False),
        ([], KEY, "", False),
    ],
)
def test_the_variant_of_the_same_key_is_taken_first(
    tmp_path, variants, key, expected, same
):
    """The same key, else the same kind of device, else any."""
    for name in variants:
        (tmp_path / file_name(name, 0)).write_text("")

    choice = choose(tmp_path, key, 0)

    assert (choice.variant, choice.is_same_key) == (expected, same)
    assert (choice.path is None) == (not variants)


def test_ranks_have_files_of_their_own(tmp_path):
    """A rank's golden is not taken for another rank's."""
    for rank in (0, 1):
        (tmp_path / file_name(KEY, rank)).write_text("")

    assert choose(tmp_path, KEY, 1).path.name == f"{KEY}.rank1.jsonl"
    assert list(variants_of(tmp_path, 0)) == [KEY]
    assert choose(tmp_path, KEY, 2).path is None


def test_ranks_of_a_variant_are_found(tmp_path):
    """All ranks of a variant are listed in order, those of other variants not."""
    for rank in (10, 2, 0):
        (tmp_path / file_name(KEY, rank)).write_text("")
    for other in (OTHER_KEY, f"{KEY}-x", KEY.replace("-", "_")):
        (tmp_path / file_name(other, 1)).write_text("")

    ranks = ranks_of(tmp_path, KEY)

    assert list(ranks) == [0, 2, 10]
    assert ranks[10].name == f"{KEY}.rank10.jsonl"
    assert ranks_of(tmp_path / "no", KEY) == {}


def test_folders_follow_the_test(tmp_path):
    """The golden tree mirrors test files and test names."""
    folder = folder_of_test(tmp_path, "../tests/test_a.py", "TestB.test_c[x-1]")

    assert folder == tmp_path / "tests" / "test_a.py" / "TestB.test_c[x-1]"


@given(st.text(max_size=300), st.text(max_size=300))
def test_names_are_safe_and_distinct(a, b):
    """Any test name gives a folder name, and different names different folders."""
    first, second = safe_name(a), safe_name(b)

    assert first not in ("", ".", "..")
    assert "/" not in first
    assert "\0" not in first
    assert len(first) < 200
    assert (first == second) == (a == b)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("1", True), ("woodpecker", True), ("", False), ("false", False),
     ("0", False)],
)  # fmt: skip
def test_ci_is_recognised(monkeypatch, value, expected):
    """CI counts when it is set to something true."""
    monkeypatch.setenv("CI", value)

    assert is_ci() is expected


def test_update_modes():
    """New writes what is missing, failing what fails too, all what moved as well."""
    table = {
        mode: [
            s
            for s in ("missing", "fail", "incomparable", "changed", "pass")
            if is_written(mode, s)
        ]
        for mode in UPDATE_MODES
    }

    assert table == {
        "new": ["missing"],
        "failing": ["missing", "fail", "incomparable"],
        "all": ["missing", "fail", "incomparable", "changed"],
    }


def test_the_lock_of_a_golden_lies_outside_its_tree(tmp_path):
    """While a golden is locked no one else can lock it, and its folder stays empty."""
    path, locks = tmp_path / "golden" / "g.jsonl", tmp_path / "locks"
    path.parent.mkdir()

    with locked(path, locks):
        (lock,) = locks.iterdir()
        with pytest.raises(Timeout), FileLock(lock, timeout=0, is_singleton=False):
            pytest.fail("the lock was free")
        assert list(path.parent.iterdir()) == []

    with FileLock(lock, timeout=0, is_singleton=False):
        pass  # and it is free afterwards


def test_a_writer_waits_for_the_lock(tmp_path, monkeypatch):
    """A golden that someone else keeps locked is an error with its path."""
    path, locks = tmp_path / "golden" / "g.jsonl", tmp_path / "locks"
    write_bytes(path, b"old", locks)
    monkeypatch.setattr(store, "_LOCK_TIMEOUT_S", 0.01)

    with (
        locked(path, locks),
        pytest.raises(GoldenError, match=r"g\.jsonl: cannot be written"),
    ):
        write_bytes(path, b"new", locks)

    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["g.jsonl"]


def test_goldens_have_locks_of_their_own(tmp_path):
    """Writing one golden does not wait for another one's lock."""
    first, second = (tmp_path / "golden" / name for name in ("a.jsonl", "b.jsonl"))

    with locked(first, tmp_path / "locks"):
        write_bytes(second, b"x", tmp_path / "locks")

    assert second.read_bytes() == b"x"
