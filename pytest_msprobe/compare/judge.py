# SPDX-License-Identifier: Apache-2.0
"""Judges a candidate capture against a golden. Pure: two captures in, a verdict out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.divergence import (
    DRIFT,
    Search,
    changed_weights,
    find_divergence,
)
from pytest_msprobe.compare.errors import Elements, Errors
from pytest_msprobe.compare.experts import (
    Reroutes,
    find_reroutes,
    is_of_choice,
    tells_choices,
)
from pytest_msprobe.compare.match import PairNames, Pairs, Rows, pair_rows, row_names
from pytest_msprobe.compare.schedule import compare_schedules
from pytest_msprobe.compare.signature import (
    differences,
    incomparable_reasons,
    prefix_reasons,
)
from pytest_msprobe.compare.structure import structure_changes
from pytest_msprobe.compare.tokens import (
    compare_tokens,
    own_flips,
    positions_behind_flips,
    unrecorded_tokens,
)
from pytest_msprobe.compare.tolerance import (
    ResolvedLimits,
    common_glob,
    default_limits,
    least_limits,
    matching,
    resolve_limits,
    rule_text,
    unmatched_rules,
)
from pytest_msprobe.dump.capture import (
    FORCED,
    CaptureFile,
    without_collector,
)
from pytest_msprobe.model.limits import (
    NOISE_MULTIPLE,
    ROW_METRICS,
    KeyMode,
    Rule,
)
from pytest_msprobe.model.segments import segment_name
from pytest_msprobe.model.verdict import (
    AppliedRule,
    TokenDifference,
    Verdict,
    portable,
)

WORST = 20
_SHOWN_REQUESTS = 3
_MOVED_TOKENS = "log-probabilities moved by more than is allowed"
_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Judgement:
    """A verdict with what the session needs beyond it.

    Attributes:
        verdict: The verdict.
        unmatched: Rules that matched no row.
        names: Names of all rows that one of the captures has.
    """

    verdict: Verdict
    unmatched: list[Rule]
    names: Sequence[str]


def judge(
    golden: CaptureFile,
    candidate: CaptureFile,
    rules: Sequence[Rule] = (),
    *,
    mode: KeyMode | None = None,
    renames: Mapping[str, str] | None = None,
    measure: Callable[[Pairs], Elements] | None = None,
) -> Judgement:
    """Judges a candidate.

    Args:
        golden: The golden.
        candidate: What was captured now.
        rules: Tolerances beyond the defaults, in order.
        mode: Same or another numerics key; taken from the headers if not given.
        renames: Rows of the candidate, without segment, that are to be paired with
            rows of the golden of another name.
        measure: Compares the saved tensors of pairs element by element; it also says
            in `is_equal` which of them have equal bits.
    """
    if mode is None:
        mode = "same" if golden.header.key == candidate.header.key else "cross"
    verdict = Verdict(
        test=candidate.header.test,
        status="pass",
        golden=str(golden.path or ""),
        capture=str(candidate.path or ""),
        mode=mode,
        golden_key=golden.header.key,
        key=candidate.header.key,
        left_out=dict(candidate.header.left_out),
        rank=candidate.header.rank,
        rules=[AppliedRule.of(rule) for rule in rules],
    )
    sides = golden.header.provenance, candidate.header.provenance
    verdict.changes = [line for line in differences(*sides) if line[0] != FORCED]
    verdict.reasons = incomparable_reasons(golden.header, candidate.header)
    verdict.reasons += prefix_reasons(golden, candidate)
    if verdict.reasons:
        verdict.status = "incomparable"
        names = row_names(golden, candidate)
        return Judgement(verdict, unmatched_rules(rules, names), names)
    with without_collector():
        return _Judge(golden, candidate, rules, mode, verdict).run(renames, measure)


@dataclass(slots=True)
class Noise:
    """How far apart two clean captures are.

    Attributes:
        pairs: Their rows.
        rows: (n,) pairs that would be judged and are not equal.
        errors: (n,) by metric, unitless; infinite where no tolerance helps.
        limits: (n,) by metric, what the rules allow, few elements considered.
        judged: Rows that would be judged.
        tokens: How the tokens moved.
        rerouted: Rows not judged because a router of a mixture chose other experts.
    """

    pairs: Pairs
    rows: _I64
    errors: dict[str, npt.NDArray[np.float64]]
    limits: dict[str, npt.NDArray[np.float64]]
    judged: int
    tokens: TokenDifference
    rerouted: int = 0


def measure_noise(
    golden: CaptureFile,
    candidate: CaptureFile,
    rules: Sequence[Rule] = (),
    *,
    mode: KeyMode | None = None,
) -> Noise:
    """Errors of all rows that would be judged.

    Args:
        golden: One capture.
        candidate: Another one of the same test.
        rules: Tolerances beyond the defaults.
        mode: Same or another numerics key; taken from the headers if not given.
    """
    if mode is None:
        mode = "same" if golden.header.key == candidate.header.key else "cross"
    verdict = Verdict(test=candidate.header.test, status="pass", mode=mode)
    state = _Judge(golden, candidate, rules, mode, verdict)
    pairs, limits, masks, errors = state.compare()
    rows, relative = errors.relative(masks.judged)
    count = pairs.numbers(rows)[0].count
    allowed = {
        metric: least_limits(limits, metric, rows, count) for metric in ROW_METRICS
    }
    judged = int(masks.judged.sum())
    return Noise(
        pairs, rows, relative, allowed, judged, verdict.tokens, verdict.rerouted
    )


@dataclass(slots=True)
class _Masks:
    """Which pairs take part in what.

    Attributes:
        judged: Rows that count.
        evidence: Rows whose errors may tell where it began: those that are judged and,
            across keys, inputs of modules.
        unjudged: Rows that do not count because of a flipped token.
    """

    judged: _Bools
    evidence: _Bools
    unjudged: _Bools


class _Judge:
    def __init__(
        self,
        golden: CaptureFile,
        candidate: CaptureFile,
        rules: Sequence[Rule],
        mode: KeyMode,
        verdict: Verdict,
    ) -> None:
        self._golden = golden
        self._candidate = candidate
        self._rules = rules
        self._mode = mode
        self._verdict = verdict
        self._requests = golden.header.requests, candidate.header.requests
        self._unrecorded = unrecorded_tokens(candidate)
        flips = positions_behind_flips(*self._requests, self._unrecorded)
        self._schedule = compare_schedules(golden, candidate, flips)
        self._names: Sequence[str] = []
        self._reroutes = Reroutes(np.zeros(0, dtype=np.bool_))
        self._search: Search | None = None
        self._is_mixture = False

    def compare(
        self,
        renames: Mapping[str, str] | None = None,
        measure: Callable[[Pairs], Elements] | None = None,
    ) -> tuple[Pairs, ResolvedLimits, _Masks, Errors]:
        """Pairs, limits, what counts, and errors; tokens go into the verdict."""
        pairs = pair_rows(self._golden, self._candidate, renames)
        elements = measure(pairs) if measure is not None else None
        self._names = PairNames(pairs)
        limits = self._limits(pairs, self._names)
        masks = self._masks(pairs, limits)
        self._compare_tokens(limits)
        loose = self._is_loose(pairs)
        errors = Errors(pairs, limits, masks.evidence, elements, loose)
        return pairs, limits, masks, errors

    def run(
        self,
        renames: Mapping[str, str] | None,
        measure: Callable[[Pairs], Elements] | None,
    ) -> Judgement:
        """The verdict."""
        verdict = self._verdict
        pairs, limits, masks, errors = self.compare(renames, measure)
        failed = masks.judged & (errors.ratio > 1.0)
        verdict.noisy = int((masks.judged & errors.is_raised).sum())
        verdict.judged = int(masks.judged.sum())
        verdict.equal = int((masks.judged & pairs.is_equal).sum())
        verdict.unjudged = int(masks.unjudged.sum())
        verdict.failed = int(failed.sum())
        self._note_missing(pairs, limits)
        self._note_untold_choices(pairs)
        self._note_threads(limits)
        self._note_what_is_judged(pairs.golden)
        self._settle(pairs, errors, masks)
        self._list_worst(pairs, errors, masks.judged)
        if verdict.status == "fail":
            verdict.would_pass = self._passing_rule(errors, masks.judged, failed)
        return Judgement(verdict, limits.unmatched, self._names)

    def _passing_rule(self, errors: Errors, judged: _Bools, failed: _Bools) -> str:
        """The rule with which it would pass, empty where no tolerance could let it."""
        reasons = self._verdict.reasons
        if [text for text in reasons if text != _MOVED_TOKENS]:
            return ""
        rows = np.flatnonzero(failed)
        if not errors.is_tolerable(rows):
            return ""
        glob, limits = "*", {}
        if len(rows):
            glob = common_glob([self._names[row] for row in rows])
            named = matching(Rule("", glob), self._names[: len(judged)])
            limits = errors.needed(judged & named, beyond=failed)
        if _MOVED_TOKENS in reasons:
            tokens = compare_tokens(*self._requests, 0.0, incomplete=self._unrecorded)
            limits["logprob"] = float(tokens.largest)
        return rule_text(glob, self._mode, limits)

    def _limits(self, pairs: Pairs, names: Sequence[str]) -> ResolvedLimits:
        """Limits of the pairs, of the missing and of the new rows, in this order."""
        dtype = str(self._candidate.header.signature.get("model", {}).get("dtype", ""))
        is_moved = np.zeros(len(names), dtype=np.bool_)
        rows = pairs.candidate
        is_moved[: len(pairs.new)] = rows.in_segments(
            pairs.new, self._schedule.is_moved
        )
        is_mixture = any(map(tells_choices, (pairs.golden, pairs.candidate)))
        self._is_mixture = is_mixture
        moved = default_limits(
            self._mode, dtype, is_rescheduled=True, is_mixture=is_mixture
        )
        return resolve_limits(
            names,
            self._rules,
            default_limits(self._mode, dtype, is_mixture=is_mixture),
            self._mode,
            moved=(is_moved, moved),
        )

    def _compare_tokens(self, limits: ResolvedLimits) -> None:
        noise = NOISE_MULTIPLE * float(self._golden.header.noise.get("logprob", 0.0))

        def limit_of(label: int, number: int) -> float:
            if self._reroutes.is_token_behind(label, number):
                return max(limits.rerouted_logprob, noise)
            if self._schedule.is_token_moved(label, number):
                return max(limits.moved_logprob, noise)
            return max(limits.logprob, noise)

        self._verdict.tokens = compare_tokens(
            *self._requests,
            max(limits.logprob, noise),
            limit_of=limit_of,
            incomplete=self._unrecorded,
        )

    def _masks(self, pairs: Pairs, limits: ResolvedLimits) -> _Masks:
        rows, new = pairs.candidate, pairs.new
        schedule = self._schedule
        is_whole = rows.in_segments(new, _is_whole)
        steps = rows.steps[rows.call[new]]
        unjudged = rows.in_segments(new, schedule.is_behind)
        unjudged |= is_whole & _is_in(steps, schedule.behind_steps)
        unjudged |= self._is_flipped_token(rows, new)
        counts = ~limits.is_ignored[: len(new)] & ~unjudged
        counts &= ~is_whole | _is_in(steps, schedule.equal_steps)
        counts &= ~self._is_rerouted(pairs)
        if self._mode == "same":
            return _Masks(counts, counts, unjudged)
        is_module, is_output = rows.is_of_module(new), rows.is_output[new]
        is_float = rows.has_sums(new)
        judged = counts & is_module & is_output
        evidence = judged | (counts & is_module & ~is_output & is_float)
        return _Masks(judged, evidence, unjudged)

    def _is_rerouted(self, pairs: Pairs) -> _Bools:
        """Rows behind a router that chose other experts where rounding may do so."""
        found = find_reroutes(pairs, self._is_loose(pairs), self._candidate.steps)
        self._reroutes = found
        self._verdict.rerouted = int(found.is_behind.sum())
        return found.is_behind

    def _is_loose(self, pairs: Pairs) -> _Bools:
        """Rows in which roundings may differ."""
        if self._mode == "cross":
            return np.ones(len(pairs.new), dtype=np.bool_)
        return pairs.candidate.in_segments(pairs.new, self._schedule.is_moved)

    def _is_flipped_token(self, rows: Rows, chosen: _I64) -> _Bools:
        """Integers of the sample that another token came from: the token itself.

        Tokens and log-probabilities judge it.
        """
        own = self._own_segments()
        if not self._schedule.flips and not own:
            return np.zeros(len(chosen), dtype=np.bool_)
        is_flip = rows.in_segments(
            chosen, lambda text: text in own or self._schedule.is_flip(text)
        )
        return is_flip & ~rows.has_sums(chosen) & rows.is_of_class(chosen, "sample")

    def _own_segments(self) -> set[str]:
        """Segments from which another token would have been sampled than was fed."""
        prompts = {r.label: r.prompt_tokens for r in self._golden.header.requests}
        return {
            segment_name(label, prompts[label] - 1 + number, prompts[label])
            for label, numbers in own_flips(*self._requests).items()
            for number in numbers
        }

    def _note_missing(self, pairs: Pairs, limits: ResolvedLimits) -> None:
        verdict, rows, missing = self._verdict, pairs.golden, pairs.missing
        first = len(pairs.new)
        needed = ~limits.is_ignored[first : first + len(missing)]
        needed &= ~rows.in_segments(missing, self._schedule.is_behind)
        needed &= ~is_of_choice(rows, missing)  # they only say what can be judged
        needed &= ~rows.in_segments(missing, _is_whole) | _is_in(
            rows.steps[rows.call[missing]], self._schedule.needed_steps
        )
        if self._mode == "cross":
            needed &= rows.is_of_module(missing) & rows.is_output[missing]
        verdict.missing = int(needed.sum())
        verdict.missing_rows = rows.names(missing[needed][:WORST])
        verdict.extra = len(pairs.extra)
        if verdict.missing or verdict.extra:
            changes = structure_changes(
                pairs.golden, pairs.candidate, has_apis=self._mode == "same"
            )
            verdict.structure = changes[:WORST]

    def _note_untold_choices(self, pairs: Pairs) -> None:
        if self._mode == "same":
            return
        told = tells_choices(pairs.golden), tells_choices(pairs.candidate)
        if told[0] != told[1]:
            side = "this capture" if told[0] else "the golden"
            self._verdict.notes.append(
                f"{side} does not tell which experts routers chose: rows behind them "
                "are judged as if the choices were the same; record it again"
            )

    def _note_threads(self, limits: ResolvedLimits) -> None:
        sides = self._golden.header.provenance, self._candidate.header.provenance
        old, new = (side.get("threads") for side in sides)
        if limits.is_exact.any() and old != new:
            self._verdict.notes.append(
                f"exact rows need the golden's number of threads: {old}, here {new}"
            )

    def _note_what_is_judged(self, golden: Rows) -> None:
        """Reasons for which nothing of the rows or the tokens could be judged."""
        verdict = self._verdict
        if verdict.judged == 0:
            rows = np.arange(len(golden.key))
            is_module_output = golden.is_of_module(rows) & golden.is_output
            if self._mode == "same" or not len(rows) or is_module_output.any():
                verdict.reasons.append("no row of the golden was computed here")
            else:
                level = self._golden.header.signature.get("level", "")
                verdict.notes.append(
                    f"level {level} holds no module outputs, which alone are judged "
                    "across keys: this verdict is by tokens alone"
                )
                if not verdict.tokens.compared:
                    verdict.reasons.append("there are no tokens to judge either")
        if verdict.missing:
            verdict.reasons.append(f"{verdict.missing} rows of the golden are missing")
        self._note_unrecorded_tokens()

    def _note_unrecorded_tokens(self) -> None:
        """Tokens that one side should have; models that sample none have none."""
        old, new = ({r.label: len(r.tokens) for r in side} for side in self._requests)
        self._verdict.reasons.extend(
            f"request {label}: {missing} of {count} tokens were not recorded"
            for label, (missing, count) in self._unrecorded.items()
            if old.get(label)
        )
        self._verdict.notes.extend(
            f"request {label}: the golden lacks {missing} of {count} tokens, which are "
            "not judged"
            for label, (missing, count) in unrecorded_tokens(self._golden).items()
            if new[label] > old[label]
        )

    def _settle(self, pairs: Pairs, errors: Errors, masks: _Masks) -> None:
        """Status, divergence and notes."""
        verdict = self._verdict
        tokens = verdict.tokens
        largest = float(tokens.largest)
        if largest > float(tokens.allowed):
            verdict.reasons.append(_MOVED_TOKENS)
        if verdict.failed or verdict.reasons:
            verdict.status = "fail"
            self._search = Search(pairs, errors, masks.judged)
            verdict.divergence = find_divergence(
                pairs,
                errors,
                masks.judged,
                (self._golden.header.weights, self._candidate.header.weights),
                self._search,
            )
        elif (
            self._note_weights()
            or verdict.equal < verdict.judged
            or verdict.rerouted
            or tokens.flipped
            or largest > 0
        ):
            verdict.status = "changed"
        self._note()

    def _note_weights(self) -> bool:
        """Says that weights differ where nothing fails for it."""
        sides = self._golden.header.weights, self._candidate.header.weights
        names = sorted(n for found in changed_weights(*sides).values() for n in found)
        if names:
            count = (
                "1 weight differs"
                if len(names) == 1
                else (f"{len(names)} weights differ")
            )
            self._verdict.notes.append(
                f"{count} from the golden's, the first is {names[0]}; no row is "
                "outside its limits"
            )
        return bool(names)

    def _list_worst(self, pairs: Pairs, errors: Errors, judged: _Bools) -> None:
        """Failing rows, without those that only hand on what came before them.

        Drift has no single origin, and inputs have no growth: where nothing else is
        left, all of them are listed.
        """
        verdict = self._verdict
        failed = judged & (errors.ratio > 1.0)
        if not failed.any():
            return
        search = self._search or Search(pairs, errors, judged)
        growth = search.growth()
        divergence = verdict.divergence
        if divergence is not None and divergence.kind != "drift":
            is_own = failed & (growth >= DRIFT)
            if is_own.any():
                verdict.inherited = int((failed & ~is_own).sum())
                failed = is_own
        for i in _worst(pairs, errors, failed):
            finding = errors.finding(i)
            finding.growth = portable(growth[i])
            verdict.worst.append(finding)

    def _note(self) -> None:
        verdict = self._verdict
        notes = []
        if self._mode == "cross":
            keys = f"the golden is of {verdict.golden_key}, this is {verdict.key}: "
            notes.append(
                f"{keys if verdict.golden_key != verdict.key else ''}only module "
                "outputs, logits and tokens are judged, with the limits for another key"
                f"{' of a mixture of experts' if self._is_mixture else ''}"
            )
        moved = self._schedule.moved
        if moved:
            limits = "the limits for other scheduling hold, and "
            notes.append(
                "requests were batched or chunked differently than in the golden "
                f"({_describe_moved(moved)}): from there on "
                f"{limits if self._mode == 'same' else ''}rows without a token "
                "dimension are not judged"
            )
        if verdict.noisy:
            notes.append(
                f"{verdict.noisy} rows have their limits from the noise that the "
                f"golden was calibrated with (x{NOISE_MULTIPLE:g})"
            )
        if self._reroutes.first:
            notes.append(
                f"routers chose other experts from {self._reroutes.first} on: "
                f"{verdict.rerouted} rows that depend on it are not judged, tokens "
                "and logprobs are, with a limit of their own"
            )
        if self._candidate.header.provenance.get(FORCED):
            notes.append("the golden's tokens were fed back: all of decode is judged")
        elif verdict.tokens.flipped is not None:
            notes.append(
                "decode is judged up to the first other token; "
                f"{verdict.unjudged} rows behind it are not judged"
            )
        verdict.notes = [*notes, *verdict.notes]


def _describe_moved(moved: dict[int, int]) -> str:
    shown = sorted(moved.items())[:_SHOWN_REQUESTS]
    text = ", ".join(f"request {label} from position {p}" for label, p in shown)
    more = len(moved) - len(shown)
    return f"{text} and {more} more" if more else text


def _is_whole(segment: str) -> bool:
    """Whether a row has no token dimension."""
    return not segment


def _is_in(values: _I64, wanted: set[int]) -> _Bools:
    return np.isin(values, np.fromiter(wanted, np.int64, len(wanted)))


def _worst(pairs: Pairs, errors: Errors, failed: _Bools) -> list[int]:
    """Failing rows to show, worst first: outputs before inputs, each tensor once."""
    rows = np.flatnonzero(failed)
    is_input = ~pairs.candidate.is_output[pairs.new[rows]]
    order = rows[np.lexsort((-errors.ratio[rows], is_input))]
    seen: set[int] = set()
    shown: list[int] = []
    for i in order.tolist():
        tensor = pairs.line_pair(i)[1].t
        if tensor not in seen:
            seen.add(tensor)
            shown.append(i)
            if len(shown) == WORST:
                break
    return shown
