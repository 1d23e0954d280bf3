"""What the body of a function is written with: nodes, constants, attributes of the node that calls it, choices.

One function serves all nodes of its name in a model, since onnx's evaluator and others look functions up by name. What
depends on an attribute is computed from it where a formula does, and chosen by an `If` where not; ONNX Runtime folds
both when it opens the model. An attribute on which all nodes of the model agree is a constant that chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_passes.functions.folding import folded

Value = int | float | str
Array = npt.NDArray[Any]

_END = np.int64(np.iinfo(np.int64).max)
_KINDS: tuple[tuple[type, str, ir.AttributeType], ...] = (
    (int, "value_int", ir.AttributeType.INT),
    (float, "value_float", ir.AttributeType.FLOAT),
    (str, "value_string", ir.AttributeType.STRING),
)


class Body:
    """A list of nodes that grows.

    Attributes:
        nodes: in order.
        callers: the attributes of each node that calls the function, or takes this branch of it.
        values: attribute -> the values that it has in those nodes.
    """

    def __init__(self, callers: Sequence[Mapping[str, Value]], parent: Body | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self.callers = callers
        self.values = {name: frozenset(caller[name] for caller in callers) for name in callers[0]}
        self._limit: ir.Value | None = parent._limit if parent else None
        self._parent = parent
        self._numbers: count[int] = parent._numbers if parent else count()
        self._constants: dict[Any, ir.Value] = {}
        self._arrays: dict[ir.Value, Array] = parent._arrays if parent else {}

    def op(self, op_type: str, *inputs: ir.Value | Array | np.generic, **attributes: Any) -> ir.Value:
        """The output of a new node, or a constant where all inputs are; arrays are constants."""
        known = [self._array(item) for item in inputs]
        if known and all(array is not None for array in known):
            result = folded(op_type, [array for array in known if array is not None], attributes)
            if result is not None:
                return self.constant(result)
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | Array | np.generic, outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node that has several."""
        taken = [self.constant(item) if isinstance(item, np.ndarray | np.generic) else item for item in inputs]
        results = [ir.Value(name=f"{op_type}_{next(self._numbers)}") for _ in range(outputs)]
        self.nodes.append(ir.node(op_type, taken, attributes, outputs=results, name=results[0].name))
        return results

    def constant(self, array: Array | np.generic) -> ir.Value:
        """A constant; one node for equal ones."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        value = self._remembered(key, lambda: self.op("Constant", value=ir.tensor(array)))
        self._arrays[value] = array
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """int64 `[len(numbers)]`."""
        return self.constant(np.array(numbers, np.int64))

    def attribute(self, name: str) -> ir.Value:
        """The value of an attribute of the calling node: a scalar, int64, float32 or string."""
        (first, *rest) = self.values[name]
        if not rest and not isinstance(first, str):
            return self.constant(np.array(first, np.int64 if isinstance(first, int) else np.float32))
        given, attribute_type = _kind_of(first)
        return self._remembered(name, lambda: self.op("Constant", **{given: ir.RefAttr(given, name, attribute_type)}))

    def shape(self, *sizes: int | ir.Value) -> ir.Value:
        """A shape from numbers and scalars, int64 `[len(sizes)]`."""
        parts = [self.ints(s) if isinstance(s, int) else self.op("Reshape", s, self.ints(1)) for s in sizes]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, x: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        """`x` in another shape; 0 keeps a dimension, -1 takes what is left."""
        numbers = [size for size in sizes if isinstance(size, int)]
        target = self.ints(*numbers) if len(numbers) == len(sizes) else self.shape(*sizes)
        return self.op("Reshape", x, target)

    def cut(self, x: ir.Value, axis: int, start: int | ir.Value, end: int | ir.Value) -> ir.Value:
        """`x` from `start` to `end` along one axis."""
        return self.op("Slice", x, self.shape(start), self.shape(end), self.ints(axis))

    def choose(self, attribute: str, kind: Callable[[Any], Any], build: Callable[[Body, Any], ir.Value]) -> ir.Value:
        """What `build(body, kind)` gives for the kind of the calling node's attribute."""
        return self.choose_all(attribute, kind, lambda body, given: [build(body, given)])[0]

    def choose_all(
        self, attribute: str, kind: Callable[[Any], Any], build: Callable[[Body, Any], list[ir.Value]]
    ) -> list[ir.Value]:
        """The same, of several values; as many for each kind.

        Raises:
            ValueError: a choice by strings, which not every evaluator compares.
        """
        groups: dict[Any, list[Value]] = {}
        for value in sorted(self.values[attribute]):
            groups.setdefault(kind(value), []).append(value)
        return self._choose(attribute, list(groups.items()), build)

    def _choose(
        self,
        attribute: str,
        groups: list[tuple[Any, list[Value]]],
        build: Callable[[Body, Any], list[ir.Value]],
    ) -> list[ir.Value]:
        (kind, values), *rest = groups
        if not rest:
            return build(self, kind)
        if isinstance(values[0], str):  # onnx's evaluator does not compare strings of different lengths
            raise ValueError(
                f"nodes of one name have different {attribute}: {[kind, *dict(rest)]}, expected one of them"
            )
        given = self.attribute(attribute)
        equals = [self.op("Equal", given, self.op("Constant", **{_kind_of(value)[0]: value})) for value in values]
        condition = reduce(lambda a, b: self.op("Or", a, b), equals)
        mine = [caller for caller in self.callers if caller[attribute] in values]
        others = [caller for caller in self.callers if caller[attribute] not in values]
        then = self._branch(mine, lambda body: build(body, kind), condition)
        otherwise = self._branch(others, lambda body: body._choose(attribute, rest, build), self.op("Not", condition))
        branches = {"then_branch": then, "else_branch": otherwise}
        return list(self.ops("If", condition, outputs=len(then.outputs), **branches))

    def _branch(
        self, callers: Sequence[Mapping[str, Value]], build: Callable[[Body], list[ir.Value]], taken: ir.Value
    ) -> ir.Graph:
        """A branch for these of the callers: what they agree on is a constant in it."""
        body = Body(callers, self)
        limit = self.op("Where", taken, _END, np.int64(0))
        body._limit = limit if self._limit is None else self.op("Min", self._limit, limit)
        outputs = [output if output.producer() in body.nodes else body.op("Identity", output) for output in build(body)]
        return ir.Graph([], outputs, nodes=body.nodes, name=f"branch_{next(self._numbers)}")

    def if_taken(self, x: ir.Value, axis: int) -> ir.Value:
        """`x`, or nothing of it in a branch that is not taken.

        ONNX Runtime folds what a branch does to constants before it sees that the branch is not taken.
        """
        return x if self._limit is None else self.cut(x, axis, 0, self._limit)

    def _array(self, item: ir.Value | Array | np.generic) -> Array | None:
        return self._arrays.get(item) if isinstance(item, ir.Value) else np.asarray(item)

    def _remembered(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        body: Body | None = self
        while body is not None:
            if key in body._constants:
                return body._constants[key]
            body = body._parent
        self._constants[key] = make()
        return self._constants[key]


def function(
    domain: str,
    name: str,
    inputs: Iterable[str],
    attributes: Iterable[str],
    opset: int,
    callers: Sequence[Mapping[str, Value]],
    build: Callable[[Body, dict[str, ir.Value]], Sequence[ir.Value]],
) -> ir.Function:
    """The function whose outputs `build(body, inputs)` gives; a caller has to set every attribute."""
    body = Body(callers)
    given = {item: ir.Value(name=item) for item in inputs}
    outputs = build(body, given)
    graph = ir.Graph(list(given.values()), outputs, nodes=body.nodes, opset_imports={"": opset}, name=name)
    declared = [ir.Attr(item, _kind_of(callers[0][item])[1], None) for item in attributes]
    return ir.Function(domain, name, graph=graph, attributes=declared)


def _kind_of(value: Value) -> tuple[str, ir.AttributeType]:
    """How `Constant` calls an attribute of such a value, and its type."""
    return next((given, attribute_type) for of, given, attribute_type in _KINDS if isinstance(value, of))
