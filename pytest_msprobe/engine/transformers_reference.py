# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face transformers computes for the tokens of a capture, as captures.

The model is run on the CPU over each request's prompt and the tokens that the engine
sampled, in one forward. What its modules give is measured under the names that vLLM's
modules have: outputs of projections that vLLM fuses are columns of the fused tensor,
and where vLLM's modules hand on (hidden states, residual) their sum is meant.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from pytest_msprobe.dump.capture import Request
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.records import ROW_WIDTH, Numbers, combine, read_numbers
from pytest_msprobe.model.segments import (
    Piece,
    RequestRows,
    SampleRow,
    StepLayout,
    split_samples,
    split_tokens,
)
from pytest_msprobe.statistics.select import select_backend
from pytest_msprobe.statistics.spec import Span

# Projections that vLLM computes as one, with their parts in order.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Modules of vLLM whose output is what this sibling is given.
_BEFORE = {"attn": "o_proj", "act_fn": "down_proj"}
_ROTARY = "apply_rotary_pos_emb"
_LOGITS = "logits_processor"
_TOP = 20
# Places beside those of outputs: what a module is given, and the output of one that
# holds others, which in vLLM is the sum of what it returns.
INPUT, STREAM = "input", "stream"
Key = tuple[str, str, str]


@dataclass(slots=True)
class Measured:
    """Numbers of a row and the columns of its tensor."""

    numbers: Numbers
    columns: int


@dataclass(slots=True)
class Tap:
    """Measures what one model computes for one request.

    Attributes:
        rows: By path of the module in vLLM, place (`output.0`, `input`) and segment.
        tokens: Pieces of token-major tensors.
        samples: Pieces of sample-major tensors.
    """

    rows: dict[Key, Measured] = field(default_factory=dict)
    tokens: tuple[Piece, ...] = ()
    samples: tuple[Piece, ...] = ()
    _count: int = 0

    def begin(self, request: Request, count: int) -> None:
        """The rows of a request, of which the first `count` positions are computed."""
        label, prompt = request.label, request.prompt_tokens
        rows = RequestRows(label, 0, count, 0, prompt)
        samples = tuple(
            SampleRow(label, position, prompt) for position in range(prompt - 1, count)
        )
        layout = StepLayout(count, count, (rows,), samples)
        self.tokens, self._count = split_tokens(layout), count
        self.samples = tuple(map(_at_position, split_samples(layout)))

    def note(
        self,
        path: str,
        place: str,
        tensor: Any,
        *,
        columns: tuple[int, int] | None = None,
        is_sample: bool = False,
    ) -> None:
        """Measures a tensor of shape (1, tokens, ...); others are passed over.

        Args:
            path: Path of the module in vLLM.
            place: Which tensor of it.
            tensor: What was computed.
            columns: First column in a fused tensor, and the columns of that.
            is_sample: Only the sampled positions count.
        """
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return
        if tensor.ndim < 3 or tensor.shape[:2] != (1, self._count):  # noqa: PLR2004
            return
        flat = tensor.detach().reshape(self._count, -1)
        width = flat.shape[1]
        start, whole = columns or (0, width)
        pieces = self.samples if is_sample else self.tokens
        parts = [
            [Span(p.first_row, p.rows, 0, width, p.position * whole + start, whole)]
            for p in pieces
        ]
        rows = np.zeros((len(parts), ROW_WIDTH))
        select_backend("cpu")[0].measure(flat, parts, rows)
        for piece, row in zip(pieces, rows, strict=True):
            numbers = read_numbers(row, str(flat.dtype))
            key = (path, place, piece.segment)
            known = self.rows.get(key)
            if columns is not None and known is not None:
                numbers = combine(known.numbers, numbers)
            self.rows[key] = Measured(numbers, whole)


def _at_position(piece: Piece) -> Piece:
    """A sampled position's piece: its row is its position, since all are computed."""
    return Piece(piece.segment, piece.position, 1, piece.position)


@contextlib.contextmanager
def tapped(model: torch.nn.Module, tap: Tap) -> Iterator[None]:
    """Measures the modules of a model of transformers for a while."""
    modules = dict(model.named_modules())
    handles = []
    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            if path:
                hook = functools.partial(_note_call, tap, path, modules)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
                stack.callback(handles[-1].remove)
        running: list[str] = []
        for path, module in modules.items():
            if hasattr(module, "q_proj"):
                stack.enter_context(_running(module, path, running))
        for name in {type(m).__module__ for m in modules.values()}:
            owner = sys.modules.get(name)
            if callable(getattr(owner, _ROTARY, None)):
                stack.enter_context(_rotary_noted(owner, running, tap))
        yield


