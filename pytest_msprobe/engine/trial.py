# SPDX-License-Identifier: Apache-2.0
"""Tries faults in an engine: plants each, records, judges, says what came of it.

The golden is a clean capture of the same engine. Run as a program it carries out what
`pytest-msprobe doctor` asks for and writes what it finds, a JSON object a line, to a
file descriptor that it was given.
"""

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.ranks import first_failure
from pytest_msprobe.compare.tolerance import default_limits, dtype_class
from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.config.settings import Settings, read_settings
from pytest_msprobe.dump.capture import CaptureFile, read_capture
from pytest_msprobe.engine.client import (
    ask_workers,
    check_attached,
    converse,
    start_capture,
    stop_capture,
)
from pytest_msprobe.engine.plants import KINDS, Kind, Place
from pytest_msprobe.errors import EngineError, MsprobeError
from pytest_msprobe.model.limits import Rule
from pytest_msprobe.model.verdict import Verdict, portable
from pytest_msprobe.statistics.sketch import STORAGE_FLOOR

# A fault counts as above the gate's power from so many times the default limit on:
# sketches estimate a distance to about 10 %, and a limit is compared with it.
POWER_MULTIPLE = 2.0
PROMPTS = (24, 40)
TOKENS = 3
# Sizes are tried until the caught one is at most so many times the one that is not.
_CLOSE = 1.5
_MOST_SIZES = 8
# Places of a kind that are tried before it counts as one that cannot be planted.
_MOST_PLACES = 4


def stated_power(dtype: str) -> float:
    """The relative L2 change of a row that a gate must catch.

    Args:
        dtype: The model's, torch's short name.

    Returns:
        Twice the default limit of `rel_l2` for the same numerics key, with what storing
        a sketch adds.
    """
    floor = 0.0 if dtype_class(dtype) == "float32" else STORAGE_FLOOR
    return POWER_MULTIPLE * (default_limits("same", dtype)["rel_l2"] + floor)


@dataclass(slots=True)
class Attempt:
    """One fault of one size, and what the gate said.

    Attributes:
        size: Of the fault.
        moved: Largest relative L2 change of a row where it was planted.
        is_caught: Whether the verdict is not green.
        metric: Of the row that shows it, `logprob` or `missing` where none does.
        observed: Of that metric.
        allowed: Its limit.
        rule: Where the limit comes from.
        named: Path of the module that the verdict names.
        call: Call that it names; of a parent's own code, the child that was given
            something else.
        divergence: Kind of the divergence.
    """

    size: float
    moved: float
    is_caught: bool = False
    metric: str = ""
    observed: float | str = 0.0
    allowed: float | str = 0.0
    rule: str = ""
    named: str = ""
    call: str = ""
    divergence: str = ""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "moved": portable(self.moved)}


