# SPDX-License-Identifier: Apache-2.0
"""Floor 3: reviewed captures in the repository, without torch."""
