"""The graph of a torch model as operations and products, a view of the engine's record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from torch import nn

from rimet import _core
from rimet._graph import Recording, Twin, bind_inputs, class_key, record
from rimet.common.connected_graph.connectedgraph import ConnectedGraph as _ConnectedGraph
from rimet.common.connected_graph.connectedgraph_utils import CG_SPLIT
from rimet.meta.operation import Op
from rimet.meta.product import Product
from rimet.nn import BaseQuantizationMixin, QuantizationMixin

__all__ = ["ConnectedGraph", "Op", "Product"]


def _quantized_leaf(path: str, module: nn.Module) -> Twin | None:
    """Modules that are quantized or could be are one operation, whatever is inside of them."""
    if isinstance(module, BaseQuantizationMixin) or type(module) in QuantizationMixin.cls_to_qcls:
        return Twin(1, 1, False)
    return None


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    if isinstance(module, BaseQuantizationMixin):
        return module.qcls_to_cls.get(cls, cls)
    return cls


def record_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Records a model with every module that is, or could be, quantized as one operation."""
    return record(model, args, kwargs, twin_of=_quantized_leaf, class_of=_plain_class)


class ConnectedGraph(_ConnectedGraph):
    """Operations (module calls and torch functions) and the products between them.

    The model runs once on ``model_input``; nothing is traced. Where an output goes to several
    consumers, an operation of type ``CG_Split`` stands between. Functions that only hand their
    input on (``to``, ``detach``, ``t``) and ``nn.Identity`` are left out.

    Args:
        model: any module.
        model_input: example input: a tensor, or a tuple, list or dict as for
            :class:`rimet.quantsim.QuantizationSimModel`.
        strict: kept for AIMET's signature; a record is always exact.

    Attributes:
        ordered_ops: all operations in the order in which they ran.

    Raises:
        RuntimeError: no tensor in ``model_input``.
    """

    math_invariant_types: ClassVar[set[str]] = set(_core.moving_functions())
    passthrough_graph_nodes: ClassVar[set[str]] = set(_core.passthrough_functions()) | {"Identity"}
    input_graph_nodes_to_ignore: ClassVar[set[str]] = {"Constant"}

    def __init__(self, model: nn.Module, model_input: Any, strict: bool = True) -> None:
        super().__init__()
        args, kwargs = bind_inputs(model, model_input)
        self._build(record_model(model, args, kwargs), model)

    @classmethod
    def _from_recording(cls, recording: Recording, model: nn.Module) -> ConnectedGraph:
        """The view of a recording that was made earlier, on ``model`` or on what ``model`` was
        made of.
        """
        graph = cls.__new__(cls)
        _ConnectedGraph.__init__(graph)
        graph._build(recording, model)
        return graph

    @staticmethod
    def get_op_type(model_cls: type[nn.Module]) -> str:
        """The operator type of a module class: its ONNX type, or the class name."""
        return _core.module_op_type(class_key(model_cls))

    def is_safe(self) -> bool:
        """True: the record is what ran."""
        return True

    def assert_safe(self) -> None:
        """Does nothing: the record is what ran."""

    def get_op_from_module_name(self, name: str) -> Op | None:
        """The operation of a module, by its path with or without the model's class name in
        front.
        """
        return self._by_module.get(name) or self._by_module.get(f"{self._model_name}.{name}")

    @property
    def input_structure(self) -> list[Any]:
        """Per input tensor: where it goes, as ``op`` and input ``index``; a list where it goes to
        several.
        """
        return self._collapse(self._input_places)

    @property
    def output_structure(self) -> Any:
        """Per output tensor of the model: where it comes from, as ``op`` and output ``index``."""
        outputs = [self._output_places[key] for key in sorted(self._output_places)]
        return outputs[0] if len(outputs) == 1 else outputs

    @staticmethod
    def _collapse(places: dict[int, list[SimpleNamespace]]) -> list[Any]:
        listed = [places[key] for key in sorted(places)]
        return [place[0] if len(place) == 1 else place for place in listed]

    def _build(self, recording: Recording, model: nn.Module) -> None:
        self._recording, self._model = recording, model
        self._model_name = type(model).__name__
        modules = dict(model.named_modules(remove_duplicate=False))
        self._name_to_module = {self._dotted(path): module for path, module in modules.items()}
        self._module_to_name = {m: self._dotted(p) for p, m in model.named_modules()}
        self._by_module: dict[str, Op] = {}
        self._module_to_op_dict: dict[nn.Module, Op] = {}
        self._input_places: dict[int, list[SimpleNamespace]] = {}
        self._output_places: dict[int, SimpleNamespace] = {}
        nodes, tensors = recording.graph.nodes(), recording.graph.tensors()
        params = {entry["path"]: entry["params"] for entry in recording.graph.modules()}

        origin: list[int] = list(range(len(tensors)))
        ops: dict[int, Op] = {}
        # (consumer op, its input index) of every edge that leaves a node
        edges: dict[int, list[tuple[Op, int]]] = {}
        constants = 0
        for number, node in enumerate(nodes):
            if node["passthrough"]:
                source = next((t for _, t, _ in node["inputs"] if t is not None), None)
                for output in node["outputs"]:
                    if source is not None:
                        origin[output] = origin[source]
                continue
            if node["function"] is not None and not node["outputs"]:
                continue  # values that went to Python (`item`, `tolist`): no operation in this view
            op = self._make_op(len(ops), node, tensors, modules)
            ops[number] = op
            for index, (_, tensor, value) in enumerate(node["inputs"]):
                made = None if tensor is None else tensors[origin[tensor]]
                if made is not None and made["kind"] == "activation":
                    edges.setdefault(made["producer"][0], []).append((op, index))
                    op.inputs.append(Product("", made["shape"]))  # takes its place below
                    continue
                product = self._given(op, made, value, constants)
                constants += product.is_const
                op.inputs.append(product)
                product.add_consumer(op)
                self._products[product.name] = product
                if product.is_model_input and made is not None:
                    place = SimpleNamespace(op=op, index=index)
                    self._input_places.setdefault(made["position"], []).append(place)
            path = node["module"]
            for name, shape in params.get(path, ()) if path is not None else ():
                product = Product(f"{self._dotted(path)}.{name}", shape)
                product.is_parm, product.parm_name = True, name
                product.add_consumer(op)
                op.inputs.append(product)
                self._products[product.name] = product
        splits = {
            number: self._connect(ops[number], going, index)
            for index, (number, going) in enumerate(
                sorted((number, going) for number, going in edges.items() if len(going) > 1)
            )
        }
        for number, going in edges.items():
            if len(going) == 1:
                consumer, index = going[0]
                self._join(
                    f"{ops[number].name}_to_{consumer.name}", ops[number], [(consumer, index)]
                )
        self.ordered_ops: list[Op] = []
        for number, op in ops.items():
            self.ordered_ops.append(op)
            if number in splits:
                self.ordered_ops.append(splits[number])
        self._ops = {op.name: op for op in self.ordered_ops}
        self.ordered_ops = [op for op in self.ordered_ops if op.type != CG_SPLIT]
        self._starting_ops = [p.op for places in self._input_places.values() for p in places]
        for number, tensor in enumerate(tensors):
            if tensor["output"] is not None:
                made = tensors[origin[number]]
                if made["kind"] == "activation":
                    producer, index = made["producer"]
                    place = SimpleNamespace(op=ops[producer], index=index)
                    self._output_places[tensor["output"]] = place

    def _dotted(self, path: str) -> str:
        return f"{self._model_name}.{path}" if path else self._model_name

    def _make_op(
        self, count: int, node: dict[str, Any], tensors: list[Any], modules: dict[str, nn.Module]
    ) -> Op:
        path = node["module"]
        name = f"{node['op_type']}_{count}"
        shape = tensors[node["outputs"][0]]["shape"] if node["outputs"] else None
        if path is None:
            return Op(name, name, shape, False, node["op_type"], modules.get(node["scope"]))
        module = modules[path]
        residing = modules.get(path.rpartition(".")[0]) if path else None
        op = Op(name, self._dotted(path), shape, False, node["op_type"], residing)
        op.model_module = module
        op.groups = getattr(module, "groups", None)
        for ours, theirs in (
            ("num_in_channels", ("in_channels", "in_features", "num_features")),
            ("num_out_channels", ("out_channels", "out_features", "num_features")),
        ):
            setattr(
                op, ours, next((getattr(module, t) for t in theirs if hasattr(module, t)), None)
            )
        self._by_module[op.dotted_name] = op
        self._module_to_op_dict[module] = op
        return op

    def _given(
        self, op: Op, made: dict[str, Any] | None, value: float | None, count: int
    ) -> Product:
        """A product that no operation made: a model input, a parameter used by a function, a
        constant, a number.
        """
        if made is not None and made["kind"] == "input":
            product = Product(f"input_{made['position']}_to_{op.name}", made["shape"])
            product.is_model_input = True
        elif made is not None and made["kind"] == "parameter":
            product = Product(self._dotted(made["name"]), made["shape"])
            product.is_parm, product.parm_name = True, made["name"].rpartition(".")[2]
        else:
            product = Product(
                f"constant_{count}_to_{op.name}", [] if made is None else made["shape"]
            )
            product.is_const = True
            product.constant_value = value
        return product

    def _connect(self, producer: Op, going: list[tuple[Op, int]], number: int) -> Op:
        """Puts a split between a producer and its several consumers."""
        name = f"{CG_SPLIT}_{number}"
        split = Op(name, name, producer.output_shape, False, CG_SPLIT, producer.residing_module)
        split.inputs.append(Product("", producer.output_shape))
        self._join(f"{producer.name}__to__{name}", producer, [(split, 0)])
        self._join(f"{name}__to__multiple_ops", split, going)
        return split

    def _join(self, name: str, producer: Op, going: list[tuple[Op, int]]) -> None:
        product = Product(name, producer.output_shape)
        product.producer = producer
        producer.outputs.append(product)
        for consumer, index in going:
            consumer.inputs[index] = product
            if consumer not in product.consumers:
                product.add_consumer(consumer)
        self._products[name] = product
