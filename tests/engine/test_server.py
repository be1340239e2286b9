# SPDX-License-Identifier: Apache-2.0
"""vLLM's server on loopback, told to dump by --additional-config alone."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import engines
import pytest
import tools

from pytest_msprobe.dump.layout import ranks_of, steps_of
from pytest_msprobe.errors import EngineError

START_SECONDS = 180


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(model, port, additional, *options):
    """The command of msProbe's guide, with the module in place of `vllm serve`."""
    return [
        sys.executable, "-W", "ignore",
        "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--dtype", "bfloat16", "--max-model-len", "128",
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--additional-config", json.dumps(additional), *options,
    ]  # fmt: skip


def environment(**changes):
    """A user's environment: without our variable and without a fixed process model."""
    variables = tools.clean_environment(**tools.ENVIRONMENT)
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    variables.pop("MSPROBE_ATTACH", None)
    variables["VLLM_LOGGING_LEVEL"] = "WARNING"
    variables["VLLM_SERVER_DEV_MODE"] = "1"  # opens /collective_rpc
    return {**variables, **changes}


class Server:
    """A running server."""

    def __init__(self, model, folder, additional, *options):
        self.port = free_port()
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(model, self.port, additional, *options),
                env=environment(),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        limit = time.monotonic() + START_SECONDS
        while not self.is_up():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < limit, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def is_up(self):
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def post(self, path, body):
        """A request with JSON and its answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - http above
            return json.load(answer)

    def control(self, action, **arguments):
        """Our control method over HTTP; one reply a rank."""
        payload = json.dumps({"action": action, **arguments})
        body = {"method": "msprobe_control", "args": [payload]}
        return self.post("/collective_rpc", body)["results"]

    def complete(self, prompt="Explain gravity in one sentence.", tokens=4):
        """The guide's request."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens,
                "temperature": 0, "ignore_eos": True}  # fmt: skip
        return self.post("/v1/completions", body)

    def stop(self):
        """Ends it as an operator does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def steps_in(folder):
    """Folders of the complete steps by number."""
    return {n: path for n, path in steps_of(folder).items() if ranks_of(path)}


def read(step):
    """The dump of the only rank of a step."""
    (rank,) = ranks_of(step).values()
    return json.loads((rank / "dump.json").read_text())


GUIDE = tools.GUIDE


# Attached to the worker, so that a fault can be planted over HTTP.
PLANTER = """
class Planter:
    def msprobe_plant(self):
        layer = self.model_runner.get_model().model.layers[2].mlp
        def forward(*args, **kwargs):
            result = type(layer).forward(layer, *args, **kwargs).clone()
            result[0, 3], result[-1, 5] = float("nan"), float("inf")
            return result
        layer.forward = forward
    def msprobe_heal(self):
        del self.model_runner.get_model().model.layers[2].mlp.forward
"""


@pytest.fixture(scope="module")
def served(demo_model, tmp_path_factory):
    """A server that dumps, with the file that switches it."""
    folder = tmp_path_factory.mktemp("server")
    dump = folder / "data_dump"
    config = folder / "config.json"
    config.write_text(
        json.dumps({**GUIDE, "dump_path": str(dump), "dump_enable": True})
    )
    (folder / "msprobe_planter.py").write_text(PLANTER)
    options = ["--enforce-eager", "--worker-extension-cls", "msprobe_planter.Planter"]
    server = Server(demo_model, folder, {"dump_config_path": str(config)}, *options)
    yield server, config, dump
    server.stop()


def test_a_request_is_dumped_step_by_step(served):
    """The guide's request over HTTP leaves msProbe's files for every step of it."""
    server, _, dump = served

    answer = server.complete(tokens=4)

    assert answer["usage"]["completion_tokens"] == 4
    prompt = answer["usage"]["prompt_tokens"]
    steps = steps_in(dump)
    assert list(steps) == [0, 1, 2, 3]
    for number, step in steps.items():
        content = read(step)
        assert content["task"] == "statistics"
        assert content["level"] == "mix"
        data = content["data"]
        rows = prompt if number == 0 else 1
        norm = data["Module.model.norm.RMSNorm.forward.0"]
        assert norm["output"][0]["shape"][0] == rows
        assert "Module.logits_processor.LogitsProcessor.forward.0" in data
        assert "Vllm.unified_attention_with_output.0.forward" in data


def test_dump_enable_switches_at_run_time(served):
    """Changing dump_enable in the file stops and resumes dumping in a live server."""
    server, config, dump = served
    server.complete(tokens=2)
    settings = json.loads(config.read_text())

    config.write_text(json.dumps({**settings, "dump_enable": False}))
    assert_that_requests_add(0, server, dump)

    config.write_text(json.dumps({**settings, "dump_enable": True}))
    assert_that_requests_add(3, server, dump)
    after = steps_in(dump)
    assert list(after) == sorted(after)


def assert_that_requests_add(steps, server, dump):
    """Soon a request of three tokens leaves this many complete steps.

    The file is looked at every half second, and every three while dumping is off.
    """
    limit = time.monotonic() + 30
    while True:
        before = len(steps_in(dump))
        server.complete(tokens=3)
        if len(steps_in(dump)) == before + steps:
            return
        assert time.monotonic() < limit
        time.sleep(0.2)


def test_control_over_http(served, tmp_path):
    """Replies of the control method pass vLLM's HTTP route, errors included."""
    server, _, _ = served
    config = {"level": "L0", "task": "statistics"}

    (status,) = server.control("status")
    assert status["ok"]
    (started,) = server.control("start", config=config, folder=str(tmp_path))
    assert started["ok"], started
    server.complete(tokens=2)
    (stopped,) = server.control("stop")
    assert stopped["rows"] > 300
    (wrong,) = server.control("fly")
    assert not wrong["ok"]


