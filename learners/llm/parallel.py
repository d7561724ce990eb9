"""Several learners as one: what each must know of the others' parts of a batch, and parameters divided among them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from learners.staging import Share


class Learners:
    """Sums over all learners and numbers gathered from them; all of them make the same calls.

    What an update needs of the whole batch (its token count, whose entropy is highest, …) is computed by every learner from
    gathered numbers, a few per token, so that N learners compute what one does on their batches together.
    """

    def __init__(self, share: Share, device: torch.device) -> None:
        self.rank, self.count = share.rank, share.count
        self._mean = share.mean
        self._device = device

    def sum_(self, tensor: Tensor) -> Tensor:
        """Makes a tensor, of one shape on all learners, the sum over them, in place."""
        if self._mean is not None:
            self._mean(tensor)
            tensor *= self.count
        return tensor

    def counts(self, own: int) -> list[int]:
        """What each learner passed."""
        found = torch.zeros(self.count, dtype=torch.float64, device=self._device)
        found[self.rank] = own
        return [round(value) for value in self.sum_(found).tolist()]

    def gather(self, values: Tensor) -> tuple[Tensor, slice]:
        """The values (n,) of all learners one after another, n its own on each, and where this learner's are."""
        if self.count == 1:
            return values, slice(0, len(values))
        counts = self.counts(len(values))
        begin = sum(counts[: self.rank])
        own = slice(begin, begin + len(values))
        # Sums with zeros: float64 holds every number here exactly.
        found = torch.zeros(sum(counts), dtype=torch.float64, device=self._device)
        found[own] = values.to(torch.float64)
        self.sum_(found)
        return (found if values.is_floating_point() else found.round()).to(values.dtype), own


def shard(module: nn.Module, network: nn.Module, *, device: torch.device, count: int) -> None:
    """Divides the parameters of `module`, of which `network` is the language model, among `count` learners (FSDP2).

    Every decoder layer is gathered when it is needed and freed afterwards; what lies outside the layers stays gathered from the
    forward pass to the end of the backward pass. The learners need a process group.

    Raises ValueError if the decoder layers cannot be found.
    """
    mesh = init_device_mesh(device.type, (count,))
    layers = network.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    stacks = [part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part) == layers]
    if not stacks:
        raise ValueError(
            f"learners.shard_parameters: expected a list of {layers} decoder layers in {type(network).__name__}, found none; "
            "leave it off for this model"
        )
    for part in (*stacks[0], module):
        whole = fully_shard(part, mesh=mesh)
        assert isinstance(whole, FSDPModule)
        if device.type == "cpu":
            whole.set_force_sum_reduction_for_comms(True)  # gloo has no mean


def release_gathered(module: nn.Module) -> None:
    """Gives up weights that a forward pass gathered, so that the next one gathers what the learners' parts hold by then."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a tensor that is divided, gathered by all learners together."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


def local(tensor: Tensor) -> Tensor:
    """This learner's part of a tensor, all of it where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_(tensor: Tensor, values: Tensor) -> None:
    """Takes over `values`, whole on every learner, into a tensor that may be divided among them."""
    values = values.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
