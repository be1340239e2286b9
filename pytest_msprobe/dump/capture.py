# SPDX-License-Identifier: Apache-2.0
"""The text file of one rank's capture: what dump.json has no place for.

A golden has the same format (docs/formats.md). The first line is the header; then come
`t` lines (the numbers of one tensor segment), `c` lines (a call and the ids of its
tensors) and `step` lines, in execution order. A reader accepts FORMAT and FORMAT - 1.
"""

import contextlib
import gc
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
    MutableSequence,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from pytest_msprobe.dump.call_table import CallTable
from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model import dtypes

FORMAT = 2
OLDEST_READABLE = 1
# Kind of a capture that was read from dump.json files: it has no sketches.
DUMP = "dump"
# Where the provenance says that another capture's tokens were fed back.
FORCED = "teacher_forcing"
FILE_NAME = "capture.rank{rank}.jsonl"
# Numbers in the noise of a tensor.
_METRICS = 5

SKETCHED = {t.code for t in dtypes.BY_NAME.values() if dtypes.is_sketched(t.name)}
_CLASS_CODES = {"token": "t", "sample": "s", "neither": "n"}
_CLASSES = {code: name for name, code in _CLASS_CODES.items()}


class Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One request of a capture, with what the worker sampled for it.

    Attributes:
        label: Number in order of first scheduling.
        prompt_sha256: Hash of the prompt's token ids.
        prompt_tokens: Length of the prompt.
        tokens: Sampled ids.
        logprobs: Log-probability of each sampled id, float32 of the raw logits.
        top: For each sampled position up to 20 pairs (id, logprob), best first.
        prompt: Token ids of the prompt, where they are known (captures only).
        own: Of a capture that was fed another one's tokens: the ids that it sampled
            itself; absent where none of them differs.
    """

    label: int
    prompt_sha256: str
    prompt_tokens: int
    tokens: list[int] = []
    logprobs: list[float | str] = []
    top: list[list[tuple[int, float | str]]] = []
    prompt: list[int] = []
    own: list[int] = []


class Header(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """First line of a capture or golden.

    Attributes:
        msprobe: Format version.
        kind: `capture` or `golden`.
        test: Node id of the test.
        variant: Name of the golden's variant.
        rank: Rank that recorded it.
        world: Number of ranks.
        key: Numerics key.
        signature: What must be equal for two captures to be comparable.
        provenance: Everything else that made it; reported only.
        requests: Prompts, tokens and logprobs.
        left_out: Slots that are not judged, by reason.
        weights: Checksums of parameters, by module and parameter.
        sharded: Of a capture combined from several ranks: `call:slot` of the rows that
            could not be.
        noise: Of a calibrated golden: `runs`, what was changed in them, and `logprob`,
            the greatest difference of a token's log-probability among them.
    """

    msprobe: int
    kind: str
    test: str = ""
    variant: str = ""
    rank: int = 0
    world: int = 1
    key: str = ""
    signature: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    requests: list[Request] = []
    left_out: dict[str, int] = {}
    weights: dict[str, dict[str, str]] = {}
    sharded: list[str] = []
    noise: dict[str, Any] = {}


class TensorLine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Numbers of one segment of a tensor. Field names are those of the file.

    Attributes:
        t: Id, referred to by calls.
        d: Code of the element type.
        s: Shape of the segment: of a token- or sample-major tensor its rows only.
        k: Row class: t (token-major, if absent), s (sample-major), n (neither).
        g: Segment, empty for a whole tensor.
        v: Maximum, minimum and, for float types, sum and sum of squares.
        x: NaN, +Inf and -Inf counts; absent where all are 0.
        c: Checksum, 16 hexadecimal digits.
        q: Sketch in base 85; absent for a single element, which the maximum gives.
        a: Scale of a 16-bit sketch.
        n: Noise of a calibrated golden: the greatest rel_l2, max, min, norm and mean
            among its runs; absent where all are 0.
    """

    t: int
    d: str
    s: list[int]
    g: str
    v: list[float | int | None]
    c: str
    k: str = "t"
    x: list[int] = []
    q: str = ""
    a: float | None = None
    n: list[float] = []

    @property
    def row_class(self) -> str:
        """Row class in words."""
        return _CLASSES.get(self.k, "neither")


