# SPDX-License-Identifier: Apache-2.0
"""Stands where vLLM would in tests of the pytest plugin that need no model's numbers.

Its engine answers the plugin's calls as workers do and writes real capture files; what
it "computes" are fixed arrays.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import captures
import numpy as np

from pytest_msprobe.dump.capture import encode

METHOD = "msprobe_control"


class LLM:
    """An engine with `ranks` workers; `broken` is why it cannot start.

    All ranks hold the same, but that others than the first are off by `drift`. In
    batches the numbers are off by `jitter`.
    """

    def __init__(self, ranks=1, broken=None, drift=0.0, jitter=0.0, **arguments):
        if broken:
            raise ValueError(broken)
        self.ranks = ranks
        self.drift = drift
        self.jitter = jitter if arguments.get("max_num_seqs", 1) > 1 else 0.0
        self.arguments = arguments
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: False)
        self._folder = None
        self._config = {}
        self._steps = []
        self._tokens = ()
        self._follow = []

    def generate(self, layer="layer", factor=1.0, tokens=()):
        """One step of a model with one layer; a fault multiplies what it gives.

        It samples tokens, or feeds back those it is to follow; returns them.
        """
        self._tokens = tokens
        if self._folder is not None:
            self._steps.append((layer, factor))
        return self._follow[0][1] if self._follow else list(tokens)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        """One reply a rank."""
        if method == "__dir__":
            return [[METHOD]] * self.ranks
        assert method == METHOD
        request = json.loads(args[0])
        action = getattr(self, f"_{request.pop('action')}")
        return action(**request)

    def _status(self):
        return [{"ok": True, "rank": r, "key": captures.KEY} for r in range(self.ranks)]

    def _start(self, folder, config, follow=(), **_more):
        if self._folder is not None:
            error = "a capture is already running on this engine; end it first"
            return [{"ok": False, "error": error, "slug": "double-start"}] * self.ranks
        self._folder, self._config, self._steps = Path(folder), config, []
        self._follow = list(follow)
        return [
            {"ok": True, "rank": rank, "recording": self._is_wanted(rank)}
            for rank in range(self.ranks)
        ]

    def _stop(self, test, **_more):
        folder, self._folder = self._folder, None
        return [self._stop_rank(folder, test, rank) for rank in range(self.ranks)]

    def _abandon(self, folder, **_more):
        assert Path(folder) == self._folder.resolve()
        self._folder = None
        return [{"ok": True, "recording": True}] * self.ranks

    def _is_wanted(self, rank):
        return not self._config["rank"] or rank in self._config["rank"]

    def _header(self):
        if not self._tokens:
            return {}
        own, follow = list(self._tokens), self._follow
        if not follow:
            return {"requests": [captures.request(own, (-0.7,) * len(own))]}
        fed = captures.request(follow[0][1], (-0.7,) * len(follow[0][1]))
        fed.own = own if own != fed.tokens else []
        fed.top = [[(a, -0.7), (b, -0.7)] for a, b in zip(fed.tokens, own, strict=True)]
        return {"requests": [fed], "provenance": {"teacher_forcing": True}}

    def _stop_rank(self, folder, test, rank):
        if folder is None or not self._is_wanted(rank):
            return {"ok": True, "rank": rank, "recording": False}
        calls = []
        for number, (layer, factor) in enumerate(self._steps):
            x = np.linspace(-1.0, 1.0, 32).reshape(4, 8)
            own = factor * (1.0 + self.drift if rank else 1.0) * (1.0 + self.jitter)
            slots = {"input_args.0": x}, {"output.0": x * 2 * own}
            calls.append((captures.module(layer, number=number), 0, *slots))
        capture = captures.capture(calls, test=test, rank=rank, **self._header())
        for _, call in capture.calls():
            call.p = {"output.0": 0}
        path = folder / f"capture.rank{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [*capture.tensors.values(), *capture.entries]
        path.write_bytes(encode(capture.header, lines))
        count = len(self._steps)
        return {
            "ok": True,
            "rank": rank,
            "recording": True,
            "file": str(path),
            "steps": count,
            "rows": 2 * count,
        }
