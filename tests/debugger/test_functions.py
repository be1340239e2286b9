# SPDX-License-Identifier: Apache-2.0
"""Level L1: which calls become rows, their names and roles."""

import inspect
import sys
import threading
import types

import pytest
import torch
from toy import Model

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.functions import (
    FunctionTable,
    operator_functions,
    read_op_list,
)
from pytest_msprobe.debugger.materialize import materialize
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ways")


def calls_of(function, tmp_path, model=None, **options):
    """The calls that a function makes, recorded."""
    config = DebuggerConfig(**{"level": "L1", **options})
    recorder = Recorder(config, tmp_path, rank=0, is_kept=True, is_deferred=True)
    recorder.attach(model)
    recorder.begin_step(0)
    try:
        with recorder.recording:
            function()
        step = materialize(recorder.collector.end_step())
    finally:
        recorder.detach()
    recorder.collector.raise_error()
    return {call.name: call for call in step.calls}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda a: a + a, "Tensor.__add__.0.forward"),
        (lambda a: a.add(a), "Tensor.add.0.forward"),
        (lambda a: torch.add(a, a), "Torch.add.0.forward"),
        (lambda a: a * 2, "Tensor.__mul__.0.forward"),
        (lambda a: a @ a, "Tensor.__matmul__.0.forward"),
        (lambda a: a < a, "Tensor.__lt__.0.forward"),
        (lambda a: a.lt(a), "Tensor.lt.0.forward"),
        (lambda a: a == a, "Tensor.__eq__.0.forward"),
        (lambda a: 2 - a, "Tensor.__rsub__.0.forward"),
        (lambda a: torch.nn.functional.silu(a), "Functional.silu.0.forward"),
        (lambda a: torch.nn.functional.sigmoid(a), "Functional.sigmoid.0.forward"),
        (lambda a: torch.nn.functional.linear(a, a), "Functional.linear.0.forward"),
        (lambda a: torch.linalg.norm(a), "Torch.norm.0.forward"),
        (lambda a: torch.ops.aten.relu(a), "Aten.relu.0.forward"),
        (lambda a: torch.ops.aten.relu.default(a), "Aten.relu.0.forward"),
        (lambda a: a.softmax(-1), "Tensor.softmax.0.forward"),
    ],
)
def test_names(tmp_path, function, name):
    """Each way of calling has msProbe's name, or that of its operator namespace."""
    a = torch.ones(2, 2)

    assert list(calls_of(lambda: function(a), tmp_path)) == [name]


def test_in_place_operator_has_its_own_name(tmp_path):
    """`a += b` and `a.add_(b)` are told apart, values before and after are kept."""
    a = torch.zeros(2)

    def run():
        nonlocal a
        a += 1
        a.add_(1)

    calls = calls_of(run, tmp_path)

    assert list(calls) == ["Tensor.__iadd__.0.forward", "Tensor.add_.0.forward"]
    befores = [c.input_args[0].rows[0, 0] for c in calls.values()]
    afters = [c.output[0].rows[0, 0] for c in calls.values()]
    assert befores == [0.0, 1.0]
    assert afters == [1.0, 2.0]


def test_setitem_output_is_the_tensor_written(tmp_path):
    """What __setitem__ wrote is an output behind the null it returned."""
    a = torch.zeros(3)

    def run():
        a[1] = 5.0

    (call,) = calls_of(run, tmp_path).values()

    assert call.output[0] is None
    assert call.output[1].rows[0, 0] == 5.0
    assert call.input_args[0].rows[0, 0] == 0.0


def test_getters_views_and_unlisted_calls_leave_no_row(tmp_path):
    """Attributes, indexing and functions that are not listed are passed through."""
    a = torch.ones(2, 2)

    def run():
        assert a.shape == (2, 2)
        assert a.dtype == torch.float32
        a[0, 0].item()
        torch.zeros(3)

    assert calls_of(run, tmp_path) == {}


def test_low_risk_calls_need_risk_level_all(tmp_path):
    """View-like calls are recorded at ALL, and CORE keeps the heavy ones."""
    a = torch.ones(2, 2)

    def run():
        a.reshape(4)
        torch.nn.functional.linear(a, a)
        a.exp()

    assert [n.split(".")[1] for n in calls_of(run, tmp_path, risk_level="ALL")] == [
        "reshape",
        "linear",
        "exp",
    ]
    assert [n.split(".")[1] for n in calls_of(run, tmp_path)] == ["linear", "exp"]
    assert [n.split(".")[1] for n in calls_of(run, tmp_path, risk_level="CORE")] == [
        "linear"
    ]


