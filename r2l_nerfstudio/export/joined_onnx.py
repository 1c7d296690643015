"""Join ONNX graphs that follow each other into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def join_onnx(*stages: onnx.ModelProto) -> onnx.ModelProto:
    """Return one model of several, each of which takes outputs of those before it, and inputs of the whole, by name.

    Its inputs are those that no stage produces, its outputs those that no stage takes.

    Args:
        stages: in their order; they are changed and must not be used afterwards.
    """
    from onnx import helper

    made = {output.name for stage in stages for output in stage.graph.output}
    taken = {value.name for stage in stages for value in stage.graph.input}
    nodes, initializers, inputs, outputs, domains = [], [], {}, [], {}
    for number, stage in enumerate(stages):
        graph = stage.graph
        _rename(graph, f"stage{number}_", made | taken)
        nodes += graph.node
        initializers += graph.initializer
        inputs |= {value.name: value for value in graph.input if value.name not in made and value.name not in inputs}
        outputs += [value for value in graph.output if value.name not in taken]
        for opset in stage.opset_import:
            domains[opset.domain] = max(opset.version, domains.get(opset.domain, 0))
    graph = helper.make_graph(nodes, "student", list(inputs.values()), outputs, initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=max(stage.ir_version for stage in stages))


def fix_sizes(model: onnx.ModelProto, sizes: dict[str, tuple[int, ...]]) -> None:
    """Fix the shapes of inputs and outputs, by name."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes[value.name], strict=True):
            dim.dim_value = size


def _rename(graph: onnx.GraphProto, prefix: str, shared: set[str]) -> None:
    """Add a prefix to all names but the shared ones."""

    def renamed(name: str) -> str:
        return name if not name or name in shared else prefix + name

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
