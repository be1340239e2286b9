# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner V2 (`vllm.v1.worker.gpu.model_runner`).

The logits are computed in sample_tokens. The batch of a step is what prepare_inputs
returns; it is put on the runner only after the forward, so it is taken there. Pooling
ends a step with `pool` in place of sample_tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pytest_msprobe.engine.attach import Attachment

MODULE = "vllm.v1.worker.gpu.model_runner"


class RunnerV2(Attachment):
    """Hooks on a runner of the second kind."""

    _batch: Any = None

    def install_own(self) -> None:
        """Sees the batch, what was sampled, and the end of pooling steps."""
        self.replace(self.runner, "prepare_inputs", self._prepare_inputs)
        self.replace(self.runner, "sample", self._sample)
        if callable(getattr(self.runner, "pool", None)):
            self.replace(self.runner, "pool", self.closing)

    def begin_own_step(self) -> None:
        """The batch of the last step is not that of this one."""
        self._batch = None

    def row_order(self) -> Sequence[str] | None:
        """Ids in the order of the step's batch."""
        order = getattr(self._batch, "req_ids", None)
        return None if order is None else list(order)

    def _prepare_inputs(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            self._batch = original(*args, **kwargs)
            return self._batch

        return prepare_inputs

    def _sample(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def sample(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            output = result[0] if isinstance(result, tuple) else result
            self.note_sampled(getattr(output, "sampled_token_ids", None))
            return result

        return sample