def test_list_switches_risk_level_off(tmp_path):
    """With a list the risk level plays no part, as in msProbe."""
    a = torch.ones(2, 2)

    assert list(calls_of(lambda: a.reshape(4), tmp_path, names=("reshape",))) == [
        "Tensor.reshape.0.forward"
    ]


def test_nested_listed_calls_count_once(tmp_path):
    """Only the outermost recorded function leaves a row."""
    a = torch.ones(2, 2)

    names = list(calls_of(lambda: torch.nn.functional.softplus(a).sum(), tmp_path))

    assert names == ["Functional.softplus.0.forward", "Tensor.sum.0.forward"]


def test_memory_nobody_wrote_is_undefined(tmp_path):
    """What torch.empty gave is undefined until somebody writes it."""

    def run():
        a = torch.empty(4)
        a.add(1)
        a.fill_(2)
        a.add(1)

    calls = calls_of(run, tmp_path)

    roles = {name: call.input_args[0].role for name, call in calls.items()}
    assert roles == {
        "Tensor.add.0.forward": "undefined",
        "Tensor.fill_.0.forward": "undefined",
        "Tensor.add.1.forward": "read",
    }
    assert calls["Tensor.fill_.0.forward"].output[0].role == "read"


def test_writes_by_unlisted_methods_define_memory(tmp_path):
    """copy_ is not recorded, but what it wrote is defined."""

    def run():
        a = torch.empty(4)
        a.copy_(torch.ones(4))
        a.add(1)

    (call,) = calls_of(run, tmp_path).values()

    assert call.input_args[0].role == "read"


def test_views_share_the_fate_of_their_memory(tmp_path):
    """A view of memory nobody wrote is undefined too, and writing it defines all."""

    def run():
        a = torch.empty(4, 2)
        a.view(8).add(1)
        a[1:].zero_()
        a.add(1)

    calls = calls_of(run, tmp_path)

    assert calls["Tensor.add.0.forward"].input_args[0].role == "undefined"
    assert calls["Tensor.add.1.forward"].input_args[0].role == "read"


def test_out_argument_is_undefined_before_and_an_output_after(tmp_path):
    """What `out=` held before is never judged."""
    a, out = torch.ones(2), torch.zeros(2)

    (call,) = calls_of(lambda: torch.add(a, a, out=out), tmp_path).values()

    assert call.input_kwargs["out"].role == "undefined"
    assert call.output[0].rows[0, 0] == 2.0


@pytest.fixture(scope="module")
def library():
    """Operators of our own with marked and unmarked writes and handles."""
    lib = torch.library.Library("msprobe_test", "DEF")
    lib.define("marked(Tensor(a!) out, Tensor x) -> ()")
    lib.define("silent(Tensor out, Tensor x) -> ()")
    lib.define("handled(Tensor x, Tensor handler_tensor, Tensor key_cache) -> Tensor")

    def write(out, x):
        out.copy_(x)

    for name in ("marked", "silent"):
        lib.impl(name, write, "CPU")
    lib.impl("handled", lambda x, *_: x + 1, "CPU")
    yield torch.ops.msprobe_test
    lib._destroy()


@pytest.mark.parametrize("name", ["marked", "silent"])
def test_written_arguments_are_outputs(tmp_path, library, name):
    """An operator's marked writes are outputs; one that marks nothing writes all."""
    out, x = torch.zeros(2), torch.full((2,), 3.0)

    (call,) = calls_of(lambda: getattr(library, name)(out, x), tmp_path).values()

    assert call.output[0] is None
    assert call.input_args[0].rows[0, 0] == 0.0
    assert call.output[1].rows[0, 0] == 3.0
    assert len(call.output) == (2 if name == "marked" else 3)


def test_handles_and_caches_are_opaque(tmp_path, library):
    """Arguments named as handles and KV caches are never judged."""
    a = torch.ones(2)

    (call,) = calls_of(lambda: library.handled(a, a, a), tmp_path).values()

    assert [value.role for value in call.input_args] == ["read", "opaque", "opaque"]
    assert call.name == "Msprobe_test.handled.0.forward"


def test_namespaces_of_the_configuration_keep_msprobes_prefix(tmp_path, library):
    """custom_op_namespaces writes the namespace as it is."""
    a = torch.ones(2)

    names = calls_of(
        lambda: library.handled(a, a, a),
        tmp_path,
        custom_op_namespaces=("msprobe_test",),
    )

    assert list(names) == ["msprobe_test.handled.0.forward"]


