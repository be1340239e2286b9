# SPDX-License-Identifier: Apache-2.0
"""Windows, labels and row orders, with runners that do what vLLM's do at the edges."""

from types import SimpleNamespace

import pytest
import torch
from toy import Model

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.assemble import assemble
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.dump.capture import StepLine
from pytest_msprobe.engine.requests import RequestTable, is_real_step
from pytest_msprobe.engine.runners import attachment_for, runner_version
from pytest_msprobe.errors import CaptureError

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(enforce_eager=True),
    speculative_config=None,
    parallel_config=SimpleNamespace(),
)


def new(name, tokens, computed=0):
    """A request that is scheduled for the first time."""
    return SimpleNamespace(
        req_id=name, prompt_token_ids=list(range(tokens)), num_computed_tokens=computed
    )


def scheduled(tokens, news=(), cached=()):
    """A scheduler's output.

    Args:
        tokens: Tokens of each request in this step, by id.
        news: Requests scheduled first.
        cached: (id, computed tokens) of the others.
    """
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=list(news),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached],
            num_computed_tokens=[count for _, count in cached],
        ),
        scheduled_encoder_inputs={},
    )


class Runner:
    """A model runner of the first kind around a toy model."""

    def __init__(self):
        self.model = Model()
        self.vllm_config = CONFIG
        self.input_batch = SimpleNamespace(req_ids=[])
        self.result = None
        self.error = None

    def get_model(self):
        return self.model

    def execute_model(self, scheduler_output, intermediate_tensors=None, **kwargs):
        del intermediate_tensors, kwargs
        self.input_batch.req_ids = list(scheduler_output.num_scheduled_tokens)
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens:
            self.model(torch.arange(tokens) % 16)
        if self.error is not None:
            raise self.error
        return self.result

    def sample_tokens(self, grammar_output):
        return grammar_output


@pytest.fixture
def attached(tmp_path):
    """A runner with hooks on: (runner, attachment, function that ends it)."""
    runner = Runner()
    config = DebuggerConfig(level="L0")
    recorder = Recorder(config, tmp_path, rank=0, is_kept=True, is_deferred=True)
    attachment = attachment_for(runner, recorder)
    attachment.install()

    def end():
        attachment.remove()
        return recorder.close()

    return runner, attachment, end


def test_what_is_no_step_is_not_recorded(attached):
    """Empty steps, dummy runs, profile runs and warm-up requests leave nothing."""
    runner, attachment, end = attached
    runner.execute_model(scheduled({}))
    runner.execute_model(scheduled({"a-1": 3}, [new("a-1", 3)]), dummy_run=True)
    runner.execute_model(scheduled({"a-1": 3}, [new("a-1", 3)]), is_profile=True)
    for name in ("_warmup_0_", "_v2_mixed_warmup_1"):
        runner.execute_model(scheduled({name: 3}, [new(name, 3)]))
    runner.model(torch.arange(4))  # profiling calls the model itself

    assert attachment.recorded_steps == 0
    assert end() == []
    assert attachment.requests.known == {}


@pytest.mark.parametrize("result", [None, "output"])
def test_a_step_ends_with_its_tokens_or_its_result(attached, result):
    """A step closes when sample_tokens returns, or with a result of execute_model."""
    runner, attachment, end = attached
    runner.result = result
    for step in range(2):
        runner.execute_model(scheduled({"a": 2}, [] if step else [new("a", 2)],
                                       [("a", 2)] if step else []))  # fmt: skip
        assert attachment.recorded_steps == step + (result is not None)
        if result is None:
            runner.sample_tokens(None)
        assert attachment.recorded_steps == step + 1

    assert [step.step for step in end()] == [0, 1]


def test_a_step_that_raises_is_dropped_and_leaves_no_state(attached):
    """After an exception in a step the next one is recorded as if nothing was."""
    runner, attachment, end = attached
    runner.error = ValueError("in the middle")
    with pytest.raises(ValueError, match="in the middle"):
        runner.execute_model(scheduled({"a": 2}, [new("a", 2)]))
    runner.error = None
    runner.execute_model(scheduled({"b": 3}, [new("b", 3)]))
    runner.sample_tokens(None)

    (step,) = end()
    assert step.layout.tokens == 3
    assert attachment.recorded_steps == 1
    assert "execute_model" not in runner.__dict__


def test_a_step_whose_tokens_were_never_sampled_is_dropped(attached):
    """execute_model twice without sample_tokens in between loses only the first."""
    runner, _, end = attached
    runner.execute_model(scheduled({"a": 2}, [new("a", 2)]))
    runner.execute_model(scheduled({"a": 1}, cached=[("a", 2)]))
    runner.sample_tokens(None)

    (step,) = end()
    assert step.step == 1
    assert step.layout.tokens == 1


def test_capture_ended_between_the_two_calls(attached):
    """A capture may end while a step is open: it is not taken for complete."""
    runner, _, end = attached
    runner.execute_model(scheduled({"a": 2}, [new("a", 2)]))

    assert end() == []
    assert runner.sample_tokens("x") == "x"


def test_ids_with_random_endings_map_to_numbers():
    """Requests are numbered in order of first scheduling, whatever their ids."""
    labels = []
    for suffix in ("8b72a9d0", "0f3e11aa"):
        table = RequestTable()
        names = [f"0-{suffix}", f"cmpl-77-0-{suffix}"]
        table.begin_step(scheduled(dict.fromkeys(names, 4), [new(n, 4) for n in names]))
        labels.append([table.known[name].label for name in names])

    assert labels == [[0, 1], [0, 1]]


