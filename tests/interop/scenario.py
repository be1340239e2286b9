# SPDX-License-Identifier: Apache-2.0
"""Programs that both tools record: plain PyTorch, the debugger is handed in.

Each program takes a constructed debugger and drives it as a user of msProbe would.
Nothing here imports the package, so that the same file runs beside the real tool.
"""

import collections
import contextlib
import dataclasses
import json
import threading
import time
import types
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from toy import Model

# The package under test and the configuration's file, set by who runs the programs.
TOOL = None
CONFIG = ""

Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024 - untyped on purpose


class Classic(torch.nn.Module):
    """A small network of listed functions, operators and nested modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(16, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.GELU()
            )
            for _ in range(2)
        )
        self.down = torch.nn.Linear(16, 8)  # used by both blocks

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + self.down(block(x))
        scores = torch.softmax(x @ x.transpose(0, 1), dim=-1)
        return (scores @ x).mul(2.0).reshape(-1)


class Echo(torch.nn.Module):
    """Returns what it gets."""

    def forward(self, *values, **named):
        return (*values, *named.values())


def inputs():
    """Token ids of three steps."""
    return [torch.arange(5), torch.tensor([3, 1, 2]), torch.tensor([7])]


def steps(debugger, model=None, count=3, **options):
    """Inference steps."""
    model = model or Classic()
    with torch.no_grad():
        for ids in inputs()[:count]:
            debugger.start(model=model, rank_id=0, **options)
            model(ids)
            debugger.stop()
            debugger.step()


def changed(debugger):
    """The inference steps with one weight changed."""
    model = Classic()
    with torch.no_grad():
        model.blocks[1][1].weight.mul_(1.5)
    steps(debugger, model)


def toy(debugger):
    """The toy model of the debugger's tests: a class that goes around __call__."""
    steps(debugger, Model(), count=1)


def low_precision(debugger):
    """The same network in bfloat16."""
    steps(debugger, Classic().to(torch.bfloat16), count=1)


def half(debugger):
    """The same network in float16."""
    steps(debugger, Classic().to(torch.float16), count=1)


def double(debugger):
    """The same network in float64."""
    steps(debugger, Classic().to(torch.float64), count=1)


def model_list(debugger):
    """Two models in a list."""
    first, second = Classic(), Classic()
    with torch.no_grad():
        debugger.start(model=[first, second], rank_id=0)
        first(torch.arange(5))
        second(torch.arange(3))
        debugger.stop()
        debugger.step()


def two_pairs(debugger):
    """Two pairs of start and stop in one step, and work between them."""
    model = Classic()
    with torch.no_grad():
        for ids in inputs()[:2]:
            debugger.start(model=model, rank_id=0)
            model(ids)
            debugger.stop()
            model(ids)
        debugger.step()


def init_step(debugger):
    """Steps numbered from 7."""
    debugger.set_init_step(7)
    steps(debugger, count=2)


def token_range(debugger):
    """Five forwards of which the second and third are recorded."""
    model = Classic()
    with torch.no_grad():
        debugger.start(model=model, token_range=[1, 2], rank_id=0)
        for count in range(2, 7):
            model(torch.arange(count))
        debugger.stop()
        debugger.step()


def requests(debugger):
    """A batch of three requests, the second one configured."""
    model = Classic()
    with torch.no_grad():
        debugger.start(
            model=model, rank_id=0, scheduled_tokens={"a": 2, "chosen": 2, "c": 1}
        )
        model(torch.arange(5))
        debugger.stop()
        debugger.step()
        debugger.start(model=model, rank_id=0, scheduled_tokens={"a": 2, "c": 3})
        model(torch.arange(5))
        debugger.stop()
        debugger.step()


def train(debugger):
    """Two training steps."""
    model = Classic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ids in inputs()[:2]:
        debugger.start(model=model, rank_id=0)
        loss = model(ids).sum()
        loss.backward()
        debugger.stop()
        optimizer.step()
        optimizer.zero_grad()
        debugger.step()


def operators(debugger):
    """Operators, methods and functions of the same name."""
    debugger.start(rank_id=0)
    a = torch.tensor([1.0, -2.0, 3.0])
    b = torch.tensor([2.0, 0.5, -1.0])
    _ = a + b, a.add(b), torch.add(a, b), 1 + a, a - b, 2 - a, a * b, a.mul(b)
    _ = a / b, a // b, a % b, a**2, -a, abs(a), a == b, a < b, a.lt(b), a >= b
    _ = a @ b, torch.dot(a, b), torch.linalg.norm(a), torch.exp(a), a.sum(dim=0)
    functional = torch.nn.functional
    _ = functional.softmax(a, dim=0), functional.normalize(a, 2.0, dim=0)
    _ = functional.layer_norm(a, (3,), eps=1e-3), a.norm(), a.norm(1, dim=0)
    _ = functional.pad(a, (1, 1)), functional.dropout(a, 0.0, training=False)
    flags = a > 0
    _ = flags & flags, flags | flags, flags ^ flags, torch.where(flags, a, b)
    a += b
    a *= 2
    a[0] = 5.0
    bool(flags.any())
    debugger.stop()
    debugger.step()


