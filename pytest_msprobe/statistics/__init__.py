# SPDX-License-Identifier: Apache-2.0
"""Floor 1: the numbers of a tensor."""
