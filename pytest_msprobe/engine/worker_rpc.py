# SPDX-License-Identifier: Apache-2.0
"""Control of captures inside a vLLM worker, by strings and JSON.

One method is attached to the worker object. It never raises (with tensor parallelism a
raising RPC leaves stale replies behind) and returns small JSON; data goes to files.
"""

import json
import os
import traceback
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig, config_from_json
from pytest_msprobe.config.settings import ALL_STEPS
from pytest_msprobe.debugger.assemble import assemble
from pytest_msprobe.debugger.progress import Progress
from pytest_msprobe.debugger.ranks import current_rank
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.dump import capture
from pytest_msprobe.engine.attach import Attachment
from pytest_msprobe.engine.environment import model_facts, numerics_key, provenance
from pytest_msprobe.engine.faults import PROGRESS
from pytest_msprobe.engine.plants import Planter
from pytest_msprobe.engine.runners import attachment_for, runner_version
from pytest_msprobe.engine.weights import weight_fingerprints
from pytest_msprobe.errors import CaptureError, MsprobeError

if TYPE_CHECKING:
    from collections.abc import Callable

METHOD = "msprobe_control"


class WorkerControl:
    """Starts and stops captures in one worker process."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._attachment: Attachment | None = None
        self._folder: Path | None = None
        self._weights: dict[str, dict[str, str]] | None = None
        self._planter = Planter(
            lambda: self._worker.model_runner.get_model(),  # noqa: PLW0108 - loaded later
            lambda: self._attachment is None,
        )

    def control(self, payload: str) -> dict[str, Any]:
        """Carries out one action; the reply always has the key `ok`.

        Args:
            payload: JSON with `action` (start, stop, abandon, status; of the doctor
                survey, plant, unplant) and its arguments.
        """
        try:
            request = json.loads(payload)
            actions: dict[str, Callable[..., dict[str, Any]]] = {
                "start": self._start,
                "stop": self._stop,
                "abandon": self._abandon,
                "status": self._status,
                "survey": self._planter.survey,
                "plant": self._planter.plant,
                "unplant": self._planter.unplant,
            }
            action = actions[request.pop("action")]
            return {"ok": True, **action(**request)}
        except MsprobeError as error:
            return {"ok": False, "error": str(error), "slug": error.slug}
        except Exception as error:  # noqa: BLE001 - an RPC never raises
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            text = f"{type(error).__name__}: {error} ({place})"
            return {"ok": False, "error": text, "slug": "worker"}

    def _status(self) -> dict[str, Any]:
        runner = self._worker.model_runner
        attachment = self._attachment
        return {
            "rank": current_rank() or 0,
            "pid": os.getpid(),
            "runner": type(runner).__name__,
            "runner_version": runner_version(runner),
            "key": numerics_key(torch.device(runner.device).type),
            "capturing": attachment is not None,
            "steps": attachment.recorded_steps if attachment else 0,
        }

    def _start(
        self,
        config: dict[str, Any],
        folder: str,
        decode_steps: int = ALL_STEPS,
        client: int | None = None,
        follow: list[tuple[str, list[int]]] | None = None,
    ) -> dict[str, Any]:
        """Starts a capture.

        Args:
            config: A `DebuggerConfig` as JSON.
            folder: Where the files go.
            decode_steps: Decode steps behind the prefill to record.
            client: Number of the test's process. Where that is another one, each
                step is written at once, so that it outlives this process.
            follow: Prompt hash and tokens of each request of another capture, by
                label, which are fed back in place of what is sampled.
        """
        if self._attachment is not None:
            message = "a capture is already running on this engine"
            raise CaptureError(message, slug="double-start", hint="end it first")
        debugger_config = config_from_json(config)
        rank = current_rank() or 0
        wanted = debugger_config.rank
        if wanted and rank not in wanted:
            return {"rank": rank, "recording": False}
        self._folder = Path(folder)
        is_alone = client is not None and client != os.getpid()
        recorder = Recorder(
            debugger_config,
            self._folder,
            rank=rank,
            is_kept=True,
            is_deferred=not is_alone,
            has_gradients=False,
        )
        if is_alone:
            path = self._folder / PROGRESS.format(rank=rank)
            recorder.collector.progress = Progress(path)
        attachment = attachment_for(
            self._worker.model_runner, recorder, decode_steps=decode_steps
        )
        attachment.tokens.followed = list(follow or ())
        attachment.has_end = True
        try:
            attachment.install(has_choices=debugger_config.has_modules)
        except BaseException:
            attachment.remove()
            recorder.abandon()
            raise
        self._attachment = attachment
        return {"rank": rank, "recording": True}

    def _abandon(self, folder: str) -> dict[str, Any]:
        """Ends the capture that writes into a folder; its capture file is not made."""
        attachment = self._attachment
        if attachment is None or self._folder != Path(folder):
            return {"recording": False}
        self._attachment = None
        attachment.remove()
        attachment.recorder.abandon()
        return {"recording": True}

    def _stop(self, test: str = "") -> dict[str, Any]:
        rank = current_rank() or 0
        attachment, self._attachment = self._attachment, None
        if attachment is None:
            return {"rank": rank, "recording": False}
        attachment.remove()
        recorder = attachment.recorder
        steps = recorder.close()
        assert self._folder is not None
        assembly = assemble(steps, recorder.collector.model_dimensions)
        header = self._header(attachment, test, rank)
        header.left_out = dict(assembly.left_out)
        path = self._folder / capture.FILE_NAME.format(rank=rank)
        data = capture.encode(header, assembly.lines)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
        return {
            "rank": rank,
            "recording": True,
            "file": str(path),
            "steps": attachment.recorded_steps,
            "rows": assembly.rows,
            "measured": recorder.collector.measurer.measured_rows,
            "bytes": recorder.bytes_written,
        }

    def _header(self, attachment: Attachment, test: str, rank: int) -> capture.Header:
        runner, recorder = attachment.runner, attachment.recorder
        model = runner.get_model()
        device = next(
            (p.device for p in model.parameters()), torch.device(runner.device)
        )
        made_by = provenance(runner, device)
        made_by["statistics"] = sorted(recorder.backend_reasons().values())
        if attachment.tokens.followed:
            made_by[capture.FORCED] = True
        parallel = runner.vllm_config.parallel_config
        if self._weights is None:  # of the checkpoint, which does not change
            self._weights = weight_fingerprints(runner) if rank == 0 else {}
        return capture.Header(
            msprobe=capture.FORMAT,
            kind="capture",
            test=test,
            rank=rank,
            world=parallel.world_size,
            key=numerics_key(device.type),
            signature=signature(recorder.config, model_facts(runner)),
            provenance=made_by,
            requests=attachment.tokens.requests(attachment.requests),
            weights=self._weights,
        )


def signature(config: DebuggerConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two captures to be comparable.

    Args:
        config: What was recorded.
        facts: Of the model.
    """
    names = ("task", "level", "scope", "names", "data_mode", "step", "risk_level")
    values = asdict(config)
    selection = {name: values[name] for name in names}
    if not config.has_functions:
        del selection["risk_level"]
    return {**selection, "model": facts}


_WORKERS: weakref.WeakSet[Any] = weakref.WeakSet()


def attach_control(wrapper: Any) -> None:
    """Gives a worker the control method.

    Args:
        wrapper: vLLM's WorkerWrapperBase, which calls from outside go to.
    """
    worker = wrapper.worker
    control = WorkerControl(worker).control
    worker.__dict__[METHOD] = wrapper.__dict__[METHOD] = control
    _WORKERS.add(worker)


def live_workers() -> weakref.WeakSet[Any]:
    """Workers in this process that have the control method, and have not ended."""
    return _WORKERS
