# SPDX-License-Identifier: Apache-2.0
"""What runs on this machine and what will not, without starting an engine.

Run as a program it prints its report as JSON, so that the command line can ask for it
without importing torch itself.
"""

import contextlib
import json
import os
import shutil
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pytest_msprobe.compat import has_module, missing_message, version_of, vllm_version
from pytest_msprobe.engine.preflight import (
    GROUP,
    LEAST_FREE_BYTES,
    PLUGIN,
    environment_problems,
)

_OVERRIDES = "vllm.env_override"
# From this version on vLLM takes model runner V2 where it can.
_FIRST_V2 = (0, 25)


def runner_choice(
    version: str, *, has_triton: bool, requested: str | None
) -> tuple[str, str]:
    """Which model runner vLLM will take, and why.

    Args:
        version: Of vLLM.
        has_triton: Whether Triton can compile for the device.
        requested: Value of VLLM_USE_V2_MODEL_RUNNER.
    """
    if requested is not None:
        kind = "V2" if requested.strip().lower() in ("1", "true") else "V1"
        return kind, f"VLLM_USE_V2_MODEL_RUNNER={requested}"
    if not has_triton:
        return "V1", "V2 needs Triton, which has no backend for this device"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _FIRST_V2:
        return "V1", f"vLLM {version} takes V2 only on request"
    return "V2", "for models and features that V2 supports, else V1"


def report(folder: Path) -> dict[str, Any]:
    """All findings: `facts`, name to text, and `problems`, one line each.

    Args:
        folder: Where dumps would be written.
    """
    facts: dict[str, str] = {
        "pytest-msprobe": version_of("pytest-msprobe") or "not installed",
        "python": sys.version.split()[0],
    }
    problems: list[str] = []
    for name in ("torch", "vllm"):
        if not has_module(name):
            facts[name] = "missing"
            problems.append("; ".join(missing_message(name)))
    if not problems:
        _describe_vllm(facts, problems)
    installed = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    facts["entry point"] = installed.get(PLUGIN, "not installed")
    facts["VLLM_PLUGINS"] = os.environ.get("VLLM_PLUGINS", "not set: all plugins load")
    facts["CI"] = os.environ.get("CI") or "not set: goldens may be updated"
    free = shutil.disk_usage(folder).free
    facts["free disk"] = f"{free / 2**30:.1f} GiB in {folder}"
    if free < LEAST_FREE_BYTES:
        problems.append(f"{folder}: {free} bytes free; free space before capturing")
    if not os.access(folder, os.W_OK):
        problems.append(f"{folder}: cannot be written; set capture.dump_path")
    if not sys.platform.startswith("linux"):
        problems.append(f"{sys.platform}: vLLM runs on Linux")
    return {"facts": facts, "problems": problems}


def _describe_vllm(facts: dict[str, str], problems: list[str]) -> None:
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    from pytest_msprobe.engine.environment import numerics_key

    version = vllm_version() or "0"
    device = str(current_platform.device_type or "none")
    facts["torch"] = str(torch.__version__)
    facts["vllm"] = version
    facts["platform"] = device
    if device == "cuda":
        facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    kind, reason = runner_choice(
        version,
        has_triton=bool(HAS_TRITON),
        requested=os.environ.get("VLLM_USE_V2_MODEL_RUNNER"),
    )
    facts["model runner"] = f"{kind}: {reason}"
    facts["attention"] = _attention(device)
    if device in ("cpu", "cuda"):
        facts["numerics key"] = numerics_key(device)
    else:
        problems.append(f"{device}: vLLM has found no device that it supports here")
    problems.extend(
        str(problem)
        for problem in environment_problems(device=device, has_triton=bool(HAS_TRITON))
    )


def _attention(device: str) -> str:
    wanted = os.environ.get("VLLM_ATTENTION_BACKEND")
    if wanted:
        return f"{wanted} (VLLM_ATTENTION_BACKEND)"
    return {"cpu": "CPU_ATTN"}.get(device, "chosen by vLLM for the model")


def main() -> int:
    """Prints the report as JSON; for a process of its own, in which no engine runs."""
    # What vLLM changes in torch's compiler takes most of its import's time, and tells
    # nothing here.
    sys.modules.setdefault(_OVERRIDES, ModuleType(_OVERRIDES))
    warnings.simplefilter("ignore")
    # What vLLM prints while it looks around is no part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        found = report(Path.cwd())
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