@dataclass(slots=True)
class Trial:
    """An engine with what is recorded of it.

    Attributes:
        llm: A blocking engine.
        config: What is recorded.
        rules: Tolerances beyond the defaults.
        folder: Where captures are written; each is removed once it has been read.
        prompts: Token ids; each is generated from by itself, unless they are a batch.
        tokens: How many are generated.
        decode_steps: Decode steps that are recorded.
        is_batch: Whether all prompts are handed over at once.
    """

    llm: Any
    config: DebuggerConfig
    rules: Sequence[Rule]
    folder: Path
    prompts: Sequence[Sequence[int]]
    tokens: int = TOKENS
    decode_steps: int = TOKENS - 1
    is_batch: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def generate(self) -> None:
        """Generates from all prompts."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=self.tokens, temperature=0, ignore_eos=True
        )
        given = [{"prompt_token_ids": list(prompt)} for prompt in self.prompts]
        for batch in [given] if self.is_batch else [[one] for one in given]:
            self.llm.generate(batch, parameters, use_tqdm=False)

    def record(self, folder: Path) -> list[Path]:
        """Records a generation into a folder; one capture file a rank."""
        start = start_capture(self.config, folder, decode_steps=self.decode_steps)
        converse(self.llm, start)
        try:
            self.generate()
        finally:
            replies = converse(self.llm, stop_capture("doctor"))
        return [Path(reply["file"]) for reply in replies]

    def capture(self) -> list[CaptureFile]:
        """Records a generation; one capture a rank, of which no file is kept."""
        place = self.folder / f"capture{next(self._numbers)}"
        captures = [read_capture(path) for path in self.record(place)]
        shutil.rmtree(place, ignore_errors=True)
        return captures

    def places(self) -> list[Place]:
        """Where which kinds of fault can be planted in this model, each place once."""
        converse(self.llm, ask_workers("survey", begin=True))
        try:
            self.generate()
        finally:
            replies = converse(self.llm, ask_workers("survey", begin=False))
        found = (Place(**place) for reply in replies for place in reply["places"])
        return list(dict.fromkeys(found))

    @contextlib.contextmanager
    def planted(self, place: Place, size: float) -> Iterator[None]:
        """Plants a fault for a while.

        Raises:
            CaptureError: It cannot be planted there.
        """
        plant = ask_workers("plant", place=asdict(place), size=size)
        converse(self.llm, plant)
        try:
            yield
        finally:
            converse(self.llm, ask_workers("unplant"))

    def measure(self, place: Place, size: float) -> float:
        """What a fault changes, on identical input: without a capture, calls twice.

        Returns:
            Largest relative L2 change of a row where it is planted.

        Raises:
            CaptureError: It cannot be planted there.
            EngineError: Planting went wrong, or no call reached the place.
        """
        plant = ask_workers("plant", place=asdict(place), size=size)
        converse(self.llm, plant)
        try:
            self.generate()
        finally:
            replies = converse(self.llm, ask_workers("unplant"))
        problems = [reply["error"] for reply in replies if reply["error"]]
        if problems or not any(reply["calls"] for reply in replies):
            problem = problems[0] if problems else "no call reached it"
            message = f"{place.kind} in {place.called}: {problem}"
            raise EngineError(message, slug="plant")
        return max(float(reply["moved"]) for reply in replies)

    def attempt(
        self, goldens: Sequence[CaptureFile], place: Place, size: float
    ) -> Attempt:
        """Plants a fault, records and judges.

        Args:
            goldens: By rank.
            place: Where.
            size: How large.

        Raises:
            MsprobeError: It could not be planted or recorded.
        """
        moved = self.measure(place, size)
        with self.planted(place, size):
            captures = self.capture()
        return described(self.judge(goldens, captures), size, moved)

    def judge(
        self, goldens: Sequence[CaptureFile], captures: Sequence[CaptureFile]
    ) -> Verdict:
        """The verdict over all ranks: of one that fails, if any does."""
        pairs = zip(goldens, captures, strict=True)
        verdicts = [judge(old, new, self.rules).verdict for old, new in pairs]
        failures = [verdict for verdict in verdicts if not verdict.is_green]
        return first_failure(failures, captures) if failures else verdicts[0]


def described(verdict: Verdict, size: float, moved: float) -> Attempt:
    """What a verdict says of a fault."""
    result = Attempt(size, moved, not verdict.is_green)
    if not result.is_caught:
        return result
    divergence = verdict.divergence
    if divergence is None:
        is_moved = float(verdict.tokens.largest) > float(verdict.tokens.allowed)
        result.metric = "logprob" if is_moved else "missing"
        return result
    result.named, result.divergence = divergence.module, divergence.kind
    result.call = divergence.between or divergence.call
    finding = divergence.finding
    if finding is not None:
        result.metric, result.rule = finding.metric, finding.rule
        result.observed, result.allowed = finding.observed, finding.allowed
    return result


def smallest_caught(
    trial: Trial, goldens: Sequence[CaptureFile], place: Place, first: Attempt
) -> list[Attempt]:
    """Attempts at other sizes, to find the smallest that is caught.

    Args:
        trial: The engine.
        goldens: By rank.
        place: Where.
        first: The attempt at the usual size.

    Returns:
        Attempts in the order in which they were made, at most 8.
    """
    kind, made = KINDS[place.kind], [first]
    if kind.least == kind.most:
        return []
    low, high = (kind.least, first.size) if first.is_caught else (first.size, kind.most)
    # The far end first: whether there is anything to search for.
    end = low if first.is_caught else high
    made.append(trial.attempt(goldens, place, end))
    if made[-1].is_caught != first.is_caught:
        while high / low > _CLOSE and len(made) <= _MOST_SIZES:
            middle = math.sqrt(low * high)
            made.append(trial.attempt(goldens, place, middle))
            low, high = (low, middle) if made[-1].is_caught else (middle, high)
    return made[1:]


# What the command asks for ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """What the doctor is asked for.

    Attributes:
        config: The configuration file.
        faults: Kinds of fault, empty for all.
        places: Places of each kind.
        runs: Clean runs that must pass.
        power: Relative L2 change that must be caught, None for the stated power.
        seed: Of the choice of places and prompts.
        has_search: Whether the smallest size that is caught is searched for.
    """

    config: str
    faults: tuple[str, ...] = ()
    places: int = 1
    runs: int = 3
    power: float | None = None
    seed: int = 0
    has_search: bool = True


def chosen_places(
    places: Sequence[Place], kind: Kind, generator: random.Random
) -> list[Place]:
    """Places of a kind, in a random order."""
    found = [place for place in places if place.kind == kind.name]
    generator.shuffle(found)
    return found


def seeded_prompts(
    vocabulary: int, longest: int, generator: random.Random
) -> list[list[int]]:
    """Token ids of the doctor's prompts.

    Args:
        vocabulary: Size of the vocabulary.
        longest: Tokens that prompt and generation may have together.
        generator: Chooses.
    """
    most = max(1, longest - TOKENS)
    first = min(3, vocabulary - 1)  # small ids often are special tokens
    return [
        [generator.randrange(first, vocabulary) for _ in range(min(size, most))]
        for size in PROMPTS
    ]


def examine(trial: Trial, order: Order, power: float) -> Iterator[dict[str, Any]]:
    """Carries out an order.

    Yields:
        A record a clean run and a fault, as soon as it is known.
    """
    generator = random.Random(order.seed)  # noqa: S311 - not for secrets
    trial.generate()  # what is made on first use
    goldens = trial.capture()
    for number in range(order.runs):
        yield _clean(trial, goldens, number + 1)
    places = trial.places()
    for kind in KINDS.values():
        if order.faults and kind.name not in order.faults:
            continue
        candidates = chosen_places(places, kind, generator)
        if not candidates:
            yield {"event": "absent", "fault": kind.name, "why": "no place for it"}
            continue
        yield from _try_kind(trial, goldens, kind, candidates, order, power)
    yield _clean(trial, goldens, order.runs + 1)


def _clean(trial: Trial, goldens: Sequence[CaptureFile], number: int) -> dict[str, Any]:
    verdict = trial.judge(goldens, trial.capture())
    attempt = described(verdict, 0.0, 0.0)
    return {
        "event": "clean",
        "run": number,
        "status": verdict.status,
        "judged": verdict.judged,
        "equal": verdict.equal,
        "named": attempt.named,
        "metric": attempt.metric,
        "why": "; ".join(verdict.reasons[:3]),
    }


def _try_kind(
    trial: Trial,
    goldens: Sequence[CaptureFile],
    kind: Kind,
    candidates: Sequence[Place],
    order: Order,
    power: float,
) -> Iterator[dict[str, Any]]:
    """Tries a kind of fault at as many places as the order says."""
    tried, problem = 0, ""
    for place in candidates[: order.places + _MOST_PLACES]:
        if tried == order.places:
            break
        try:
            first = trial.attempt(goldens, place, kind.standard)
        except MsprobeError as error:
            problem = str(error)
            continue
        if not first.moved and kind.most > kind.standard:
            first = trial.attempt(goldens, place, kind.most)
        if not first.moved:
            problem = f"{place.called}: changed nothing"
            continue
        tried += 1
        others = []
        if order.has_search:
            others = smallest_caught(trial, goldens, place, first)
        yield _as_record(kind, place, first, others, power)
    if not tried:
        yield {"event": "absent", "fault": kind.name, "why": problem}


def _as_record(
    kind: Kind, place: Place, first: Attempt, others: Sequence[Attempt], power: float
) -> dict[str, Any]:
    attempts = [first, *others]
    caught = [a for a in attempts if a.is_caught and a.moved]
    missed = [a for a in attempts if not a.is_caught and a.moved >= power]
    smallest = min(caught, key=lambda a: a.size, default=None)
    greatest = max(missed, key=lambda a: a.moved, default=None)
    return {
        "event": "fault",
        "fault": kind.name,
        "text": kind.text.format(size=f"{first.size:g}"),
        "module": place.guilty,
        "between": place.child if kind.is_own_code else "",
        "is_above": first.moved >= power,
        "is_right": first.is_caught and first.named == place.guilty,
        "first": first.as_json(),
        "smallest": smallest.as_json() if smallest else None,
        "missed": greatest.as_json() if greatest else None,
        "attempts": [attempt.as_json() for attempt in attempts],
    }


def run(order: Order, settings: Settings) -> Iterator[dict[str, Any]]:
    """Starts the configured engine and carries out an order on it.

    Raises:
        MsprobeError: The engine cannot be started or recorded.
    """
    from pytest_msprobe.engine.launch import (
        engine_arguments,
        start_engine,
        stop_engine,
    )

    unknown = [name for name in order.faults if name not in KINDS]
    if unknown:
        message = f"--faults: {unknown[0]!r}: known: {', '.join(KINDS)}"
        raise EngineError(message, slug="doctor-faults")
    where = f"{settings.path}: engine"
    llm = start_engine(engine_arguments(settings.engine.arguments, where))
    try:
        converse(llm, check_attached())
        model = llm.llm_engine.vllm_config.model_config
        dtype = str(model.dtype).removeprefix("torch.")
        power = stated_power(dtype) if order.power is None else order.power
        generator = random.Random(order.seed)  # noqa: S311 - not for secrets
        prompts = seeded_prompts(
            int(model.get_vocab_size()), int(model.max_model_len), generator
        )
        yield {
            "event": "begin",
            "model": settings.engine.arguments["model"],
            "dtype": dtype,
            "level": settings.capture.level,
            "power": power,
        }
        with tempfile.TemporaryDirectory(prefix="msprobe-doctor-") as folder:
            trial = Trial(llm, settings.capture, settings.rules, Path(folder), prompts)
            yield from examine(trial, order, power)
    finally:
        stop_engine(llm)


def main(arguments: Sequence[str]) -> int:
    """Carries out an order, given as JSON, and writes records to a descriptor."""
    given = json.loads(arguments[0])
    order = Order(**{**given, "faults": tuple(given["faults"])})
    with os.fdopen(int(arguments[1]), "w", encoding="utf-8") as stream:

        def tell(record: dict[str, Any]) -> None:
            stream.write(json.dumps(record) + "\n")
            stream.flush()

        try:
            from pytest_msprobe.engine.launch import prepare_environment

            settings = read_settings(Path(order.config))
            prepare_environment(settings.engine.environment)
            for record in run(order, settings):
                tell(record)
        except MsprobeError as error:
            tell({"event": "error", "error": str(error)})
            return 1
        tell({"event": "end"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
