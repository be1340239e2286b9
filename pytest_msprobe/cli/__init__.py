# SPDX-License-Identifier: Apache-2.0
"""Floor 5: the command pytest-msprobe, without torch."""
