# SPDX-License-Identifier: Apache-2.0
"""Sampled tokens and their log-probabilities, taken in the worker.

They do not depend on what the user's SamplingParams ask for: the id comes from the
sampler's output, the log-probability from the raw logits.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from pytest_msprobe.dump.capture import Request
from pytest_msprobe.engine.requests import KnownRequest, RequestTable
from pytest_msprobe.model.segments import SampleRow, StepLayout

TOP = 20


@dataclass(frozen=True, slots=True)
class _Step:
    """What was sampled in one step, on the device of the logits."""

    samples: tuple[SampleRow, ...]
    ids: torch.Tensor
    own: torch.Tensor
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor


# Hash of the prompt and tokens of each request of a capture, by label.
Followed = list[tuple[str, list[int]]]


@dataclass(slots=True)
class TokenLog:
    """Tokens of all requests of a capture.

    Attributes:
        followed: Requests whose tokens are fed back in place of those sampled.
    """

    followed: Followed = field(default_factory=list)
    _steps: list[_Step] = field(default_factory=list)
    _requests: dict[int, Request] = field(default_factory=dict)
    _rows: torch.Tensor | None = None
    _top: Any = None
    _samples: tuple[SampleRow, ...] = ()
    _sampled: torch.Tensor | None = None
    _own: torch.Tensor | None = None

    def begin_step(self) -> None:
        """Forgets what an unfinished step left."""
        self._rows = self._top = self._sampled = self._own = None
        self._samples = ()

    def note_logits(self, logits: Any, layout: StepLayout | None) -> None:
        """Keeps log-probabilities of the step's logits, the first ones that fit.

        Args:
            logits: (samples, vocabulary), any float dtype, before any processor.
            layout: Rows of the step.
        """
        if layout is None or self._rows is not None:
            return
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:  # noqa: PLR2004
            return
        if logits.shape[0] != len(layout.samples):
            return
        self._rows = torch.log_softmax(logits.detach().float(), dim=-1)
        self._top = torch.topk(self._rows, min(TOP, self._rows.shape[1]), dim=-1)
        self._samples = layout.samples

    def note_sampled(self, ids: Any, table: RequestTable) -> None:
        """Keeps sampled ids, and replaces them by those of a capture to be followed.

        Args:
            ids: (samples, tokens a sample), integers.
            table: Requests of this capture.
        """
        if isinstance(ids, torch.Tensor):
            self._sampled = ids.detach().clone()
            if self.followed:
                self._own = self._sampled
                self._feed(ids, table)
                self._sampled = ids.detach().clone()

    def _feed(self, ids: torch.Tensor, table: RequestTable) -> None:
        """Writes the followed tokens over the sampled ones, in place."""
        if len(ids) != len(self._samples):
            return
        known = {item.label: item.sha256 for item in table.known.values()}
        rows, tokens = [], []
        for row, sample in enumerate(self._samples):
            number = sample.position - (sample.prompt_tokens - 1)
            if not sample.is_defined or sample.label >= len(self.followed):
                continue
            sha256, theirs = self.followed[sample.label]
            if sha256 == known[sample.label] and 0 <= number < len(theirs):
                rows.append(row)
                tokens.append(theirs[number])
        if rows:
            values = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
            ids.view(len(ids), -1)[torch.tensor(rows, device=ids.device), 0] = values

    def end_step(self) -> None:
        """Keeps the step's tokens, on their device until they are asked for."""
        if self._rows is None or self._sampled is None:
            return
        ids = self._sampled.reshape(len(self._sampled), -1)[:, :1].to(torch.int64)
        own = ids
        if self._own is not None:
            own = self._own.reshape(len(self._own), -1)[:, :1].to(torch.int64)
        if len(ids) != len(self._samples):
            return
        chosen = self._rows.gather(1, ids.to(self._rows.device))
        self._steps.append(
            _Step(self._samples, ids, own, chosen, self._top.indices, self._top.values)
        )

    def _add(self, step: _Step, known: dict[int, KnownRequest]) -> None:
        ids, chosen = step.ids.reshape(-1).tolist(), step.chosen.reshape(-1).tolist()
        own = step.own.reshape(-1).tolist()
        top_ids, top_values = step.top_ids.tolist(), step.top_values.tolist()
        for row, sample in enumerate(step.samples):
            if not sample.is_defined:
                continue
            request = self._requests.setdefault(
                sample.label, _empty_request(known[sample.label])
            )
            request.tokens.append(int(ids[row]))
            request.own.append(int(own[row]))
            request.logprobs.append(_portable(chosen[row]))
            pairs = zip(top_ids[row], map(_portable, top_values[row]), strict=True)
            request.top.append([(int(i), v) for i, v in pairs])

    def requests(self, table: RequestTable) -> list[Request]:
        """All requests by label, those without a token included."""
        known = {item.label: item for item in table.known.values()}
        for step in self._steps:
            self._add(step, known)
        self._steps.clear()
        for request in self._requests.values():
            if request.own == request.tokens:
                request.own = []
        return [
            self._requests.get(label) or _empty_request(known[label])
            for label in sorted(known)
        ]


def _empty_request(known: KnownRequest) -> Request:
    prompt = [int(token) for token in known.prompt]
    return Request(known.label, known.sha256, known.prompt_tokens, prompt=prompt)


def _portable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