def in_place(debugger):
    """Functions that write their argument, and out=."""
    debugger.start(rank_id=0)
    x = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    torch.nn.functional.relu_(x)
    x.add_(1)
    x.index_put_((torch.tensor([0]),), torch.tensor([9.0]))
    x.masked_fill_(x > 4, 0.5)
    torch.add(x, x, out=torch.zeros(4))
    torch.cumsum(x, 0, out=torch.zeros(4))
    x.copy_(torch.ones(4))
    debugger.stop()
    debugger.step()


def values(debugger):
    """Arguments of many kinds, nested and not."""
    model = torch.nn.Sequential()
    model.echo = Echo()
    t = torch.tensor([1.0, 2.0])
    debugger.start(model=model, rank_id=0)
    model.echo(1, 2.5, True, "text", None, 3 + 4j, b"x")
    model.echo([t, [t, 1]], (t, None), {"k": t, 3: [t]}, Pair(t, 1))
    model.echo(slice(1, None, 2), ..., torch.Size([1, 2]), torch.channels_last)
    model.echo(torch.float32, torch.device("cpu"), range(3), {1, 2}, len)
    model.echo(np.arange(3.0), np.int64(3), np.float32(0.5), np.bool_(1), np.zeros(0))
    model.echo(np.array([3, 4]), np.array(["a"]))
    model.echo(float("nan"), float("inf"), -float("inf"))
    model.echo(x=t, y=[t], z=None, dtype=torch.float32, device=torch.device("cpu"))
    model.echo([], {}, ())
    debugger.stop()
    debugger.step()


DTYPES = (
    "float16 bfloat16 float32 float64 complex64 complex128 int8 uint8 int16 int32 "
    "int64 bool float8_e4m3fn float8_e5m2"
).split()


def tensors():
    """One tensor of each dtype and layout, by name."""
    base = torch.arange(1, 13, dtype=torch.float32).reshape(3, 4) / 3
    found = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        found[name] = base.to(dtype)
        if "float8" not in name:
            found[f"{name}_0d"] = base[1, 1].to(dtype)
            found[f"{name}_strided"] = base.to(dtype)[:, ::2]
    found["empty"] = torch.zeros(0, 3)
    found["transposed"] = base.t()
    found["expanded"] = base[:1].expand(3, 4)
    found["offset"] = base[1:, 1:]
    found["nan"] = torch.tensor([1.0, float("nan"), 2.0])
    found["inf"] = torch.tensor([1.0, float("inf"), -float("inf")])
    found["plus_inf"] = torch.tensor([1.0, float("inf")])
    found["overflow"] = torch.full((100,), 60000.0, dtype=torch.float16)
    found["meta"] = torch.empty(2, device="meta")
    found["grad"] = base.clone().requires_grad_()
    found["parameter"] = torch.nn.Parameter(base.clone())
    found["odd"] = torch.arange(7, dtype=torch.uint8)
    return found


def echo_tensors(debugger, found):
    """Passes tensors through modules of their own, one a call."""
    model = torch.nn.Sequential()
    for name in found:
        model.add_module(f"d_{name}", Echo())
    debugger.start(model=model, rank_id=0)
    with torch.no_grad():
        for name, tensor in found.items():
            getattr(model, f"d_{name}")(tensor)
    debugger.stop()
    debugger.step()


def dtypes(debugger):
    """Tensors of every dtype and layout."""
    echo_tensors(debugger, tensors())


def dtypes_xor(debugger):
    """Those of which the real tool can write the xor checksum."""
    found = tensors()
    del found["complex64_0d"], found["complex128_0d"]
    echo_tensors(debugger, found)


RARE = "uint16 uint32 uint64 float8_e4m3fnuz float8_e5m2fnuz".split()


def dtypes_rare(debugger):
    """Tensors of which the real tool has a checksum but no statistics."""
    base = torch.arange(1, 13, dtype=torch.float32).reshape(3, 4) / 3
    found = {}
    for name in RARE:
        found[f"rare_{name}"] = base.to(getattr(torch, name))
        found[f"rare_{name}_strided"] = found[f"rare_{name}"][:, ::2]
    echo_tensors(debugger, found)