class CallLine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One call, written when it ended. Field names are those of the file.

    Attributes:
        c: Name, a shared module named after the parent that called it.
        l: Number of recorded modules around it.
        i: Ids of the tensors in each input slot. In the file the slots are short:
            `0` is input_args.0, `x` is input_kwargs.x.
        o: Ids of the tensors in each output slot; `0` is output.0 in the file.
        x: Values of the slots that hold no tensor.
        r: Role of the slots that are not judged: undefined or opaque.
        m: Name in dump.json where it differs.
        p: With tensor parallelism, what a slot of a parallel layer holds: 0 for a
            tensor that all ranks hold alike, else the columns of the unsharded tensor
            of which it holds some; indices are then those of the unsharded tensor.
    """

    c: str
    l: int = 0  # noqa: E741 - the name in the file
    i: dict[str, list[int]] = {}
    o: dict[str, list[int]] = {}
    x: dict[str, Any] = {}
    r: dict[str, str] = {}
    m: str = ""
    p: dict[str, int] = {}


class StepLine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Start of a step.

    Attributes:
        step: Number.
        tokens: Tokens scheduled, 0 where unknown.
        requests: (label, tokens, first position) in row order.
    """

    step: int
    tokens: int = 0
    requests: list[tuple[int, int, int]] = []


Line = TensorLine | CallLine | StepLine


@dataclass(slots=True)
class CaptureFile:
    """A capture or golden in memory.

    Attributes:
        header: First line.
        tensors: `t` lines by id.
        entries: `c` and `step` lines in order.
        path: Where it was read from.
        files: Of a dump, the saved tensors by id.
        values: Of a dump, the values as they stand in it, by id.
    """

    header: Header
    tensors: MutableMapping[int, TensorLine] = field(default_factory=dict)
    entries: MutableSequence[CallLine | StepLine] = field(default_factory=list)
    path: Path | None = None
    files: dict[int, Path] = field(default_factory=dict)
    values: dict[int, dict[str, Any]] = field(default_factory=dict)

    def calls(self) -> Iterator[tuple[int, CallLine]]:
        """Calls with the number of their step, in order."""
        step = 0
        for entry in self.entries:
            if isinstance(entry, StepLine):
                step = entry.step
            else:
                yield step, entry

    @property
    def steps(self) -> list[StepLine]:
        """Steps in order."""
        if isinstance(self.entries, CallTable):
            return self.entries.steps()
        return [entry for entry in self.entries if entry.__class__ is StepLine]


def class_code(row_class: str) -> str:
    """One-letter code of a row class."""
    return _CLASS_CODES[row_class]


def _shorten(slot: str) -> str:
    """A slot as it stands in the file."""
    for side in ("input_args.", "input_kwargs.", "output."):
        if slot.startswith(side):
            return slot[len(side) :]
    return slot


def _input_slot(slot: str) -> str:
    """An input slot of the file with its side."""
    return f"input_args.{slot}" if slot[:1].isdigit() else f"input_kwargs.{slot}"


def _output_slot(slot: str) -> str:
    """An output slot of the file with its side."""
    return slot if slot == "output" else f"output.{slot}"


def _shortened(call: CallLine) -> CallLine:
    """A call as it stands in the file."""
    inputs, outputs, values = (
        {_shorten(slot): value for slot, value in slots.items()}
        for slots in (call.i, call.o, call.x)
    )
    return CallLine(call.c, call.l, inputs, outputs, values, call.r, call.m, call.p)


def encode(header: Header, lines: Iterable[Line]) -> bytes:
    """The bytes of a capture file, one JSON object a line."""
    encoder = msgspec.json.Encoder()
    parts = [encoder.encode(header)]
    for line in lines:
        entry = line
        if isinstance(line, CallLine):
            entry = _shortened(line)
        parts.append(encoder.encode(entry))
    return b"\n".join(parts) + b"\n"


_HEADER = msgspec.json.Decoder(Header)
_TENSOR = msgspec.json.Decoder(TensorLine)
_CALL = msgspec.json.Decoder(CallLine)
_STEP = msgspec.json.Decoder(StepLine)


