# SPDX-License-Identifier: Apache-2.0
"""Floor 0: plain records and names, shared by all."""
