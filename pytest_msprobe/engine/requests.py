# SPDX-License-Identifier: Apache-2.0
"""From vLLM's scheduler output to labels, prompts and row layouts.

Nothing here imports vLLM: the objects are read by the attributes that are the same in
all versions from 0.11 on.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.segments import RequestRows, SampleRow, StepLayout

_WARM_UP_PREFIXES = ("_warmup_", "_v2_mixed_warmup")


def prompt_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 of a prompt's token ids, each as 8 little-endian bytes."""
    words = array("q", token_ids)
    return hashlib.sha256(words.tobytes()).hexdigest()


def is_real_step(scheduler_output: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of execute_model computes tokens of a user's requests.

    Empty steps, dummy runs and the warm-up's hand-built requests do not.
    """
    if kwargs.get("dummy_run") or kwargs.get("is_profile"):
        return False
    if not getattr(scheduler_output, "total_num_scheduled_tokens", 0):
        return False
    names = scheduler_output.num_scheduled_tokens
    return not any(str(name).startswith(_WARM_UP_PREFIXES) for name in names)


@dataclass(slots=True)
class KnownRequest:
    """A request that has been scheduled in this capture.

    Attributes:
        label: Number in order of first scheduling.
        prompt_tokens: Length of the prompt.
        sha256: Hash of the prompt.
        prompt: Token ids of the prompt, empty where they are not known.
        most_tokens: Tokens that may be generated, 0 where that is not known.
    """

    label: int
    prompt_tokens: int
    sha256: str
    prompt: tuple[int, ...] = ()
    most_tokens: int = 0


@dataclass(slots=True)
class RequestTable:
    """Requests of a capture by vLLM's id, and where they stand in the open step."""

    known: dict[str, KnownRequest] = field(default_factory=dict)
    _position: dict[str, int] = field(default_factory=dict)
    _scheduled: dict[str, int] = field(default_factory=dict)

    def begin_step(self, scheduler_output: Any) -> None:
        """Notes what a step schedules; requests seen first get the next labels.

        Raises:
            CaptureError: A request has encoder inputs (images, audio), be they
                computed in this step or kept from an earlier one.
        """
        if getattr(scheduler_output, "scheduled_encoder_inputs", None) or any(
            getattr(new, "mm_features", None)
            for new in scheduler_output.scheduled_new_reqs
        ):
            message = "a request has encoder inputs (images, audio)"
            hint = "this version captures requests of text only; leave them out"
            raise CaptureError(message, slug="encoder-inputs", hint=hint)
        self._scheduled = dict(scheduler_output.num_scheduled_tokens)
        self._position = {}
        for new in scheduler_output.scheduled_new_reqs:
            self._position[new.req_id] = int(new.num_computed_tokens)
            if new.req_id not in self.known:
                prompt = getattr(new, "prompt_token_ids", None)
                embeds = getattr(new, "prompt_embeds", None)
                length = len(prompt) if prompt is not None else len(embeds or ())
                ids = tuple(prompt or ())
                sampling = getattr(new, "sampling_params", None)
                most = int(getattr(sampling, "max_tokens", None) or 0)
                self.known[new.req_id] = KnownRequest(
                    len(self.known), length, prompt_hash(ids), ids, most
                )
        cached = scheduler_output.scheduled_cached_reqs
        for name, computed in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        ):
            self._position[name] = int(computed)
            # Scheduled before the capture began: its prompt is not known here.
            self.known.setdefault(
                name, KnownRequest(len(self.known), int(computed), "")
            )

    def longest_answer(self) -> int:
        """Most tokens that a request of this capture may generate, 0 if unknown."""
        return max((request.most_tokens for request in self.known.values()), default=0)

    def decode_steps_behind(self) -> int:
        """Fewest decode steps behind its prefill of any request in the open step."""
        behind = [
            self._position[name] + count - self.known[name].prompt_tokens
            for name, count in self._scheduled.items()
        ]
        return max(0, min(behind, default=0))

    def layout(self, order: Sequence[str], padded_tokens: int | None) -> StepLayout:
        """Rows of the open step.

        Args:
            order: Ids in row order; those that are not scheduled are skipped.
            padded_tokens: Rows of the model's inputs, None where unknown.
        """
        requests: list[RequestRows] = []
        samples: list[SampleRow] = []
        first_row = 0
        for name in order:
            rows = self._scheduled.get(name, 0)
            if not rows:
                continue
            request = self.known[name]
            position = self._position[name]
            prompt = request.prompt_tokens
            requests.append(
                RequestRows(request.label, first_row, rows, position, prompt)
            )
            last = position + rows - 1
            samples.append(
                SampleRow(request.label, last, prompt, is_defined=last >= prompt - 1)
            )
            first_row += rows
        padded = max(padded_tokens or first_row, first_row)
        return StepLayout(first_row, padded, tuple(requests), tuple(samples))
