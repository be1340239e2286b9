# SPDX-License-Identifier: Apache-2.0
"""Attaches a recorder to a model runner's instance for the time of a capture.

A step opens with an execute_model that schedules tokens and closes when its
sample_tokens returns, when execute_model returns something else than None, or with an
exception. Only attributes of the instance are replaced, and all are put back. What
differs between vLLM's two model runners is in runner_v1.py and runner_v2.py.
"""

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pytest_msprobe.compat import vllm_version
from pytest_msprobe.config.settings import ALL_STEPS
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.debugger.writes import Replacements
from pytest_msprobe.engine.experts import add_choices, remove_choices
from pytest_msprobe.engine.kv_cache import add_readers, remove_readers
from pytest_msprobe.engine.preflight import check_engine
from pytest_msprobe.engine.requests import RequestTable, is_real_step
from pytest_msprobe.engine.shards import places_of
from pytest_msprobe.engine.tokens import TokenLog
from pytest_msprobe.errors import EngineError
from pytest_msprobe.model.segments import StepLayout


class Attachment(ABC):
    """The recorder's hooks on one model runner.

    Attributes:
        runner: The model runner.
        recorder: Where steps are recorded.
        requests: Requests seen in this capture.
        tokens: What was sampled.
        recorded_steps: Steps recorded so far.
        next_step: Number of the step that comes next.
        on_step: Called when a recorded step has ended.
        has_end: Whether recording ends with the requests that it began with.
    """

    def __init__(
        self,
        runner: Any,
        recorder: Recorder,
        *,
        decode_steps: int = ALL_STEPS,
        first_step: int = 0,
    ) -> None:
        self.runner = runner
        self.recorder = recorder
        self.requests = RequestTable()
        self.tokens = TokenLog()
        self.recorded_steps = 0
        self._decode_steps = decode_steps
        self.next_step = first_step
        self.on_step: Callable[[], None] | None = None
        self.has_end = False
        self._is_open = False
        self._replacements = Replacements()
        self._cached: list[torch.nn.Module] = []
        self._routed: list[torch.nn.Module] = []

    def install(self, *, has_execute: bool = True, has_choices: bool = False) -> None:
        """Puts the hooks on.

        Args:
            has_execute: Whether execute_model is replaced too; else the caller runs
                it through `around_execute`.
            has_choices: Whether the experts that routers choose are rows.

        Raises:
            EngineError: The runner lacks a method that every known vLLM has, or what
                it computes cannot be captured.
        """
        check_engine(self.runner.vllm_config)
        for name in ("execute_model", "get_model"):
            if not callable(getattr(self.runner, name, None)):
                message = (
                    f"{type(self.runner).__name__} of vLLM {vllm_version()} has no "
                    f"{name}"
                )
                hint = "this vLLM is not supported; see docs/vllm.md"
                raise EngineError(message, slug="runner", hint=hint)
        model = self.runner.get_model()
        self.recorder.collector.places = places_of(model)
        if self.recorder.config.kv_cache:
            collector = self.recorder.collector
            self._cached = add_readers(model, collector, self.replace)
        if has_choices:
            collector = self.recorder.collector
            self._routed = add_choices(model, collector, self.replace)
        self.recorder.attach(model)
        self.recorder.collector.set_opaque(self._cache_addresses())
        if has_execute:
            self.replace(self.runner, "execute_model", self.around_execute)
        if callable(getattr(self.runner, "sample_tokens", None)):
            self.replace(self.runner, "sample_tokens", self.closing)
        if callable(getattr(model, "compute_logits", None)):
            self.replace(model, "compute_logits", self._compute_logits)
        self.install_own()

    @abstractmethod
    def install_own(self) -> None:
        """Puts the hooks on that only this kind of runner has."""

    @abstractmethod
    def begin_own_step(self) -> None:
        """A step begins: forgets what the last one left."""

    @abstractmethod
    def row_order(self) -> Sequence[str] | None:
        """Ids of the open step's requests in row order; None where unknown."""

    def remove(self) -> None:
        """Takes the hooks off, in reverse order."""
        self._replacements.remove()
        remove_readers(self._cached)
        remove_choices(self._routed)

    def replace(
        self, owner: Any, name: str, hook: Callable[..., Callable[..., Any]]
    ) -> None:
        """Replaces a method of an instance until the hooks are taken off."""
        original = getattr(owner, name)
        self._replacements.put(owner, name, functools.wraps(original)(hook(original)))

    def _cache_addresses(self) -> frozenset[int]:
        """First bytes of the KV caches' storages."""
        found: set[int] = set()
        pending: list[Any] = [getattr(self.runner, "kv_caches", None)]
        while pending:
            item = pending.pop()
            if isinstance(item, torch.Tensor):
                if item.numel():
                    found.add(item.untyped_storage().data_ptr())
            elif isinstance(item, list | tuple):
                pending.extend(item)
            elif isinstance(item, dict):
                pending.extend(item.values())
        return frozenset(found)

    # Hooks ---------------------------------------------------------------------

    def around_execute(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A hook for execute_model, which begins a step and may end it."""

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            scheduled = args[0] if args else kwargs.get("scheduler_output")
            if not is_real_step(scheduled, kwargs):
                return original(*args, **kwargs)
            if not self._open(scheduled):
                return original(*args, **kwargs)
            try:
                with self.recorder.recording:
                    result = original(*args, **kwargs)
            except BaseException:
                self._drop()
                raise
            if result is not None:
                self._close()
            return result

        return execute_model

    def closing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A hook for the method that ends a step: sample_tokens, or pool."""

        def last(*args: Any, **kwargs: Any) -> Any:
            if not self._is_open:
                return original(*args, **kwargs)
            try:
                with self.recorder.recording:
                    self.recorder.collector.set_phase("sample")
                    result = original(*args, **kwargs)
            except BaseException:
                self._drop()
                raise
            self._close()
            return result

        return last

    def _compute_logits(self, original: Callable[..., Any]) -> Callable[..., Any]:
        collector = self.recorder.collector

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            if not collector.is_recording:
                return original(*args, **kwargs)
            before = collector.measurer.phase
            collector.set_phase("logits")
            try:
                logits = original(*args, **kwargs)
            finally:
                collector.set_phase(before)
            try:
                with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                    self.tokens.note_logits(logits, collector.layout)
            except Exception as error:  # noqa: BLE001 - never into the model
                collector.fail(error)
            return logits

        return compute_logits

    def note_sampled(self, ids: Any) -> None:
        """Keeps the ids that a sampler gave.

        Args:
            ids: (samples, tokens a sample), integers.
        """
        collector = self.recorder.collector
        if not collector.is_recording:
            return
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                self.tokens.note_sampled(ids, self.requests)
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)

    # Steps ---------------------------------------------------------------------

    def _open(self, scheduled: Any) -> bool:
        """Begins a step; returns whether it is to be recorded."""
        collector = self.recorder.collector
        if self._is_open:  # its sample_tokens was never called
            self._drop()
        if collector.error is not None:
            return False
        try:
            self.requests.begin_step(scheduled)
            self.tokens.begin_step()
            number = self.next_step
            self.next_step += 1
            wanted = self.recorder.config.step
            if wanted and number not in wanted:
                return False
            behind = self.requests.decode_steps_behind()
            if self._decode_steps != ALL_STEPS and behind > self._decode_steps:
                return False
            if self.has_end and self.recorder.estimate is None:
                self.recorder.expected_steps = self._expected_steps()
            self.recorder.begin_step(
                number,
                layout_source=self._layout,
                frame=sys._getframe(2),  # noqa: SLF001 - stacks end at the caller
            )
            self.begin_own_step()
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)
            return False
        self._is_open = True
        return True

    def _expected_steps(self) -> int:
        """Steps that the requests seen so far will need, 0 where that is unknown."""
        steps = self.requests.longest_answer()
        if self._decode_steps != ALL_STEPS:
            steps = min(steps, 1 + self._decode_steps)
        wanted = self.recorder.config.step
        return min(steps, len(wanted)) if wanted else steps

    def _close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        collector = self.recorder.collector
        try:
            self.tokens.end_step()
            self.recorder.end_step()
            self.recorded_steps += 1
            if self.on_step is not None:
                self.on_step()
        except Exception as error:  # noqa: BLE001 - never into the model
            collector.fail(error)

    def _drop(self) -> None:
        """Forgets the open step: it has not come to its end."""
        if self._is_open:
            self._is_open = False
            self.tokens.begin_step()
            self.recorder.drop_step()

    def _layout(self, padded_tokens: int | None) -> StepLayout | None:
        """Rows of the open step; called once the runner has settled the order."""
        order = self.row_order()
        if order is None:
            return None
        return self.requests.layout(list(order), padded_tokens)
