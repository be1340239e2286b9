# SPDX-License-Identifier: Apache-2.0
"""A call that is read as it was read last gives what a first look gives."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.functions import Action, Entry, FunctionPoint
from pytest_msprobe.debugger.materialize import materialize
from pytest_msprobe.debugger.raw import CallSite
from pytest_msprobe.dump.writer import format_tree

BASE = torch.arange(1.0, 25.0).reshape(4, 6)
WEIGHT = torch.nn.Parameter(BASE[0].clone())


def tensors():
    """Tensors of which any two differ in their form, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized and nested ones
        return {
            "plain": BASE,
            "equal": BASE + 1,
            "fewer rows": BASE[:3],
            "one row": BASE[:1],
            "more rows": torch.cat([BASE, BASE]),
            "other columns": BASE[:, :5],
            "reshaped": BASE.reshape(6, 4),
            "transposed": BASE.t(),
            "strided": torch.cat([BASE, BASE], 1)[:, ::2],
            "expanded": BASE[:1].expand(4, 6),
            "flat": BASE.reshape(-1),
            "offset": torch.cat([BASE, BASE])[2:6],
            "scalar": torch.tensor(2.0),
            "empty": BASE[:0],
            "double": BASE.double(),
            "half": BASE.half(),
            "integers": BASE.int(),
            "bytes": BASE.to(torch.uint8),
            "flags": BASE > 3,
            "complex": torch.complex(BASE, -BASE),
            "conjugated": torch.complex(BASE, -BASE).conj(),
            "negated": torch.complex(BASE, -BASE).conj().imag,
            "float8": BASE.to(torch.float8_e4m3fn),
            "needs grad": BASE.clone().requires_grad_(),
            "parameter": torch.nn.Parameter(BASE.clone()),
            "weight": WEIGHT,
            "meta": BASE.to("meta"),
            "sparse": BASE.to_sparse(),
            "quantized": torch.quantize_per_tensor(BASE, 0.5, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([BASE[0], BASE[1, :3]]),
            "subclass": BASE.as_subclass(type("Sub", (torch.Tensor,), {})),
            "nan": BASE * float("nan"),
        }


TENSORS = tensors()
OTHERS = {
    "none": None,
    "one": 1,
    "yes": True,
    "one and a bit": 1.0,
    "nothing": float("nan"),
    "text": "1",
    "list": [BASE, 1],
    "dict": {"k": BASE[:2]},
    "size": torch.Size([1]),
    "dtype": torch.float32,
    "slice": slice(1, None),
    "array": np.ones(2),
}
VALUES = TENSORS | OTHERS


def record(calls, level):
    """The texts of calls of one function, each the only one of its step."""
    collector = Collector(DebuggerConfig(level=level))
    collector.add_constants([WEIGHT])
    site = CallSite("a.", "", is_module=False)
    point = FunctionPoint(site, Entry(Action.RECORD, site))
    texts = []
    for number, (args, kwargs) in enumerate(calls):
        collector.begin_step(number)
        collector.resume()
        assert collector.is_traced
        collector.note_start(point, args, kwargs)
        collector.note_end(point, args)
        (done,) = materialize(collector.end_step()).calls
        collector.raise_error()
        tree = [done.input_args, done.input_kwargs, done.output]
        texts.append(format_tree(tree, "statistics"))
    return texts


def check(calls, level):
    """Each of the calls is recorded as it is when it is the only one."""
    alone = [text for call in calls for text in record([call], level)]

    assert record(calls, level) == alone


@pytest.mark.parametrize("level", ["L0", "L1"])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_another_form_is_looked_at_anew(name, level):
    """A value that differs from the last one in form only is recorded as it is."""
    plain = ((BASE,), {})
    other = ((VALUES[name],), {})

    check([plain, plain, other, other, plain], level)


named = st.sampled_from(sorted(VALUES)).map(VALUES.__getitem__)
calls = st.tuples(
    st.lists(named, max_size=2),
    st.dictionaries(st.sampled_from("xy"), named, max_size=1),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(calls, min_size=2, max_size=5), st.sampled_from(["L0", "L1"]))
def test_any_sequence_of_calls_is_read_as_each_alone(sequence, level):
    """What a call was given before has no influence on its record."""
    check(sequence, level)
