# SPDX-License-Identifier: Apache-2.0
"""The fixtures `msprobe_engine` and `msprobe`."""

from typing import Any

import pytest

from pytest_msprobe.session import SESSION, Capture, MsprobeSession


class Msprobe:
    """Records and judges in one test."""

    def __init__(self, session: MsprobeSession, item: pytest.Item) -> None:
        self._session = session
        self._item = item

    def capture(
        self, llm: Any, name: str | None = None, *, follow: Capture | None = None
    ) -> Capture:
        """A context manager that records what an engine computes meanwhile.

        A test's first one discards what `msprobe_engine` has recorded automatically.

        Args:
            llm: A `vllm.LLM`: the fixture's or one of your own.
            name: Name of the capture; a test's first one needs none.
            follow: Another capture of this test, with the same prompts, whose tokens
                are fed back in place of those that are sampled.
        """
        return self._session.new_capture(self._item, llm, name, follow=follow)

    def record(
        self,
        prompts: Any,
        sampling: Any,
        *,
        engine: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        python: str | None = None,
        name: str | None = None,
        follow: Capture | None = None,
    ) -> Capture:
        """Records a generation by an engine in a process of its own, which then ends.

        For A against B: two configurations, or two environments.

        Args:
            prompts: Of `LLM.generate`: a text, or a list of texts or of dicts with
                `prompt_token_ids`.
            sampling: `SamplingParams`, or a dict of its fields.
            engine: Engine arguments on top of the configuration's and the marker's.
            env: Variables that the process has from its start.
            python: Interpreter of another virtual environment with vLLM;
                pytest-msprobe need not be installed there.
            name: Name of the capture; a test's first one needs none.
            follow: Another capture of this test whose tokens are fed back.

        Raises:
            EngineError: The process failed; the message holds its last lines.
        """
        return self._session.record(
            self._item,
            prompts,
            sampling,
            engine=engine,
            env=env,
            python=python,
            name=name,
            follow=follow,
        )

    def check(self, *, tolerances: Any = None) -> None:
        """Judges every capture of this test that has not been judged yet.

        Captures that a test never checks are judged when its code has ended.

        Args:
            tolerances: Limits or rules on top of the marker's, as there.

        Raises:
            Failed: pytest's failure, with the verdict as its message.
        """
        captures = self._session.state_of(self._item).captures
        if not captures:
            pytest.fail(
                "msprobe.check(): nothing was captured in this test", pytrace=False
            )
        for capture in captures:
            if capture.is_automatic:
                capture.close()
            if not capture.is_checked:
                capture.check(tolerances=tolerances)


def _session(request: pytest.FixtureRequest) -> MsprobeSession:
    session = request.config.stash.get(SESSION, None)
    if session is None:  # refused at collection; here for fixtures asked for late
        message = (
            f"{request.node.nodeid} asks for a msprobe fixture and there is no "
            "configuration; add --msprobe-config FILE"
        )
        pytest.fail(message, pytrace=False)
    session.state_of(request.node)
    return session


@pytest.fixture
def msprobe(request: pytest.FixtureRequest) -> Msprobe:
    """Records and judges in this test: `capture(llm)` and `check()`.

    A test that asks for it, itself or through another fixture, and passes without
    having recorded anything fails.
    """
    return Msprobe(_session(request), request.node)


@pytest.fixture
def msprobe_engine(request: pytest.FixtureRequest) -> Any:
    """A real eager `vllm.LLM`, shared by tests with the same engine arguments.

    Everything that it computes from here on is recorded, and judged when the test's
    code has ended; unless the test captures: its first `msprobe.capture(...)`, on
    whatever engine, discards that recording, and only what the test captures is
    judged. Merely asking for `msprobe` changes nothing.
    """
    session = _session(request)
    llm = session.engine(request.node)
    session.record_automatically(request.node, llm)
    return llm
