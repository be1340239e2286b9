# SPDX-License-Identifier: Apache-2.0
"""Floor 1: what a user asks for."""