def dtypes_saved(debugger):
    """Those that the real tool can save: it frees the storage of float8 on the CPU."""
    found = tensors()
    echo_tensors(debugger, {n: t for n, t in found.items() if "float8" not in n})


def saved(debugger):
    """Variables saved by hand, with their gradients."""
    for _ in range(2):
        debugger.start(rank_id=0)
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        y = w * 3
        debugger.save(y, "y")
        debugger.save({"a": [w, 1], "b": "text"}, "nested")
        debugger.save(y, "y", save_backward=False)
        debugger.save(2.5, "number")
        y.sum().backward()
        debugger.stop()
        debugger.step()


def custom_api(debugger):
    """A function of the user's own, registered and taken off again."""
    mine = types.ModuleType("mine")
    mine.twice = lambda x: x * 2
    debugger.register_custom_api(mine, "twice")
    debugger.start(rank_id=0)
    mine.twice(torch.ones(2))
    debugger.stop()
    debugger.restore_custom_api(mine, "twice")
    debugger.start(rank_id=0)
    mine.twice(torch.ones(2))
    debugger.stop()
    debugger.step()


def one_module(debugger):
    """A single module recorded between module_dump and module_dump_end."""
    model = Classic()
    debugger.start(rank_id=0)
    with torch.no_grad():
        torch.exp(torch.ones(2))
        TOOL.module_dump(model.blocks[0], "chosen")
        model(torch.arange(3))
        TOOL.module_dump_end()
        torch.exp(torch.ones(2))
    debugger.stop()
    debugger.step()


@dataclasses.dataclass
class Record:
    """A dataclass as an argument."""

    t: torch.Tensor
    n: int = 3


def more_values(debugger):
    """Arguments that fewer people think of."""
    model = torch.nn.Sequential()
    model.echo = Echo()
    t = torch.tensor([1.0, 2.0])
    debugger.start(model=model, rank_id=0)
    model.echo(Record(t), [Record(t)], {"a": Record(t, 4)})
    model.echo(frozenset({1}), bytearray(b"x"), object, torch.strided)
    model.echo({1: {2: {3: t}}}, [[[[t]]]], collections.OrderedDict(a=t))
    model.echo(True, -1, 10**30, 1e300, 'u\n"', "")
    model.echo(torch.tensor(3), torch.tensor(True), torch.tensor([]))
    model.echo(output_dtype=torch.int8, device="cpu", dtype="auto")
    model.echo(slice(None), slice(t, None), (slice(1, 2), ...))
    model.echo(*[t] * 300)
    model.echo([t] * 300)
    model.echo(np.array(3.5), np.array([True]), np.str_("a"), np.float64(2.0))
    debugger.stop()
    debugger.step()


class Failing(torch.nn.Module):
    """Raises behind a call of its own."""

    def __init__(self):
        super().__init__()
        self.child = torch.nn.Linear(4, 4)

    def forward(self, x):
        raise ValueError(self.child(x).shape)


class Trying(torch.nn.Module):
    """Goes on where a part of it fails."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bad, self.good = Failing(), torch.nn.Linear(4, 4)

    def forward(self, x):
        with contextlib.suppress(ValueError):
            self.bad(x)
        return self.good(x).exp()


def failing(debugger):
    """Two steps of a model of which a part fails."""
    model = Trying()
    for _ in range(2):
        debugger.start(model=model, rank_id=0)
        with torch.no_grad():
            model(torch.ones(2, 4))
        debugger.stop()
        debugger.step()


class Again(torch.nn.Module):
    """Calls itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.child = torch.nn.Linear(4, 4)

    def forward(self, x, times=2):
        x = self.child(x)
        return self(x, times=times - 1) if times else x


def recursive(debugger):
    """A module that calls itself."""
    model = torch.nn.Sequential()
    model.again = Again()
    debugger.start(model=model, rank_id=0)
    with torch.no_grad():
        model.again(torch.ones(2, 4))
        model.again(torch.ones(1, 4), 1)
    debugger.stop()
    debugger.step()


def hooked(debugger):
    """Hooks of the user's own that change what modules get and give."""
    model = Classic()
    model.blocks[0][1].register_forward_hook(lambda _m, _a, result: result * 2)
    model.blocks[1][1].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    steps(debugger, model, count=2)


