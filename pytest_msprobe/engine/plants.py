# SPDX-License-Identifier: Apache-2.0
"""Faults planted into a model that runs in a worker, to prove that a gate sees them.

A fault is planted at a place for as long as it is wanted and then taken out again. What
it changes is measured where it is planted, on identical input. Faults of a module stand
inside the forward that a capture wraps, faults of a parent's own code around the child
that it calls; what they compute themselves is never recorded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pytest_msprobe.debugger.modules import module_paths, root_models
from pytest_msprobe.engine.kv_cache import block_sides
from pytest_msprobe.errors import EngineError

_NORM_EPSILON = "variance_epsilon"
_COS_SIN = "cos_sin_cache"
_MATRIX = 2
# Rows that change places, and how many a tensor must have for that.
_SWAPPED = (3, 6)
_LEAST_ROWS = 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: Its name.
        text: What it does, with `{size}` where its size stands.
        standard: Its usual size.
        least: The smallest size that is worth trying.
        most: The largest; equal to `least` where there is only one.
        is_own_code: Whether it lies in the code of a module that calls others.
    """

    name: str
    text: str
    standard: float
    least: float
    most: float
    is_own_code: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("scale", "output x (1 + {size})", 0.05, 1e-4, 1.0),
        Kind("element", "one element off by {size} of the largest", 1.0, 1e-3, 8.0),
        Kind("heads", "two heads of attention exchanged, share {size}", 1.0, 1e-4, 1.0),
        Kind("rows", "two prompt rows exchanged, share {size}", 1.0, 1e-4, 1.0),
        Kind("epsilon", "a norm's epsilon larger by {size}", 1e-3, 1e-8, 1.0),
        Kind("bias", "bias dropped, share {size}", 1.0, 1e-4, 1.0),
        Kind("weight_row", "one weight row x (1 + {size})", 0.01, 1e-3, 4.0),
        Kind("attention_scale", "softmax scale x (1 + {size})", 0.05, 1e-4, 4.0),
        Kind("rope_base", "base of the rotary angles x (1 + {size})", 1.0, 1e-3, 9.0),
        Kind("kv_block", "another layer's block in the KV cache, share {size}",
             1.0, 1e-4, 1.0),
        Kind("precision", "output rounded to steps of {size}", 2.0**-3, 2.0**-9, 0.5),
        Kind("argument", "what a child is given x (1 + {size})",
             0.02, 1e-4, 1.0, is_own_code=True),
        Kind("residual", "residual dropped between two children, share {size}",
             1.0, 1e-4, 1.0, is_own_code=True),
        Kind("result", "what the children gave x (1 + {size})",
             0.05, 1e-4, 1.0, is_own_code=True),
        # Last: what it leaves behind outlives the request.
        Kind("nan", "one element not a number", 1.0, 1.0, 1.0),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault can be planted.

    Attributes:
        kind: Kind of fault.
        module: Path of the module it is planted in.
        child: Name of the child whose call is changed, for faults around a call.
        argument: Which of the child's arguments.
    """

    kind: str
    module: str
    child: str = ""
    argument: int = 0

    @property
    def called(self) -> str:
        """Path of the module whose call is changed."""
        return f"{self.module}.{self.child}" if self.child else self.module

    @property
    def guilty(self) -> str:
        """Path of the module that a verdict has to name."""
        return self.module if KINDS[self.kind].is_own_code else self.called


# Which places there are ---------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """The first call of a module while the model was watched.

    Attributes:
        path: The path it was called by.
        parent: Path of the module that called it.
        rows: Rows of its first input.
        floats: Places of its arguments that are float tensors with such rows.
        width: Columns of its first output of that kind, 0 where it has none.
        has_children: Whether it called other modules.
    """

    path: str
    parent: str
    rows: int
    floats: list[int]
    width: int = 0
    has_children: bool = False


class Survey:
    """Watches which modules a model calls, to tell where faults can be planted."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._seen: dict[str, _Seen] = {}
        self._running: list[_Seen] = []
        self._originals: list[tuple[torch.nn.Module, Callable[..., Any] | None]] = []
        self._shared: set[str] = set()

    def install(self) -> None:
        """Begins to watch."""
        for module, paths in module_paths(root_models(self._model)).values():
            if len(paths) > 1:
                self._shared.update(paths)
            before = module.__dict__.get("forward")
            self._originals.append((module, before))
            module.__dict__["forward"] = self._watched(module.forward, paths)

    def remove(self) -> None:
        """Ends watching."""
        for module, before in reversed(self._originals):
            _put_back(module, before)
        self._originals.clear()

    def _watched(
        self, original: Callable[..., Any], paths: Sequence[str]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            parent = self._running[-1].path if self._running else ""
            path = next((p for p in paths if p.rpartition(".")[0] == parent), paths[0])
            if self._running:
                self._running[-1].has_children = True
            tensors = [a for a in (*args, *kwargs.values()) if _is_tensor(a)]
            rows = int(tensors[0].shape[0]) if tensors else 0
            floats = [
                index
                for index, value in enumerate(args)
                if _is_matrix(value) and value.shape[0] == rows
            ]
            seen = _Seen(path, parent, rows, floats)
            self._running.append(seen)
            try:
                result = original(*args, **kwargs)
            finally:
                self._running.pop()
            output = _first_matrix(result)
            if output is not None and output.shape[0] == rows:
                seen.width = output.numel() // max(rows, 1)
            # Of a decode step nothing is taken where there was a prefill.
            self._seen.setdefault(path, seen)
            return result

        return forward

    def places(self) -> list[Place]:
        """All places, in the order in which the modules ended their first call."""
        found: list[Place] = []
        for seen in self._seen.values():
            module = self._model.get_submodule(seen.path)
            is_shared = seen.path in self._shared
            kinds = _kinds_of(module, seen, is_shared=is_shared)
            found.extend(Place(kind, seen.path) for kind in kinds)
            found.extend(self._around(module, seen))
        layers = [p for p in found if p.kind == "kv_block"]
        if len(layers) < 2:  # noqa: PLR2004 - one to write to, one to read from
            found = [place for place in found if place.kind != "kv_block"]
        return found

    def _around(self, module: torch.nn.Module, seen: _Seen) -> Iterator[Place]:
        """Faults around a module's call, which its parent makes by an attribute."""
        parent, _, name = seen.path.rpartition(".")
        if not parent or parent != seen.parent:
            return
        if callable(getattr(module, "_compute_cos_sin_cache", None)):
            yield Place("rope_base", parent, name)
        for index in seen.floats:
            is_residual = hasattr(module, _NORM_EPSILON) and index == 1
            kind = "residual" if is_residual else "argument"
            yield Place(kind, parent, name, index)


def _kinds_of(module: Any, seen: _Seen, *, is_shared: bool) -> Iterator[str]:
    """Kinds of fault that a module itself can have."""
    if is_shared or not seen.width or not seen.parent:
        return
    if seen.has_children:
        yield "result"
        return
    yield from ("scale", "element", "rows", "precision", "nan")
    if isinstance(getattr(module, _NORM_EPSILON, None), float):
        yield "epsilon"
    is_linear = hasattr(module, "output_size") or hasattr(module, "out_features")
    if is_linear and hasattr(module, "weight"):
        yield "weight_row"
    bias = getattr(module, "bias", None)
    is_bias = isinstance(bias, torch.Tensor) and bias.numel() == seen.width
    if is_linear and is_bias:
        yield "bias"
    implementation = getattr(module, "impl", None)
    if isinstance(getattr(implementation, "scale", None), float):
        yield "attention_scale"
        size = getattr(module, "head_size", 0)
        if size and seen.width >= 2 * size and seen.width % size == 0:
            yield "heads"
        if _has_known_cache(module):
            yield "kv_block"


def _has_known_cache(layer: Any) -> bool:
    try:
        return bool(block_sides(layer))
    except (EngineError, AttributeError):
        return False


# Planting -----------------------------------------------------------------------


@dataclass(slots=True)
class Plant:
    """A fault in a model.

    Attributes:
        model: The model.
        place: Where.
        size: How large.
        is_free: Whether no capture runs: only then are calls made twice to measure.
        moved: Largest relative L2 change of the tensor there, on identical input, of
            the first row and of the others.
        calls: Calls that it has changed.
        error: What went wrong, empty for nothing.
    """

    model: torch.nn.Module
    place: Place
    size: float
    is_free: Callable[[], bool]
    moved: float = 0.0
    calls: int = 0
    error: str = ""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self) -> None:
        """Plants it.

        Raises:
            EngineError: There is no such place.
        """
        place = self.place
        try:
            target: Any = self.model.get_submodule(place.called)
            plant = _PLANTS[place.kind]
        except (AttributeError, KeyError) as error:
            message = f"no place for {place.kind}: {place.called}"
            raise EngineError(message, slug="plant") from error
        plant(self, target)

    def remove(self) -> None:
        """Takes it out."""
        while self._undo:
            self._undo.pop()()

    def undo(self, action: Callable[[], None]) -> None:
        """Has something done once the fault is taken out."""
        self._undo.append(action)

    def inside(self, module: torch.nn.Module, wrapper: Callable[..., Any]) -> None:
        """Puts a wrapper on a module's forward, under that of a capture."""
        before, original = module.__dict__.get("forward"), module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        module.__dict__["forward"] = forward
        self.undo(lambda: _put_back(module, before))

    def around(self, wrapper: Callable[..., Any]) -> None:
        """Puts a wrapper around the call of the child, in its parent's code."""
        parent = self.model.get_submodule(self.place.module)
        name = self.place.child
        # Found before the module of this name, which stays where it is.
        parent.__dict__[name] = _StandIn(getattr(parent, name), wrapper)
        self.undo(lambda: parent.__dict__.pop(name, None))

    def changed(self, result: Any, change: Callable[[torch.Tensor], Any]) -> Any:
        """A result with its first float matrix changed."""
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001 - not recorded
                clean = _first_matrix(result)
                if clean is None:
                    return result
                faulty = change(clean)
                self.note(clean, faulty)
                return _exchanged(result, clean, faulty)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.error = f"{type(error).__name__}: {error}"
            return result

    def note(self, clean: torch.Tensor, faulty: torch.Tensor | None) -> None:
        """Notes what changed."""
        self.calls += 1
        if faulty is None:
            return
        self.moved = max(self.moved, relative_change(clean, faulty))

    def compared(
        self,
        call: Callable[..., Any],
        begin: Callable[[], Callable[[], None]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls with a fault in effect; while no capture runs, without it first.

        Args:
            call: The module.
            begin: Puts the fault into effect, and returns what ends that.
            args: Of the call.
            kwargs: Likewise.
        """
        clean = None
        if self.is_free():
            copies = [_copied(value) for value in args]
            result = call(*copies, **{k: _copied(v) for k, v in kwargs.items()})
            clean = _copied(_first_matrix(result))
        try:
            end = begin()
        except Exception as error:  # noqa: BLE001 - never into the model
            self.error = f"{type(error).__name__}: {error}"
            return call(*args, **kwargs)
        try:
            result = call(*args, **kwargs)
        finally:
            end()
        if clean is None:
            self.calls += 1
        else:
            self.note(clean, _first_matrix(result))
        return result


class _StandIn:
    """Stands for a child in its parent's code; everything else is the child's."""

    def __init__(self, child: Any, wrapper: Callable[..., Any]) -> None:
        self._child = child
        self._wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._child, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._child, name)


def relative_change(clean: torch.Tensor, faulty: torch.Tensor) -> float:
    """Largest relative L2 change of the first row and of the others together.

    They are judged apart, because the first token's values may be huge.

    Args:
        clean: (rows, ...), any float dtype.
        faulty: Likewise.

    Returns:
        Unitless, >= 0; infinite where something is not finite, or was 0.
    """
    sides = [side.detach().reshape(len(side), -1).double() for side in (clean, faulty)]
    largest = 0.0
    for rows in (slice(0, 1), slice(1, None)):
        old, new = (side[rows] for side in sides)
        distance = float(torch.linalg.vector_norm(new - old)) if old.numel() else 0.0
        if distance == 0.0:
            continue
        norm = float(torch.linalg.vector_norm(old))
        change = distance / norm if norm else float("inf")
        largest = max(largest, change if change == change else float("inf"))  # noqa: PLR0124 - NaN
    return largest


def _put_back(module: torch.nn.Module, before: Callable[..., Any] | None) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = before


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _is_matrix(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.ndim >= _MATRIX
        and value.numel() > 0
    )


def _first_matrix(result: Any) -> torch.Tensor | None:
    values = result if isinstance(result, tuple | list) else (result,)
    return next((value for value in values if _is_matrix(value)), None)


def _exchanged(result: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if result is old:
        return new
    return type(result)(new if value is old else value for value in result)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


# The kinds ----------------------------------------------------------------------


def _of_output(
    change: Callable[[torch.Tensor, float], torch.Tensor],
) -> Callable[[Plant, Any], None]:
    """A fault that changes what a module returns."""

    def plant(self: Plant, module: Any) -> None:
        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            return self.changed(result, lambda tensor: change(tensor, self.size))

        self.inside(module, wrapper)

    return plant


def _scaled(tensor: torch.Tensor, size: float) -> torch.Tensor:
    return (tensor.float() * (1.0 + size)).to(tensor.dtype)


def _with_element(tensor: torch.Tensor, size: float) -> torch.Tensor:
    result = tensor.clone()
    row = result[-1].view(-1)
    row[row.numel() // 2] += size * row.abs().max()
    return result


def _with_nan(tensor: torch.Tensor, size: float) -> torch.Tensor:
    del size
    result = tensor.clone()
    row = result[-1].view(-1)
    row[row.numel() // 2] = float("nan")
    return result


def _with_rows(tensor: torch.Tensor, size: float) -> torch.Tensor:
    if len(tensor) < _LEAST_ROWS:
        return tensor
    first, second = _SWAPPED
    return _mixed(tensor, 0, first, second, size)


def _mixed(
    tensor: torch.Tensor, dimension: int, first: int, second: int, share: float
) -> torch.Tensor:
    """Two slices have a share of each other, 1 for the other one alone."""
    result = tensor.clone()
    a, b = (tensor.select(dimension, index).float() for index in (first, second))
    result.select(dimension, first).copy_(torch.lerp(a, b, share))
    result.select(dimension, second).copy_(torch.lerp(b, a, share))
    return result


def _rounded(tensor: torch.Tensor, size: float) -> torch.Tensor:
    """Rounded to significands with steps of a size, 2^-3 for those of float8 e4m3."""
    mantissa, exponent = torch.frexp(tensor.float())
    step = size / 2
    rounded = torch.round(mantissa / step) * step
    return torch.ldexp(rounded, exponent).to(tensor.dtype)


def _plant_heads(self: Plant, module: Any) -> None:
    def change(tensor: torch.Tensor, size: float) -> torch.Tensor:
        heads = tensor.reshape(len(tensor), -1, module.head_size)
        return _mixed(heads, 1, 0, 1, size).reshape_as(tensor)

    _of_output(change)(self, module)


def _plant_bias(self: Plant, module: Any) -> None:
    def change(tensor: torch.Tensor, size: float) -> torch.Tensor:
        bias: torch.Tensor = module.bias
        return (tensor.float() - size * bias.float()).to(tensor.dtype)

    _of_output(change)(self, module)


def _plant_weight_row(self: Plant, module: Any) -> None:
    """One output is larger, without its bias, as with a row of the weight larger.

    Engines pack weights after loading (the CPU build leaves linear ones with the shape
    (0,)), so the row itself is out of reach.
    """

    def change(tensor: torch.Tensor, size: float) -> torch.Tensor:
        result = tensor.clone()
        column = tensor.shape[-1] // 3
        own = tensor[..., column].float()
        bias = getattr(module, "bias", None)
        without = own
        if bias is not None and not getattr(module, "skip_bias_add", False):
            without = own - bias[column].float()
        result[..., column] = (own + size * without).to(tensor.dtype)
        return result

    _of_output(change)(self, module)


def _attribute_changed(owner: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _of_attribute(
    owner_of: Callable[[Any], Any], name: str, change: Callable[[float, float], float]
) -> Callable[[Plant, Any], None]:
    """A fault of a number that a module holds."""

    def plant(self: Plant, module: Any) -> None:
        def begin() -> Callable[[], None]:
            owner = owner_of(module)
            value = change(getattr(owner, name), self.size)
            return _attribute_changed(owner, name, value)

        def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self.compared(original, begin, args, kwargs)

        self.inside(module, wrapper)

    return plant


def _plant_rope_base(self: Plant, module: Any) -> None:
    end = _attribute_changed(module, "base", module.base * (1.0 + self.size))
    try:
        other = module._compute_cos_sin_cache()  # noqa: SLF001 - vLLM's own
    finally:
        end()

    def begin() -> Callable[[], None]:
        buffers = module._buffers  # noqa: SLF001 - setattr would check and be slow
        before = buffers[_COS_SIN]
        buffers[_COS_SIN] = other.to(device=before.device, dtype=before.dtype)

        def end() -> None:
            buffers[_COS_SIN] = before

        return end

    def wrapper(child: Any, *args: Any, **kwargs: Any) -> Any:
        return self.compared(child, begin, args, kwargs)

    self.around(wrapper)


def _plant_kv_block(self: Plant, module: Any) -> None:
    """From the first decode step on, a request's first block is another layer's.

    Blocks are written anew by the next request that gets them: nothing is put back.
    """
    mine = block_sides(module)[0]
    # Layers of different kinds (sliding windows) may share one cache's memory.
    alike = [
        layer
        for layer in self.model.modules()
        if _has_known_cache(layer)
        and block_sides(layer)[0].shape == mine.shape
        and block_sides(layer)[0].data_ptr() != mine.data_ptr()
    ]
    if not alike:
        message = f"{self.place.module}: no other layer has a cache of this shape"
        raise EngineError(message, slug="plant")
    is_prompt_behind = False

    def begin() -> Callable[[], None]:
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
            block = _first_block(module)
            sides = zip(block_sides(module), block_sides(alike[0]), strict=True)
            for own, other in sides:
                mixed = torch.lerp(own[block].float(), other[block].float(), self.size)
                own[block].copy_(mixed)
        return lambda: None

    def wrapper(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_prompt_behind
        rows = len(args[0] if args else kwargs["query"])
        is_due = is_prompt_behind and rows == 1
        is_prompt_behind = rows > 1
        if not is_due:
            return original(*args, **kwargs)
        return self.compared(original, begin, args, kwargs)

    self.inside(module, wrapper)


def _first_block(layer: Any) -> int:
    """Number of the first block of the step's first request."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        metadata = metadata[layer.layer_name]
    return int(metadata.block_table[0, 0])


def _plant_argument(self: Plant, module: Any) -> None:
    del module
    factor = -self.size if self.place.kind == "residual" else self.size

    def wrapper(child: Any, *args: Any, **kwargs: Any) -> Any:
        index = self.place.argument
        if index < len(args):
            given = self.changed(args[index], lambda tensor: _scaled(tensor, factor))
            args = (*args[:index], given, *args[index + 1 :])
        return child(*args, **kwargs)

    self.around(wrapper)


def _plant_nan(self: Plant, module: Any) -> None:
    """What it left in KV caches goes with it: kernels multiply unused slots by 0."""

    def clean() -> None:
        for layer in self.model.modules():
            if _has_known_cache(layer):
                for side in block_sides(layer):
                    side.nan_to_num_(nan=0.0)

    self.undo(clean)
    _of_output(_with_nan)(self, module)


_PLANTS: dict[str, Callable[[Plant, Any], None]] = {
    "scale": _of_output(_scaled),
    "element": _of_output(_with_element),
    "nan": _plant_nan,
    "heads": _plant_heads,
    "rows": _of_output(_with_rows),
    "epsilon": _of_attribute(lambda m: m, _NORM_EPSILON, lambda old, size: old + size),
    "bias": _plant_bias,
    "weight_row": _plant_weight_row,
    "attention_scale": _of_attribute(
        lambda module: module.impl, "scale", lambda old, size: old * (1.0 + size)
    ),
    "rope_base": _plant_rope_base,
    "kv_block": _plant_kv_block,
    "precision": _of_output(_rounded),
    "argument": _plant_argument,
    "residual": _plant_argument,
    "result": _of_output(_scaled),
}


class Planter:
    """Plants faults into one worker's model, one at a time."""

    def __init__(
        self, model_of: Callable[[], torch.nn.Module], is_free: Callable[[], bool]
    ) -> None:
        """Plants nothing yet.

        Args:
            model_of: The worker's model.
            is_free: Whether no capture runs.
        """
        self._model_of = model_of
        self._is_free = is_free
        self._survey: Survey | None = None
        self._plant: Plant | None = None

    def survey(self, *, begin: bool) -> dict[str, Any]:
        """Begins to watch which modules are called, or ends it and says the places."""
        if begin:
            self.clear()
            self._survey = Survey(self._model_of())
            self._survey.install()
            return {}
        survey, self._survey = self._survey, None
        if survey is None:
            raise EngineError("no survey was begun", slug="plant")
        survey.remove()
        return {"places": [asdict(place) for place in survey.places()]}

    def plant(self, place: dict[str, Any], size: float) -> dict[str, Any]:
        """Plants a fault; one that is planted already is taken out."""
        self.clear()
        self._plant = Plant(self._model_of(), Place(**place), size, self._is_free)
        try:
            self._plant.install()
        except BaseException:
            self.clear()
            raise
        return {}

    def unplant(self) -> dict[str, Any]:
        """Takes the fault out; says what it changed."""
        plant = self._plant
        self.clear()
        if plant is None:
            return {"moved": 0.0, "calls": 0, "error": ""}
        return {"moved": plant.moved, "calls": plant.calls, "error": plant.error}

    def clear(self) -> None:
        """Takes everything out."""
        plant, self._plant = self._plant, None
        survey, self._survey = self._survey, None
        for planted in (plant, survey):
            if planted is not None:
                planted.remove()