def test_a_users_list_adds_and_removes(tmp_path):
    """Removing an API stops its rows, adding one starts them."""
    path = tmp_path / "ops.yaml"
    path.write_text("tensor:\n  - exp\ntorch:\n  - zeros_like\n")
    a = torch.ones(2)

    def run():
        a.exp()
        a + 1
        torch.zeros_like(a)

    names = calls_of(
        run, tmp_path, support_wrap_ops=str(path), risk_level="ALL", names=("",)
    )

    assert list(names) == ["Tensor.exp.0.forward", "Torch.zeros_like.0.forward"]


def test_a_list_can_name_functions_of_a_module_of_ones_own(tmp_path, monkeypatch):
    """A group named like a module records its functions, until they are taken out."""
    module = types.ModuleType("own_kernels")
    module.twice = lambda x: x * 2
    original = module.twice
    monkeypatch.setitem(sys.modules, "own_kernels", module)
    path = tmp_path / "ops.yaml"
    a = torch.ones(2)

    path.write_text("own_kernels:\n  - twice\n")
    names = calls_of(lambda: module.twice(a), tmp_path, support_wrap_ops=str(path))
    assert list(names) == ["own_kernels.twice.0.forward"]
    assert module.twice is original

    path.write_text("own_kernels: []\n")
    assert not calls_of(lambda: module.twice(a), tmp_path, support_wrap_ops=str(path))


class Suspicious(torch.nn.Module):
    """Looks at torch's functions and at its arguments before it uses them."""

    def forward(self, x):
        functional = torch.nn.functional
        assert type(torch.add) is types.BuiltinFunctionType
        assert type(torch.Tensor.add) is types.MethodDescriptorType
        assert type(functional.softmax) is types.FunctionType
        assert (torch.add, functional.softmax, torch.Tensor.__add__) == KNOWN
        assert torch.overrides.is_tensor_method_or_property(torch.Tensor.add)
        assert "input" in inspect.signature(functional.softmax).parameters
        assert functional.softmax.__module__ == "torch.nn.functional"
        assert isinstance(torch.ops.aten.relu, torch._ops.OpOverloadPacket)
        assert torch.ops.aten.relu.default is RELU
        assert type(x) is torch.Tensor
        assert type(x.add(1)) is torch.Tensor
        return torch.ops.aten.relu.default(functional.softmax(x + 1, dim=-1))


KNOWN = (torch.add, torch.nn.functional.softmax, torch.Tensor.__add__)
RELU = torch.ops.aten.relu.default


def test_models_that_check_torchs_functions_run_unchanged(tmp_path, ways):
    """Types and identities of functions are torch's own while calls are recorded."""
    if ways == "replaced":
        pytest.skip("it replaces functions: such a model needs the function mode")
    model = torch.nn.Sequential(Suspicious())
    x = torch.randn(2, 3)
    results = []

    names = calls_of(lambda: results.append(model(x)), tmp_path, model, level="mix")

    assert torch.equal(results[0], model(x))
    assert {
        "Tensor.__add__.0.forward",
        "Functional.softmax.0.forward",
        "Aten.relu.0.forward",
        "Module.0.Suspicious.forward.0",
    } <= set(names)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda a, _s: 1 + a, "__radd__"),
        (lambda a, _s: a + 1, "__add__"),
        (lambda a, s: s * a, "__rmul__"),
        (lambda a, s: a * s, "__mul__"),
        (lambda a, s: s * a.relu(), "__rmul__"),
        (lambda a, s: a.relu() * s, "__mul__"),
        (lambda a, _s: a + a, "__add__"),
        (lambda a, _s: -a, "__neg__"),
        (lambda a, _s: a.neg(), "neg"),
        (lambda a, _s: a.__rdiv__(2), "__rdiv__"),
    ],
)
def test_swapped_and_unary_operators_have_names_of_their_own(tmp_path, function, name):
    """`1 + a` is not `a + 1`, and `-a` is not `a.neg()`, as in msProbe."""
    a = torch.ones(2)

    found = calls_of(lambda: function(a, 3.0), tmp_path)

    assert f"Tensor.{name}.0.forward" in found
    assert len(found) == (2 if "relu" in "".join(found) else 1)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (lambda f, a: f.softmax(a, dim=0), 1, ["dim"]),
        (lambda f, a: f.softmax(a, 0), 2, []),
        (lambda f, a: f.layer_norm(a, (3,)), 2, []),
        (lambda f, a: f.layer_norm(a, (3,), eps=1e-3), 2, ["eps"]),
        (lambda f, a: f.normalize(a, 2.0, dim=0), 2, ["dim"]),
        (lambda _f, a: a.norm(1, dim=0), 2, ["dim"]),
        (lambda _f, a: a.norm(), 1, []),
        (lambda f, a: f.softmax(*(a,), dim=0), None, None),
    ],
)
def test_arguments_stand_where_the_caller_wrote_them(tmp_path, function, args, kwargs):
    """Functions in Python show the caller's arguments, without defaults."""
    a = torch.ones(3)

    (call,) = calls_of(lambda: function(torch.nn.functional, a), tmp_path).values()

    if args is not None:
        assert len(call.input_args) == args
        assert list(call.input_kwargs) == kwargs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a", "expected groups"),
        ("tensor: exp", "tensor: expected a list"),
        ("nonsense_group: [a]", "expected one of functional"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, expected):
    """A list of another form is one line that names the file."""
    path = tmp_path / "ops.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=expected) as caught:
        read_op_list(path)

    assert "\n" not in str(caught.value)


