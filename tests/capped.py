# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (`-p capped`) that caps the instruction set to AVX2.

With ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 in the environment torch and
oneDNN take AVX2 kernels; vLLM asks torch.cpu which kernels it may take.
"""

ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def pytest_configure() -> None:
    """Caps what torch says of the processor; importing this module does nothing."""
    import torch

    def no() -> bool:
        return False

    torch.cpu._is_avx512_supported = no
    torch.cpu._is_avx512_bf16_supported = no
    torch.cpu._is_amx_tile_supported = no
