"""The acting network as ONNX, version after version: for actors outside Ray, who need numpy and ONNX Runtime alone.

torch writes the graph of the first version, in seconds. Later versions are the same graph with other initializers, in
milliseconds, so a process can keep up with the learner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cluster.onnx_graph import write_graph
from cluster.outside import Policy, Tensor
from configs.schema import RunConfig
from replay.schema import StepSchema

if TYPE_CHECKING:
    import onnx

    from learners.acting_modules import Port


class PolicyExporter:
    """Exports the versions of a run's policy. For a process of its own, which imports torch; it needs no GPU."""

    def __init__(self, config: RunConfig, schema: StepSchema) -> None:
        """`schema` is that of the environment's steps.

        Raises:
            RuntimeError: a package that writes ONNX is missing.
            EnvError: the environment's spaces cannot be found.
        """
        from cluster.export import action_space, check_packages, space_map

        check_packages()
        self._config, self._schema = config, schema
        self._space = action_space(space_map(config.env))
        self._graph: onnx.ModelProto | None = None
        self._constant: dict[str, NDArray[np.generic]] = {}  # what of the module is no initializer of the graph

    def export(self, version: int, weights: bytes) -> Policy:
        """The policy with these weights, a safetensors buffer as the learner publishes it.

        Raises:
            ValueError: the weights are no policy of such a run, or the policy is a class of the user's.
            RuntimeError: something in the policy, such as a user's encoder, has no counterpart in ONNX.
        """
        from learners.acting_modules import ActingModule

        config = self._config
        module = ActingModule(self._schema, config.algorithm, self._space, weights, stack=config.env.stack).eval()
        arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        if self._graph is None or any(not np.array_equal(arrays[name], had) for name, had in self._constant.items()):
            # What the optimiser folds, it would fold with these weights for good. ONNX Runtime optimises what it loads.
            self._graph = write_graph(module, optimise=False)
            taken = {initializer.name for initializer in self._graph.graph.initializer}
            self._constant = {name: array.copy() for name, array in arrays.items() if name not in taken}
        data = _with(self._graph, arrays, {"policy_version": str(version), "algorithm": config.algorithm.name})
        return Policy(version, data, weights, _tensors(module.input_ports), _tensors(module.output_ports))


def _with(graph: onnx.ModelProto, arrays: dict[str, NDArray[np.generic]], metadata: dict[str, str]) -> bytes:
    """The graph as a file, with other arrays as those of its initializers that have their names."""
    import onnx

    for initializer in graph.graph.initializer:
        if initializer.name in arrays:
            initializer.CopyFrom(onnx.numpy_helper.from_array(arrays[initializer.name], initializer.name))
    onnx.helper.set_model_props(graph, metadata)
    data: bytes = graph.SerializeToString()
    return data


def _tensors(ports: tuple[Port, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(*port) for port in ports)
