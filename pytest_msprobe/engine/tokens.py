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
from pytest_msprobe.engine.requests import RequestTable
from pytest_msprobe.model.segments import SampleRow, StepLayout

TOP = 20


@dataclass(slots=True)
class TokenLog:
    """Tokens of all requests of a capture."""

    _requests: dict[int, Request] = field(default_factory=dict)
    _rows: torch.Tensor | None = None
    _top: Any = None
    _samples: tuple[SampleRow, ...] = ()
    _sampled: torch.Tensor | None = None

    def begin_step(self) -> None:
        """Forgets what an unfinished step left."""
        self._rows = self._top = self._sampled = None
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

    def note_sampled(self, output: Any) -> None:
        """Keeps the ids from the sampler's output."""
        ids = getattr(output, "sampled_token_ids", None)
        if isinstance(ids, torch.Tensor):
            self._sampled = ids.detach().clone()

    def end_step(self, requests: RequestTable) -> None:
        """Adds the step's tokens to their requests."""
        if self._rows is None or self._sampled is None:
            return
        ids = self._sampled.reshape(len(self._sampled), -1)[:, :1].to(torch.int64)
        if len(ids) != len(self._samples):
            return
        chosen = self._rows.gather(1, ids.to(self._rows.device)).reshape(-1).tolist()
        top_ids, top_values = self._top.indices.tolist(), self._top.values.tolist()
        by_label = {known.label: known for known in requests.known.values()}
        for row, sample in enumerate(self._samples):
            if not sample.is_defined:
                continue
            known = by_label[sample.label]
            request = self._requests.setdefault(
                sample.label,
                Request(known.label, known.sha256, known.prompt_tokens),
            )
            request.tokens.append(int(ids[row, 0]))
            request.logprobs.append(_portable(chosen[row]))
            pairs = zip(top_ids[row], map(_portable, top_values[row]), strict=True)
            request.top.append([(int(i), v) for i, v in pairs])

    def requests(self, table: RequestTable) -> list[Request]:
        """All requests by label, those without a token included."""
        return [
            self._requests.get(known.label)
            or Request(known.label, known.sha256, known.prompt_tokens)
            for known in sorted(table.known.values(), key=lambda item: item.label)
        ]


def _portable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
