# SPDX-License-Identifier: Apache-2.0
"""Floor 2: records what a model computes."""