def test_nan_and_infinity_pass_over_http(served, tmp_path):
    """Replies have no NaN, with which vLLM's route would fail; the dump has it."""
    server, _, _ = served
    config = {"level": "L0", "task": "statistics"}
    server.post("/collective_rpc", {"method": "msprobe_plant"})
    try:
        (started,) = server.control("start", config=config, folder=str(tmp_path))
        server.complete(tokens=2)
        (stopped,) = server.control("stop")
    finally:
        server.post("/collective_rpc", {"method": "msprobe_heal"})

    assert started["ok"], started
    assert stopped["ok"], stopped
    content = read(steps_in(tmp_path)[0])
    output = content["data"]["Module.model.layers.2.mlp.Qwen2MLP.forward.0"]["output"]
    assert math.isnan(output[0]["Max"])
    assert content["data"]["Module.model.layers.1.mlp.Qwen2MLP.forward.0"]
    server.complete(tokens=2)


def test_a_second_engine_may_not_write_the_same_dump(served, demo_model):
    """An engine whose dump_path another one writes refuses to start, naming both."""
    _, _, dump = served
    config = {**GUIDE, "level": "L0", "dump_path": str(dump)}

    with (
        pytest.raises(EngineError, match=r"data_dump: process \d+ is writing rank0"),
        engines.started(demo_model, additional_config={"dump_config": config}),
    ):
        pass


def test_stopping_the_server_loses_nothing_that_was_complete(demo_model, tmp_path):
    """A step is on disk before its token is answered, so that no answer lacks one."""
    dump = tmp_path / "dump"
    inline = {**GUIDE, "level": "L0", "dump_path": str(dump)}
    server = Server(demo_model, tmp_path, {"dump_config": inline}, "--enforce-eager")
    try:
        server.complete(tokens=6)
    finally:
        server.stop()

    assert list(steps_of(dump)) == [0, 1, 2, 3, 4, 5]
    assert all(read(step)["data"] for step in steps_of(dump).values())
    log = server.log.read_text()
    assert "rank 0 is dumped to" in log
    assert re.search(r"\d+ rows and \d+ bytes in the first step", log)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({"level": "L7"}, ["--enforce-eager"], "level: expected one of"),
        ({"step": "3"}, ["--enforce-eager"], "step: expected a list"),
        ({}, [], "add --enforce-eager"),
    ],
)
def test_a_server_that_cannot_dump_does_not_start(
    demo_model, tmp_path, config, options, expected
):
    """A broken configuration or graph mode ends the start with one line."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**GUIDE, "dump_path": str(tmp_path / "d"), **config}))
    done = subprocess.run(
        command(demo_model, free_port(), {"dump_config_path": str(path)}, *options),
        env=environment(VLLM_LOGGING_LEVEL="ERROR"),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )

    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "msprobe" in line]
    assert len(lines) == 1
    assert lines[0].startswith("ERROR: msprobe: ")
    assert expected in lines[0]
    assert "Traceback" not in done.stderr
