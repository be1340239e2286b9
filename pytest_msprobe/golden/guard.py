# SPDX-License-Identifier: Apache-2.0
"""When goldens may be written."""

import os
from typing import Literal

UpdateMode = Literal["new", "failing", "all"]
UPDATE_MODES = ("new", "failing", "all")


def is_ci() -> bool:
    """Whether this runs in continuous integration: `CI` is set to something true."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


def is_written(mode: UpdateMode, status: str) -> bool:
    """Whether a test's golden is written.

    Args:
        mode: new writes missing ones, failing also those that fail, all also those
            that moved within their limits.
        status: Status of the verdict.
    """
    if status == "missing":
        return True
    if status in ("fail", "incomparable"):
        return mode in ("failing", "all")
    return mode == "all" and status == "changed"