def test_rows_of_a_batch_with_a_hole():
    """Row order is the batch's, not that of insertion: a finished row is filled."""
    table = RequestTable()
    first = scheduled({"a": 3, "b": 2, "c": 4}, [new("a", 3), new("b", 2), new("c", 4)])
    table.begin_step(first)
    table.begin_step(scheduled({"b": 1, "c": 1}, cached=[("b", 2), ("c", 4)]))

    layout = table.layout(["c", "b"], None)  # the last row moved into the hole

    rows = [(r.label, r.first_row, r.rows, r.position) for r in layout.requests]
    assert rows == [(2, 0, 1, 4), (1, 1, 1, 2)]
    assert [sample.label for sample in layout.samples] == [2, 1]


def test_rows_of_a_sorted_batch():
    """Model runner V2 sorts decodes first; an unfinished prefill has no sample."""
    table = RequestTable()
    table.begin_step(scheduled({"a": 6}, [new("a", 6)]))
    table.begin_step(scheduled({"a": 1, "b": 4}, [new("b", 9)], [("a", 6)]))

    layout = table.layout(["a", "b"], 8)

    rows = [(r.label, r.first_row, r.rows, r.position) for r in layout.requests]
    assert rows == [(0, 0, 1, 6), (1, 1, 4, 0)]
    assert [sample.is_defined for sample in layout.samples] == [True, False]
    assert (layout.tokens, layout.padded_tokens) == (5, 8)


class SecondRunner(Runner):
    """A runner of the second kind: sorts its batch, keeps a tuple between the calls."""

    def prepare_inputs(self, scheduler_output):
        tokens = scheduler_output.num_scheduled_tokens
        return SimpleNamespace(req_ids=sorted(tokens, key=tokens.get))

    def sample(self, hidden):
        return SimpleNamespace(sampled_token_ids=hidden.new_zeros((2, 1)).long()), None

    def execute_model(self, scheduler_output, *args, **kwargs):
        batch = self.prepare_inputs(scheduler_output)
        rows = torch.arange(scheduler_output.total_num_scheduled_tokens) % 16
        self.execute_model_state = (self.model(rows), batch)

    def sample_tokens(self, grammar_output):
        hidden, _ = self.execute_model_state
        return self.sample(hidden)


def test_the_second_runners_order_is_that_of_its_batch(tmp_path):
    """Rows follow what prepare_inputs returned, not the order of scheduling."""
    module = "vllm.v1.worker.gpu.model_runner"
    runner = type("GPUModelRunner", (SecondRunner,), {"__module__": module})()
    recorder = Recorder(
        DebuggerConfig(level="L0"), tmp_path, rank=0, is_kept=True, is_deferred=True
    )
    attachment = attachment_for(runner, recorder)
    attachment.install()
    runner.execute_model(scheduled({"a": 6, "b": 2}, [new("a", 6), new("b", 2)]))
    assert attachment.recorded_steps == 0  # the logits are still to come
    runner.sample_tokens(None)
    attachment.remove()

    (step,) = recorder.close()
    rows = [(r.label, r.first_row, r.rows) for r in step.layout.requests]
    assert rows == [(1, 0, 2), (0, 2, 6)]
    assert "prepare_inputs" not in runner.__dict__


def test_a_request_of_before_the_capture():
    """A request that was running already gets a label and its position."""
    table = RequestTable()
    table.begin_step(scheduled({"old": 1}, cached=[("old", 17)]))

    (rows,) = table.layout(["old"], None).requests
    assert (rows.label, rows.position) == (0, 17)


@pytest.mark.parametrize("is_cached", [False, True])
def test_encoder_inputs_are_refused(attached, is_cached):
    """Images and audio end the recording with one line, computed now or kept."""
    runner, attachment, end = attached
    request = new("a", 2)
    request.mm_features = ["an image"]
    output = scheduled({"a": 2}, [request])
    output.scheduled_encoder_inputs = {} if is_cached else {"a": [0]}
    runner.result = "output"

    assert runner.execute_model(output) == "output"
    assert attachment.recorded_steps == 0
    with pytest.raises(CaptureError, match="leave them out") as caught:
        end()
    assert "a request has encoder inputs (images, audio)" in str(caught.value)


def test_the_adapter_follows_the_runners_class():
    """A class derived from vLLM's second runner gets the second adapter."""
    base = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu.model_runner"})
    derived = type("CPUModelRunner", (base,), {"__module__": "somewhere.else"})

    assert runner_version(derived()) == 2
    assert runner_version(Runner()) == 1


def test_counters_do_not_count_steps_that_are_not_real(attached):
    """The empty step of an idle engine core does not shift the numbers."""
    runner, _, end = attached
    runner.result = "output"
    runner.execute_model(scheduled({"a": 2}, [new("a", 2)]))
    runner.execute_model(scheduled({}))
    runner.execute_model(scheduled({"a": 1}, cached=[("a", 2)]))

    assembly = assemble(end())
    steps = [line for line in assembly.lines if isinstance(line, StepLine)]
    assert [step.step for step in steps] == [0, 1]


def test_real_steps():
    """Whether a call computes a user's tokens is read from what is scheduled."""
    output = scheduled({"a": 1}, cached=[("a", 4)])

    assert is_real_step(output, {})
    assert not is_real_step(output, {"dummy_run": True})
    assert not is_real_step(scheduled({}), {})
    assert not is_real_step(None, {})