@contextlib.contextmanager
def _running(module: torch.nn.Module, path: str, running: list[str]) -> Iterator[None]:
    """Keeps the path of the attention module that is running."""

    def enter(*_: Any) -> None:
        running[:] = [path]

    handle = module.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _rotary_noted(owner: Any, running: list[str], tap: Tap) -> Iterator[None]:
    """Measures queries and keys around the function that turns them."""
    original: Callable[..., Any] = getattr(owner, _ROTARY)

    @functools.wraps(original)
    def apply(*args: Any, **kwargs: Any) -> Any:
        turned = original(*args, **kwargs)
        if running:
            path = f"{running[0]}.rotary_emb"
            for place, tensors in ((INPUT, args[:2]), ("output", turned)):
                for index, tensor in enumerate(tensors):
                    # (1, heads, tokens, size) has the heads before the tokens.
                    tap.note(path, f"{place}.{index}", tensor.transpose(1, 2))
        return turned

    setattr(owner, _ROTARY, apply)
    try:
        yield
    finally:
        setattr(owner, _ROTARY, original)


def _note_call(
    tap: Tap,
    path: str,
    modules: dict[str, torch.nn.Module],
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Measures one call of a module under the names of vLLM."""
    parent, _, name = path.rpartition(".")
    given = args[0] if args else kwargs.get("hidden_states")
    given_to = [k for k, sibling in _BEFORE.items() if sibling == name]
    for vllm_name in given_to:
        tap.note(f"{parent}.{vllm_name}", "output.0", given)
    # A tuple, or a record of transformers that is a dict and counts its values as well.
    result = output[0] if isinstance(output, tuple | dict) else output
    for fused, parts in FUSED.items():
        if name in parts:
            widths = [_columns(modules.get(f"{parent}.{part}")) for part in parts]
            before = sum(widths[: parts.index(name)])
            place = (before, sum(widths))
            tap.note(f"{parent}.{fused}", "output.0", result, columns=place)
            if name == parts[0]:
                tap.note(f"{parent}.{fused}", INPUT, given)
    if name in _BEFORE:  # something else in vLLM
        return
    tap.note(path, INPUT, given)
    tap.note(path, "output.0", result)
    if any(True for _ in module.children()):
        tap.note(path, STREAM, result)


def _columns(module: torch.nn.Module | None) -> int:
    return int(getattr(module, "out_features", 0))


def run_model(
    model: str, dtype: str, requests: Sequence[Request]
) -> tuple[dict[Key, Measured], list[Request]]:
    """Runs a model of transformers over the tokens of some requests.

    Args:
        model: Folder or name of the checkpoint.
        dtype: Type to compute in.
        requests: With their prompts and the tokens that were sampled.

    Returns:
        Its rows, and the requests with its own log-probabilities of the same tokens.

    Raises:
        CaptureError: It cannot be loaded, or a request has no tokens.
    """
    net = _load(model, dtype)
    tap = Tap()
    answered = []
    with tapped(net, tap), torch.no_grad():
        for request in requests:
            if not request.prompt or not request.tokens:
                message = f"request {request.label}: its prompt or tokens are not known"
                hint = "generate inside the capture, with a model that samples tokens"
                raise CaptureError(message, slug="reference-tokens", hint=hint)
            ids = [*request.prompt, *request.tokens[:-1]]
            tap.begin(request, len(ids))
            logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits
            tap.note(_LOGITS, "output.0", logits, is_sample=True)
            answered.append(_with_logprobs(request, logits[0]))
    return tap.rows, answered


def _load(model: str, dtype: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        had_bar = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            net = AutoModelForCausalLM.from_pretrained(
                model, dtype=getattr(torch, dtype), attn_implementation="eager"
            )
        except Exception as error:
            text = str(error).strip().splitlines()[0]
            message = f"transformers cannot load {model!r}: {text}"
            hint = "name the checkpoint: check_against_transformers(model=...)"
            raise CaptureError(message, slug="reference-model", hint=hint) from error
        finally:
            if had_bar:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return net.eval()  # type: ignore[no-untyped-call]


def _with_logprobs(request: Request, logits: torch.Tensor) -> Request:
    """A request with the log-probabilities that some logits give to its tokens."""
    rows = torch.log_softmax(logits[request.prompt_tokens - 1 :].float(), dim=-1)
    top = torch.topk(rows, min(_TOP, rows.shape[1]), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    chosen = [rows[i, token].item() for i, token in enumerate(request.tokens)]
    return msgspec.structs.replace(
        request,
        logprobs=chosen,
        top=[list(zip(ids, values, strict=True)) for ids, values in pairs],
    )
