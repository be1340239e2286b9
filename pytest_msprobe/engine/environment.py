# SPDX-License-Identifier: Apache-2.0
"""The hardware that decides the last bits (numerics key), and everything else around.

The key names the device kind, the instruction set in effect after caps, and the CPU
vendor or the SM. It never names a version: an upgrade is judged by same-key limits.
"""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from pytest_msprobe.compat import version_of, vllm_version
from pytest_msprobe.debugger.ranks import current_rank

_LEVELS = ("base", "avx2", "avx512", "avx512bf16", "amx")
_ONEDNN_CAPS = {
    "SSE41": "base",
    "AVX": "base",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512",
    "AVX512_CORE_BF16": "avx512bf16",
}
_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel", "HygonGenuine": "hygon"}


def _cpu_info() -> dict[str, str]:
    """First value of every key in /proc/cpuinfo, empty where there is none."""
    found: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return found
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _hardware_level(flags: set[str]) -> str:
    if "amx_tile" in flags:
        return "amx"
    if "avx512_bf16" in flags:
        return "avx512bf16"
    if "avx512f" in flags:
        return "avx512"
    return "avx2" if "avx2" in flags else "base"


def _torch_level() -> str:
    """What torch.cpu says the processor has: vLLM chooses its kernels by it."""
    checks = (
        ("amx", "_is_amx_tile_supported"),
        ("avx512bf16", "_is_avx512_bf16_supported"),
        ("avx512", "_is_avx512_supported"),
    )
    for level, name in checks:
        check = getattr(torch.cpu, name, None)
        if check is not None and check():
            return level
    return "avx2"


def _lower(a: str, b: str) -> str:
    return min(a, b, key=_LEVELS.index)


def instruction_set() -> str:
    """The instruction set that kernels may use after all caps.

    One name where torch, oneDNN and vLLM agree, else one name for each of them.
    """
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return "neon" if machine in ("aarch64", "arm64") else machine
    hardware = _hardware_level(set(_cpu_info().get("flags", "").split()))
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    onednn = _lower(hardware, _ONEDNN_CAPS.get(cap, hardware))
    vllm = _lower(hardware, _torch_level())
    capability = torch.backends.cpu.get_cpu_capability().upper()
    aten = hardware
    if capability == "AVX2":
        aten = _lower(hardware, "avx2")
    elif capability != "AVX512":
        aten = "base"
    if aten == onednn == vllm:
        return hardware if aten == hardware else aten
    return f"aten.{aten}-onednn.{onednn}-vllm.{vllm}"


def numerics_key(device_type: str) -> str:
    """The numerics key of a device kind here.

    Args:
        device_type: torch's name, e.g. `cpu` or `cuda`.

    Returns:
        E.g. `cpu-avx512bf16-amd`, `cuda-sm90`.
    """
    if device_type == "cuda":
        if torch.version.hip:
            name = torch.cuda.get_device_properties(0).gcnArchName
            return f"hip-{name.partition(':')[0]}"
        major, minor = torch.cuda.get_device_capability()
        return f"cuda-sm{major}{minor}"
    if device_type != "cpu":
        return device_type
    vendor = _cpu_info().get("vendor_id", "")
    return (
        f"cpu-{instruction_set()}-{_VENDORS.get(vendor, vendor.lower() or 'unknown')}"
    )


def numeric_probe(device: torch.device) -> str:
    """Hash of a few operations on fixed integers: moves when a kernel does.

    Args:
        device: Where to compute.

    Returns:
        16 hexadecimal digits.
    """
    total = hashlib.sha256()
    base = torch.arange(-960, 960, device=device).reshape(30, 64)
    weight = (torch.arange(64 * 48, device=device).reshape(48, 64) * 7919) % 257 - 128
    for dtype in (torch.bfloat16, torch.float32):
        x = (base.float() / 331).to(dtype)
        w = (weight.float() / 127).to(dtype)
        for result in (
            torch.nn.functional.linear(x, w),
            torch.exp(x),
            torch.softmax(x, dim=-1),
        ):
            data = result.detach().cpu().contiguous().view(torch.uint8)
            total.update(data.numpy().tobytes())
    return total.hexdigest()[:16]


def global_rank(vllm_config: Any) -> int:
    """Rank of this worker over all engine cores of a deployment.

    Args:
        vllm_config: vLLM's configuration.
    """
    parallel = vllm_config.parallel_config
    core = int(getattr(parallel, "data_parallel_rank", 0) or 0)
    rank = current_rank() or 0
    return core * int(parallel.world_size) + rank % int(parallel.world_size)


def provenance(runner: Any, device: torch.device) -> dict[str, Any]:
    """What made a capture: versions, backends, threads. Reported, never judged.

    Args:
        runner: vLLM's model runner.
        device: Device of the model.
    """
    info = _cpu_info()
    found: dict[str, Any] = {
        "pytest-msprobe": version_of("pytest-msprobe"),
        "vllm": vllm_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
        "attention": attention_backends(runner),
        "quantization": runner.vllm_config.model_config.quantization,
        "probe": numeric_probe(device),
        "threads": torch.get_num_threads(),
        **_custom_ops(runner),
        "cpu": info.get("model name", platform.machine()),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def _custom_ops(runner: Any) -> dict[str, list[str]]:
    """Which of vLLM's own kernels are switched off; empty where all are on."""
    compilation = runner.vllm_config.compilation_config
    chosen = [str(name) for name in getattr(compilation, "custom_ops", None) or ()]
    if "none" not in chosen:
        chosen = [name for name in chosen if name.startswith("-")]
    return {"custom_ops": sorted(chosen)} if chosen else {}


def attention_backends(runner: Any) -> list[str]:
    """Names of the attention backends in use, sorted."""
    names: set[str] = set()
    for groups in getattr(runner, "attn_groups", None) or ():
        for group in groups:
            backend = getattr(group, "backend", None)
            if backend is not None:
                names.add(str(backend.get_name()))
    return sorted(names)


def model_facts(runner: Any) -> dict[str, Any]:
    """What of a model decides whether two captures can be compared.

    Args:
        runner: vLLM's model runner.
    """
    config = runner.vllm_config
    model = config.model_config
    text = model.hf_config.get_text_config()
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    facts = {name: getattr(text, name) for name in names if hasattr(text, name)}
    facts["architecture"] = type(runner.get_model()).__name__
    facts["dtype"] = str(model.dtype).removeprefix("torch.")
    parallel = config.parallel_config
    facts["tensor_parallel"] = parallel.tensor_parallel_size
    facts["pipeline_parallel"] = parallel.pipeline_parallel_size
    return facts
