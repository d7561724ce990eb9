"""The critic: an ensemble of chains of value networks with their targets, evaluated in one batched product per layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from learners.heads import Label, Mse, ValueHead
from learners.networks import Network, Pass
from learners.trained import Reduce, Trained

Part = Literal["online", "target", "moment"]
Change = Callable[[Tensor, Tensor, Part], tuple[Tensor, Tensor]]  # weight and bias of a last layer to those of another


class Learnt(NamedTuple):
    """What a step of a critic saw, before it."""

    loss: Tensor  # 0-dimensional
    value: Tensor  # (K, E, batch)
    error: Tensor  # (K, E, batch): label − value
    logits: Tensor  # (K, E, batch, outputs)


class Critic:
    """K·E value networks θ_1 … θ_K and as many targets θ̄_0 … θ̄_{K−1}; network k·E + e is function k + 1 of member e.

    Function k regresses on a backup of target k − 1, so that one batch fits K consecutive Bellman updates (Vincent et al.
    2025, Iterated Q-Network, §4). K = 1 is the plain algorithm: one function and its target.
    """

    def __init__(
        self,
        network: Network,
        head: ValueHead,
        initial: Tensor,
        *,
        chain: int,
        lr: float,
        weight_decay: float,
        precision: torch.dtype,
        reduce: Reduce | None,
        has_target: bool = True,
    ) -> None:
        """`initial` as for `Trained`; `has_target` False is for a critic that nothing bootstraps from."""
        self.chain = chain
        self.ensemble = network.networks // chain
        self._make = partial(Trained, lr=lr, weight_decay=weight_decay, precision=precision, reduce=reduce)
        self._precision = precision
        self._build(network, head, initial, initial.clone() if has_target else None)

    def _build(self, network: Network, head: ValueHead, value: Tensor, target: Tensor | None) -> None:
        self.head = head
        self.online = self._make(network, value)
        self.target = target
        self._low: Tensor | None = None
        if target is None:
            return
        self._low = None if self._precision == target.dtype else target.to(self._precision)
        self._target_views = network.views(target if self._low is None else self._low)
        first, rest = slice(0, self.ensemble), slice(self.ensemble, network.networks)
        but_last = slice(0, rest.stop - rest.start)
        self._first_pairs = _pairs(network, target, first, value, first)
        self._rest_pairs = _pairs(network, target, rest, value, but_last)

    def change_head(self, head: ValueHead, change: Change) -> None:
        """Takes another head, with `change` making a last layer for it; everything else stays, Adam's moments too."""
        network = self.online.network
        values = network.outputs // self.head.outputs
        widened = network.with_outputs(values * head.outputs)

        def changed(flat: Tensor, part: Part) -> Tensor:
            last, fresh = network.last_layer(flat), flat.new_empty(widened.size)
            kept = network.size - last.weight.numel() - last.bias.numel()
            fresh[:kept] = flat[:kept]
            made = widened.last_layer(fresh)
            weight, bias = change(last.weight, last.bias, part)
            made.weight.copy_(weight)
            made.bias.copy_(bias)
            return fresh

        tensors = self.online.tensors
        value = changed(self.online.value, "online")
        target = None if self.target is None else changed(self.target, "target")
        self._build(widened, head, value, target)
        for name, fresh in self.online.tensors.items():
            if name != "value":
                fresh.copy_(changed(tensors[name], "moment") if fresh.dim() else tensors[name])
        self.refresh()

    # ------------------------------------------------------------------------------------------------------ values

    def __call__(self, x: Tensor, frames: Tensor | None = None, *, gradient: bool = True) -> Pass:
        """The online networks at (batch, inputs); without `gradient` none of their parameters is asked for."""
        return self.online.network(self.online.views, x, frames, gradient=gradient)

    def targets(self, x: Tensor, frames: Tensor | None = None) -> Tensor:
        """Outputs (K, E, batch, outputs) of the targets at (batch, inputs)."""
        return self.by_function(self.online.network(self._target_views, x, frames, gradient=False).output)

    def by_function(self, output: Tensor) -> Tensor:
        """(K·E, batch, outputs) as (K, E, batch, outputs)."""
        return output.view(self.chain, -1, *output.shape[1:])

    def function(self, index: Tensor, x: Tensor, frames: Tensor | None = None) -> Pass:
        """The online networks of the function `index` (1,) int64 of the chain alone: outputs (E, batch, outputs).

        They are copies, so no parameter's gradient can be asked for.
        """
        chosen = index * self.ensemble + torch.arange(self.ensemble, device=index.device)
        network, views = self.online.network.select(self.online.views, chosen)
        return network(views, x, frames, gradient=False)

    # ------------------------------------------------------------------------------------------------------ learning

    def learn(
        self,
        x: Tensor,
        frames: Tensor | None,
        label: Label,
        *,
        weight: Tensor | None,
        expectile: Tensor | float | None,
    ) -> Learnt:
        """One step of every network towards a label (K, batch, …) of its function, or (K, E, batch, …) of its own.

        The loss is a sum over networks and a mean over the batch, weighted by `weight` (batch,). An `expectile` other than
        ½ makes it asymmetric (Newey and Powell 1987): losses of values below their label count more.
        """
        made = self(x, frames)
        learnt, grad = loss_and_gradient(
            self.head, self.by_function(made.output), label, weight=weight, expectile=expectile
        )
        self.regress(made, grad)
        return learnt

    def regress(self, made: Pass, grad: Tensor) -> None:
        """One step of the optimiser along the gradient `grad` (K, E, batch, outputs) of the outputs of `made`."""
        made.parameter_gradient(grad.flatten(0, 1), self.online.grads)
        self.online.descend()

    def track(self, share: float) -> None:
        """Moves θ̄_0 towards θ_1 by `share` (Polyak averaging)."""
        assert self.target is not None
        if self.chain == 1:
            self.target.lerp_(self.online.value, share)
        else:
            for target, online in self._first_pairs:
                target.lerp_(online, share)
        self._refresh()

    def copy_chain(self) -> None:
        """θ̄_k ← θ_k for k ≥ 1: every target but the first is the function before."""
        if self.target is None:
            return
        for target, online in self._rest_pairs:
            target.copy_(online)
        self._refresh()

    def shift(self) -> None:
        """θ̄_k ← θ_{k+1} for all k, then θ_k ← θ_{k+1} for k < K: the chain moves one Bellman update on."""
        assert self.target is not None
        self.target.copy_(self.online.value)
        advance(self.online, self.ensemble)
        self._refresh()

    def _refresh(self) -> None:
        if self._low is not None and self.target is not None:
            self._low.copy_(self.target)

    def refresh(self) -> None:
        """Call after the parameters were changed from outside."""
        self.online.refresh()
        self._refresh()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        found = {f"online.{name}": tensor for name, tensor in self.online.tensors.items()}
        return found if self.target is None else found | {"target.value": self.target}


