# SPDX-License-Identifier: Apache-2.0
"""Floor 1: files of a capture."""