def test_packaged_list_has_the_documented_names():
    """The packaged list holds as many names a group as msProbe documents."""
    counts = {group: len(names) for group, names in read_op_list(None).items()}

    assert counts == {
        "functional": 126,
        "tensor": 491,
        "torch": 506,
        "_VF": 1,
        "distributed": 18,
    }


def test_every_operator_is_known():
    """For each Python operator the function that a mode sees has been found."""
    names = {name for names in operator_functions().values() for name in names}

    assert {"__add__", "__matmul__", "__iadd__", "__lt__", "__and__"} <= names


def test_table_survives_functions_of_any_kind(tmp_path):
    """Lookups never raise, whatever a mode is called with."""
    collector = Collector(DebuggerConfig(level="L1"))
    table = FunctionTable(collector, read_op_list(None), ())

    for thing in (len, torch.Tensor.shape.__get__, torch.ops.aten.add, lambda: None):
        assert table.lookup(thing) is not None


def test_own_statistics_are_never_recorded(tmp_path):
    """What the tool computes itself leaves no rows: a tensor without a kernel."""
    z = torch.complex(torch.ones(3), torch.ones(3))

    calls = calls_of(lambda: z.exp(), tmp_path, model=Model(), level="mix")

    assert list(calls) == ["Tensor.exp.0.forward"]


def test_other_threads_are_not_recorded(tmp_path):
    """A mode sees its own thread only."""
    a = torch.ones(2)

    def run():
        thread = threading.Thread(target=lambda: a.exp())
        thread.start()
        thread.join()

    assert calls_of(run, tmp_path) == {}


@pytest.mark.parametrize("mode", ["md5", "xor"])
def test_tensors_inside_a_transform_have_no_checksum(tmp_path, mode):
    """They have no bytes of their own; recording goes on."""
    x = torch.ones(3)

    def run():
        torch.vmap(lambda t: t.exp())(x)
        x.cos()

    calls = calls_of(run, tmp_path, summary_mode=mode)

    assert calls["Tensor.exp.0.forward"].input_args[0].digest is None
    assert calls["Tensor.cos.0.forward"].input_args[0].digest is not None


def test_tensors_inside_a_transform_have_rows(tmp_path):
    """Inside vmap and grad a tensor shows what it stands for, and what it is."""
    x = torch.ones(3)

    def run():
        torch.vmap(lambda t: t.exp())(x)
        torch.func.grad(lambda t: t.sin().sum())(x)
        x.cos()

    calls = calls_of(run, tmp_path, model=Model(), level="mix")

    inputs = {
        name: (call.input_args[0].type_name, call.input_args[0].shape)
        for name, call in calls.items()
        if call.kind == "forward"
    }
    assert inputs == {
        "Tensor.exp.0.forward": ("BatchedTensor", (3,)),
        "Tensor.sin.0.forward": ("GradTrackingTensor", (3,)),
        "Tensor.sum.0.forward": ("GradTrackingTensor", (3,)),
        "Tensor.cos.0.forward": ("torch.Tensor", (3,)),
    }
    assert calls["Tensor.exp.0.forward"].input_args[0].rows[0, 0] == 1.0


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda a: 2 / a, ["Tensor.reciprocal.0", "Tensor.__mul__.0"]),
        (lambda a: 3 // a, ["Torch.floor_divide.0"]),
        (lambda a: a.int() << 1, ["Tensor.__lshift__.0"]),
        (
            lambda a: 2 / a * a,
            ["Tensor.reciprocal.0", "Tensor.__mul__.0", "Tensor.__mul__.1"],
        ),
    ],
)
def test_operators_without_a_name_show_what_they_call(tmp_path, function, names):
    """`2 / a` calls an alias that no list has; its parts are rows, as in msProbe."""
    a = torch.ones(2)

    assert list(calls_of(lambda: function(a), tmp_path)) == [
        f"{name}.forward" for name in names
    ]


