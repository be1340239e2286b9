# SPDX-License-Identifier: Apache-2.0
"""Floor 3: vLLM engines and what runs inside their workers."""
