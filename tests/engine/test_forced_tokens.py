# SPDX-License-Identifier: Apache-2.0
"""Tokens of a golden are fed back, so that all of decode is judged."""

import pytest
import tools

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.engine.client import converse, start_capture, stop_capture
from pytest_msprobe.errors import GoldenError
from pytest_msprobe.golden.store import golden_bytes

HEAD = "logits_processor"
TOKENS = 4


def followed(llm, folder, level, follow=()):
    """A capture that is fed the tokens of others, and what the engine generated."""
    folder.mkdir()
    start = start_capture(
        DebuggerConfig(level=level), folder, decode_steps=TOKENS, follow=follow
    )
    converse(llm, start)
    (output,) = tools.generate(llm, [tools.PROMPT], TOKENS)
    (reply,) = converse(llm, stop_capture("test"))
    return read_capture(tools.Path(reply["file"])), list(output.outputs[0].token_ids)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_decode_is_judged_behind_another_token(engine, tmp_path, level):
    """A fault that flips the first token: fed the golden's, later steps are judged."""
    golden, tokens = followed(engine, tmp_path / "golden", level)
    follow = [(r.prompt_sha256, r.tokens) for r in golden.header.requests]
    assert golden.header.requests[0].tokens == tokens
    assert golden.header.requests[0].own == []
    other = (tokens[0] + 1) % 50
    head = tools.model_of(engine).get_submodule(HEAD)

    def raised(original, *args, **kwargs):
        logits = original(*args, **kwargs)
        if logits is not None:
            logits[:, other] = logits.max() + 0.25
        return logits

    with tools.wrapped_forward(head, raised):
        free, sampled = followed(engine, tmp_path / "free", level)
        forced, generated = followed(engine, tmp_path / "forced", level, follow)
    same, _ = followed(engine, tmp_path / "same", level, follow)

    assert sampled[0] == other
    assert generated == tokens
    (request,) = forced.header.requests
    assert request.tokens == tokens
    assert request.own == [other] * TOKENS
    before, behind = (tools.verdict_of(golden, c) for c in (free, forced))
    assert before.unjudged > 0
    assert behind.judged > before.judged
    assert behind.tokens.compared == TOKENS
    assert behind.tokens.flipped == (0, 0)
    assert behind.divergence.module == HEAD
    # What the model computes from the golden's tokens is the golden's, in every step.
    assert {f.row.call.split(".")[1] for f in behind.worst} <= {HEAD, "argmax", "to"}
    clean = tools.verdict_of(golden, same)
    assert (clean.status, clean.equal) == ("pass", clean.judged)
    with pytest.raises(GoldenError, match="fed the golden's tokens"):
        golden_bytes(forced, "test", "variant")


def test_another_prompt_is_not_followed(engine, tmp_path):
    """Tokens are fed to the request whose prompt they were sampled for, to no other."""
    _, tokens = followed(engine, tmp_path / "golden", "L0")
    follow = [("0" * 64, [token + 1 for token in tokens])]

    recorded, generated = followed(engine, tmp_path / "other", "L0", follow)

    assert generated == tokens
    assert recorded.header.requests[0].own == []