def smallest(head: ValueHead, logits: Tensor) -> Tensor:
    """Outputs (…, batch, outputs) of the member with the smallest value, of (…, E, batch, outputs)."""
    if logits.shape[-3] == 1:
        return logits.squeeze(-3)
    if isinstance(head, Mse):
        return logits.amin(-3)
    least = head.mean(logits).argmin(-2, keepdim=True).unsqueeze(-1)  # (…, 1, batch, 1)
    return logits.take_along_dim(least, -3).squeeze(-3)


def expectile_weight(error: Tensor, expectile: Tensor | float) -> Tensor:
    """Weights 2·|κ − 1(error < 0)| of losses with `error` = target − prediction: 1 everywhere at κ = ½."""
    above = torch.as_tensor(expectile, device=error.device, dtype=error.dtype)
    return 2.0 * torch.where(error < 0, 1.0 - above, above)


def advance(online: Trained, ensemble: int) -> None:
    """θ_k ← θ_{k+1} for k < K, of the networks of a critic with `ensemble` members; the last function stays."""
    network, value = online.network, online.value
    count = network.networks - ensemble
    # What is read lies behind what is written, in one tensor: hence the clone where a member's range covers several functions.
    for to, after in _pairs(network, value, slice(0, count), value, slice(ensemble, network.networks)):
        to.copy_(after.clone())
    online.refresh()


def loss_and_gradient(
    head: ValueHead,
    logits: Tensor,
    label: Label,
    *,
    weight: Tensor | None,
    expectile: Tensor | float | None,
) -> tuple[Learnt, Tensor]:
    """What `Critic.learn` takes a step along: the loss of value `logits` (K, E, batch, outputs), and its gradient of them.

    For critics whose networks value many actions at once, of which only the logits of the one that was taken learn. Arguments
    as for `Critic.learn`.
    """
    target, wanted = label
    if wanted.dim() < 3:
        target, wanted = target.unsqueeze(1), wanted.unsqueeze(1)
    loss, grad = head.loss(logits, target)  # (K, E, batch), (K, E, batch, outputs)
    value = head.mean(logits)
    error = wanted - value
    if expectile is not None and not (isinstance(expectile, float) and expectile == 0.5):
        scale = expectile_weight(error, expectile)
        loss, grad = loss * scale, grad * scale.unsqueeze(-1)
    if weight is not None:
        loss, grad = loss * weight, grad * weight.unsqueeze(-1)
    size = logits.shape[-2]
    return Learnt(loss.sum() / size, value, error, logits), grad / size


def _pairs(network: Network, to: Tensor, of: slice, source: Tensor, at: slice) -> list[tuple[Tensor, Tensor]]:
    return list(zip(network.members(to, of), network.members(source, at), strict=True))