def read_header(path: Path) -> Header:
    """Reads the first line only.

    Raises:
        DumpFormatError: The file cannot be read or has another format.
    """
    try:
        with path.open("rb") as stream:
            return _decode_header(path, stream.readline())
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise DumpFormatError(message, slug="capture-unreadable") from error


def _decode_header(path: Path, line: bytes) -> Header:
    try:
        version = msgspec.json.decode(line)["msprobe"]
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        message = f"{path}:1: not the header of a capture or golden"
        raise DumpFormatError(message, slug="capture-format") from error
    if not isinstance(version, int) or not OLDEST_READABLE <= version <= FORMAT:
        readable = f"this version reads {OLDEST_READABLE} to {FORMAT}"
        message = f"{path}:1: format {version}; {readable}"
        hint = "update the golden with this version of pytest-msprobe"
        raise DumpFormatError(message, slug="capture-version", hint=hint)
    try:
        return _HEADER.decode(line)
    except msgspec.MsgspecError as error:
        message = f"{path}:1: {error}"
        raise DumpFormatError(message, slug="capture-format") from error


def read_capture(path: Path) -> CaptureFile:
    """Reads a capture file or golden.

    Raises:
        DumpFormatError: The file cannot be read, has another format, is damaged or
            refers to a tensor that it does not hold; the message names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror})"
        raise DumpFormatError(message, slug="capture-unreadable") from error
    first, _, rest = content.partition(b"\n")
    result = CaptureFile(_decode_header(path, first), path=path)
    with without_collector():
        _read_lines(result, path, rest)
    return result


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keeps Python from looking for garbage among many new objects, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_lines(result: CaptureFile, path: Path, content: bytes) -> None:
    lines = _Lines()
    result.tensors, result.entries = lines.tensors, lines.entries
    kinds: dict[bytes, Callable[[bytes], None]] = {
        b'{"t"': lines.tensor,
        b'{"c"': lines.call,
        b'{"st': lines.step,
        b"": lambda _line: None,
    }
    for number, line in enumerate(content.split(b"\n"), start=2):
        try:
            kinds.get(line[:4], _unknown)(line)
        except (msgspec.MsgspecError, DumpFormatError) as error:
            message = f"{path}:{number}: {error}"
            raise DumpFormatError(message, slug="capture-format") from error


def _unknown(_line: bytes) -> None:
    raise DumpFormatError("unknown kind of line")


def _decode_entry(line: bytes) -> CallLine | StepLine:
    """A call or a step of the file, slots with their side."""
    if line.startswith(b'{"st'):
        step: StepLine = _STEP.decode(line)
        return step
    call: CallLine = _CALL.decode(line)
    call.i = {_input_slot(slot): ids for slot, ids in call.i.items()}
    call.o = {_output_slot(slot): ids for slot, ids in call.o.items()}
    call.x = {_input_slot(slot): value for slot, value in call.x.items()}
    return call


class _Lines:
    """The lines of a file, taken apart."""

    def __init__(self) -> None:
        # numpy: only where a file is read.
        from pytest_msprobe.dump.columns import TensorTable

        self.tensors = TensorTable(_TENSOR.decode)
        self.entries = CallTable(_decode_entry, _input_slot, _output_slot)
        self._known = self.tensors.keys()

    def tensor(self, line: bytes) -> None:
        """A `t` line."""
        entry: TensorLine = _TENSOR.decode(line)
        size = 4 if entry.d in SKETCHED else 2
        is_noise = not entry.n or len(entry.n) == _METRICS
        if len(entry.v) != size or not is_noise or entry.k not in _CLASSES:
            raise DumpFormatError(f"tensor {entry.t} has a wrong class or numbers")
        if entry.t in self._known:
            raise DumpFormatError(f"tensor {entry.t} stands twice")
        self.tensors.add(line, entry)

    def call(self, line: bytes) -> None:
        """A `c` line."""
        self.entries.add_call(line, _CALL.decode(line), self._known)

    def step(self, line: bytes) -> None:
        """A `step` line."""
        self.entries.add_step(line, _STEP.decode(line))
