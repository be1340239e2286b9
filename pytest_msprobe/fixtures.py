# SPDX-License-Identifier: Apache-2.0
"""The fixtures `msprobe_engine` and `msprobe`."""

from typing import Any

import pytest

from pytest_msprobe.errors import MsprobeError
from pytest_msprobe.session import SESSION, Capture, MsprobeSession


class Msprobe:
    """Records and judges in one test."""

    def __init__(self, session: MsprobeSession, item: pytest.Item) -> None:
        self._session = session
        self._item = item

    def capture(self, llm: Any, name: str | None = None) -> Capture:
        """A context manager that records what an engine computes meanwhile.

        Args:
            llm: A `vllm.LLM`: the fixture's or one of your own.
            name: Name of the capture; a test's first one needs none.
        """
        return self._session.new_capture(self._item, llm, name)

    def check(self) -> None:
        """Judges every capture of this test that has not been judged yet.

        Captures that a test never checks are judged when its code has ended.

        Raises:
            Failed: pytest's failure, with the verdict as its message.
        """
        captures = self._session.state_of(self._item).captures
        if not captures:
            pytest.fail(
                "msprobe.check(): nothing was captured in this test", pytrace=False
            )
        for capture in captures:
            if not capture.is_checked:
                capture.check()


def _session(request: pytest.FixtureRequest) -> MsprobeSession:
    session = request.config.stash.get(SESSION, None)
    if session is None:  # refused at collection; here for fixtures asked for late
        message = (
            f"{request.node.nodeid} asks for a msprobe fixture without configuration"
        )
        raise pytest.UsageError(f"{message}; add --msprobe-config FILE")
    return session


@pytest.fixture
def msprobe(request: pytest.FixtureRequest) -> Msprobe:
    """Records and judges in this test: `capture(llm)` and `check()`."""
    return Msprobe(_session(request), request.node)


@pytest.fixture
def msprobe_engine(request: pytest.FixtureRequest) -> Any:
    """A real eager `vllm.LLM`, shared by tests with the same engine arguments.

    In a test that does not ask for `msprobe` as well, everything that the engine
    computes is recorded, and judged when the test's code has ended.
    """
    session = _session(request)
    try:
        llm = session.engine(request.node)
        if "msprobe" not in request.fixturenames:
            session.new_capture(request.node, llm, None).__enter__()
    except MsprobeError as error:
        pytest.fail(str(error), pytrace=False)
    return llm