def test_functions_that_choose_between_two_have_one_name(tmp_path):
    """A function and its form with indices have one name and the caller's arguments."""
    functional, a = torch.nn.functional, torch.ones(1, 1, 4, 4)

    def run():
        functional.max_pool2d(a, 2)
        functional.max_pool2d(a, 2, return_indices=True)
        functional.max_pool2d_with_indices(a, 2, stride=1)

    calls = calls_of(run, tmp_path)

    found = {
        name: (len(c.input_args), list(c.input_kwargs)) for name, c in calls.items()
    }
    assert found == {
        "Functional.max_pool2d.0.forward": (2, []),
        "Functional.max_pool2d.1.forward": (2, ["return_indices"]),
        "Functional.max_pool2d_with_indices.0.forward": (2, ["stride"]),
    }
    assert len(calls["Functional.max_pool2d.1.forward"].output) == 2


def test_marks_of_the_profiler_leave_no_row(tmp_path):
    """record_function calls operators that compute nothing."""

    def run():
        with torch.profiler.record_function("part"):
            torch.exp(torch.ones(1))

    assert list(calls_of(run, tmp_path)) == ["Torch.exp.0.forward"]


def test_names_of_collective_operations_are_core(tmp_path):
    """Gather and scatter are recorded at CORE on tensors too, as in msProbe."""
    a, index = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int64)

    names = list(calls_of(lambda: a.gather(0, index), tmp_path, risk_level="CORE"))

    assert names == ["Tensor.gather.0.forward"]


def fused_adamw(tensors):
    """One step of torch's fused optimizer, which writes five lists."""
    torch._fused_adamw_(
        tensors, *([torch.ones(4)] for _ in range(3)), [], [torch.ones(())],
        lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8,
        amsgrad=False, maximize=False,
    )  # fmt: skip


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
@pytest.mark.parametrize(
    "write", [lambda ts: torch._foreach_mul_(ts, 3.0), fused_adamw], ids=["mul", "adam"]
)
def test_functions_over_lists_write_them(tmp_path, level, write):
    """What a call held is read before a function over lists overwrites it."""
    model = torch.nn.Sequential(torch.nn.Identity())
    x = torch.full((4,), 5.0)

    def run():
        if level == "L1":
            torch.exp(x)
        else:
            model(x)
        write([x])
        torch.exp(x)

    calls = calls_of(run, tmp_path, model, level=level)

    name = "Torch.exp.0.forward" if level == "L1" else "Module.0.Identity.forward.0"
    assert x[0] != 5.0
    assert calls[name].input_args[0].rows[0, 0] == 5.0
    if level != "L0":
        last = [n for n in calls if "exp" in n][-1]
        assert calls[last].input_args[0].rows[0, 0] == x[0].item()


def test_a_call_that_fails_has_its_inputs(tmp_path):
    """A function or module that raises has a record without results; others go on."""

    class Failing(torch.nn.Module):
        def forward(self, x):
            torch.matmul(x, torch.ones(7, 7))

    model = torch.nn.Sequential(Failing())

    def run():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                model(torch.full((2, 2), 3.0))
        torch.exp(torch.ones(1))

    calls = calls_of(run, tmp_path, model, level="mix")

    assert list(calls) == [
        "Torch.matmul.0.forward",
        "Module.0.Failing.forward.0",
        "Torch.matmul.1.forward",
        "Module.0.Failing.forward.1",
        "Torch.exp.0.forward",
    ]
    for name, call in calls.items():
        assert (call.output is None) == ("exp" not in name)
    assert calls["Module.0.Failing.forward.0"].input_args[0].rows[0, 0] == 3.0
    assert calls["Torch.exp.0.forward"].parent is None


@pytest.mark.parametrize("entry", ["Failing", "matmul"])
def test_a_call_that_fails_leaves_the_selection_as_it_was(tmp_path, entry):
    """What `list` takes in a call ends with it, however it ends."""

    class Failing(torch.nn.Module):
        def forward(self, x):
            torch.matmul(x, torch.ones(7, 7))

    model = torch.nn.Sequential(Failing())

    def run():
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 2))
        torch.exp(torch.ones(1))

    calls = calls_of(run, tmp_path, model, level="mix", names=(entry,))

    assert "Torch.matmul.0.forward" in calls
    assert "Torch.exp.0.forward" not in calls
