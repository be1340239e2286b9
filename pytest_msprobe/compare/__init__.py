# SPDX-License-Identifier: Apache-2.0
"""Floor 2: judges two captures, without torch."""