def autocast(debugger):
    """The network under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steps(debugger, count=1)


def another_thread(debugger):
    """The model runs in another thread than start and stop."""
    model = Classic()

    def run():
        with torch.no_grad():
            model(torch.arange(5))

    debugger.start(model=model, rank_id=0)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    debugger.stop()
    debugger.step()


def transforms(debugger):
    """Functions inside vmap and grad."""
    debugger.start(rank_id=0)
    torch.vmap(lambda x: x.exp())(torch.ones(3))
    torch.func.grad(lambda x: x.sin().sum())(torch.ones(3))
    debugger.stop()
    debugger.step()


def apis(debugger):
    """Functions of many forms: several results, choices, lists, written views."""
    functional = torch.nn.functional
    torch.manual_seed(0)
    x, image = torch.randn(2, 3, 8), torch.randn(2, 3, 6, 6)
    index = torch.zeros(2, 1, 8, dtype=torch.int64)
    debugger.start(rank_id=0)
    _ = x.max(dim=-1), torch.max(x, 1), x.topk(2), x.sort(-1, descending=True)
    _ = torch.split(x, 4, dim=-1), x.unbind(0), torch.cat([x, x], dim=1)
    _ = torch.einsum("bij,bkj->bik", x, x), torch.std_mean(x, dim=0)
    _ = x.gather(1, index), x.scatter(1, index, 1.0), torch.linalg.svd(x[0])
    _ = (
        functional.max_pool2d(image, 2),
        functional.max_pool2d(image, 2, return_indices=True),
    )
    _ = functional.conv2d(image, torch.ones(4, 3, 3, 3), padding=1)
    _ = functional.interpolate(image, scale_factor=2), functional.unfold(image, 2)
    _ = functional.batch_norm(image, torch.zeros(3), torch.ones(3), training=True)
    _ = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    _ = functional.cross_entropy(x[0], torch.tensor([1, 2, 3]), reduction="sum")
    _ = functional.gelu(x, approximate="tanh"), functional.dropout(x, 0.0)
    _ = functional.relu(x.clone(), inplace=True), x.to(torch.float16), x.numpy()
    _ = 2 / x, 3 // x.abs().add(1), 2**x, x.long() << 1, ~(x > 0), x % 2
    torch._foreach_mul_([x, image], 2.0)
    x[:, 1:].add_(1)
    x[0].t().mul_(2)
    x[x > 1] = 0.5
    _ = x.sum(), image.sum()
    debugger.stop()
    debugger.step()


def checkpointed(debugger):
    """A part of the network is computed again in the backward."""
    model = Classic()
    debugger.start(model=model, rank_id=0)
    x = model.embed(torch.arange(5))
    y = checkpoint(model.blocks[0], x, use_reentrant=False)
    model.down(y).sum().backward()
    debugger.stop()
    debugger.step()


def optimized(debugger):
    """Training steps with clipping and optimizer recorded."""
    model = Classic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for ids in inputs()[:2]:
        debugger.start(model=model, rank_id=0)
        model(ids).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        debugger.stop()
        debugger.step()


LIBRARY = torch.library.Library("msprobe_interop", "DEF")
LIBRARY.define("twice(Tensor x, int n=2) -> Tensor")
LIBRARY.define("fill(Tensor(a!) out, Tensor x) -> ()")
LIBRARY.impl("twice", lambda x, n=2: x * n, "CPU")
LIBRARY.impl("fill", lambda out, x: (out.copy_(x), None)[1], "CPU")


def operators_of_a_library(debugger):
    """Operators of torch.ops that were registered by others."""
    own = torch.ops.msprobe_interop
    debugger.start(rank_id=0)
    own.twice(torch.ones(2))
    own.twice(torch.ones(2), n=3)
    own.fill(torch.zeros(2), torch.ones(2))
    debugger.stop()
    debugger.step()


def switched(debugger):
    """Four steps, of which the second and third are switched off in the file."""
    path = Path(CONFIG)
    model = Classic()
    for is_on, wait_s in ((True, 0.0), (False, 0.7), (False, 0.0), (True, 3.2)):
        time.sleep(wait_s)  # for so long the file is not looked at again
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "dump_enable": is_on}))
        debugger.start(model=model, rank_id=0)
        with torch.no_grad():
            model(torch.arange(3))
        debugger.stop()
        debugger.step()


PROGRAMS = {
    program.__name__: program
    for program in (
        steps,
        changed,
        toy,
        low_precision,
        half,
        double,
        model_list,
        two_pairs,
        init_step,
        token_range,
        requests,
        train,
        operators,
        in_place,
        values,
        dtypes,
        dtypes_xor,
        dtypes_rare,
        dtypes_saved,
        saved,
        custom_api,
        one_module,
        more_values,
        failing,
        recursive,
        hooked,
        autocast,
        another_thread,
        transforms,
        apis,
        checkpointed,
        optimized,
        operators_of_a_library,
        switched,
    )
}
