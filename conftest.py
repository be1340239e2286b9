# SPDX-License-Identifier: Apache-2.0
"""Settings of this repository's own tests."""

pytest_plugins = ["pytester"]
