# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner V1 (`vllm.v1.worker.gpu_model_runner`), on the CPU as well.

The logits are computed in execute_model. The rows of a step follow the persistent
batch, which is settled when the model's forward starts.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pytest_msprobe.engine.attach import Attachment


class RunnerV1(Attachment):
    """Hooks on a runner of the first kind."""

    def install_own(self) -> None:
        """Sees the sampler's output."""
        sampler = getattr(self.runner, "sampler", None)
        if callable(getattr(sampler, "forward", None)):
            self.replace(sampler, "forward", self._sample)

    def begin_own_step(self) -> None:
        """Nothing is left of the last step: the batch is the runner's."""

    def row_order(self) -> Sequence[str] | None:
        """Ids in the order of the persistent batch."""
        batch = getattr(self.runner, "input_batch", None)
        order = getattr(batch, "req_ids", None)
        return None if order is None else list(order)

    def _sample(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            self.note_sampled(getattr(output, "sampled_token_ids", None))
            return output

        return forward
