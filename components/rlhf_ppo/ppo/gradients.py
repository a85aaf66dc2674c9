"""Gradients of weights as what they are the product of, until an optimizer takes them: one weight at a time.

The whole gradient of a weight then never leaves the processor's cache, and that of all weights is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.ppo.lanes import share

MOST = 1 << 22
"""Numbers of a weight that is learned at once; of a larger one (embeddings) as many rows as have fewer."""
SMALL = 1 << 18
"""Numbers of a weight whose gradient may as well be in memory."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What Adam knows of a parameter, as torch names it."""


class Gradients:
    """What a backward pass gives: products, rows of embeddings, and small gradients as they are."""

    def __init__(self) -> None:
        self.products: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.rows: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.others: dict[Tensor, Tensor] = {}

    def add_products(self, inputs: Tensor, outputs: list[tuple[Tensor, Tensor]]) -> None:
        """Each weight (n, k) has its of_output (n, tokens) times ``inputs`` (k, tokens), transposed."""
        self.products |= {weight: (of_output, inputs) for weight, of_output in outputs if weight.requires_grad}

    def add_rows(self, weight: Tensor, ids: Tensor, columns: Tensor) -> None:
        """The rows ``ids`` (tokens,) of ``weight`` (n, k) have ``columns`` (k, tokens)."""
        if weight.requires_grad:
            self.rows[weight] = (ids, columns.t())

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """``parameter`` has ``gradient``."""
        if parameter.requires_grad:
            self.others[parameter] = gradient

    @property
    def parameters(self) -> list[Tensor]:
        """What has a gradient."""
        return list(dict.fromkeys([*self.products, *self.rows, *self.others]))

    @property
    def small(self) -> bool:
        """Whether all of it may as well be in memory."""
        return all(parameter.numel() <= SMALL for parameter in self.parameters)

    def bound(self) -> Tensor:
        """A number that the norm of all gradients does not exceed, 0-d: a product's is at most its factors' product."""
        factors = {id(factor): factor for pair in self.products.values() for factor in pair}
        norms = {number: norm_of(factor) for number, factor in factors.items()}
        bounds = [norms[id(of_output)] * norms[id(inputs)] for of_output, inputs in self.products.values()]
        others = [*(rows for _, rows in self.rows.values()), *self.others.values()]
        return torch.stack([*bounds, *map(norm_of, others)]).sum()

    def materialize(self) -> None:
        """Add the gradients to the parameters' ``grad``."""

        def add(parameter: Tensor) -> None:
            for part in _parts(parameter):
                gradient = self._of(parameter, part)
                if parameter.grad is None and len(gradient) == len(parameter):
                    parameter.grad = gradient
                    return
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad[part] += gradient

        with torch.no_grad():
            if not self.small:
                share(self.parameters, add)
                return
            # Threads would wait for each other longer than they compute: each operation has all cores.
            for parameter in self.parameters:
                add(parameter)

    def _of(self, parameter: Tensor, part: slice, into: Tensor | None = None) -> Tensor:
        """The gradient of the rows ``part`` of ``parameter``, written ``into`` that."""
        found = torch.empty_like(parameter[part]) if into is None else into
        if parameter in self.products:
            of_output, inputs = self.products[parameter]
            torch.mm(of_output[part], inputs.t(), out=found)
        else:
            found.zero_()
        if parameter in self.rows:
            ids, rows = self.rows[parameter]
            here = (ids >= part.start) & (ids < part.stop)
            found.index_add_(0, ids[here] - part.start, rows[here])
        return found.add_(self.others[parameter][part]) if parameter in self.others else found

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of ``optimizer``, of which ``takes`` is true; returns the norm of all gradients, 0-d."""
        jobs = [(parameter, part) for parameter in self.parameters for part in _parts(parameter)]
        groups, states = self._begin(optimizer)
        norms = torch.zeros(len(jobs))

        def learn(job: tuple[int, tuple[Tensor, slice]]) -> None:
            number, (parameter, part) = job
            gradient = self._of(parameter, part)
            norms[number] = norm_of(gradient)
            if parameter in groups:
                state = states[parameter]
                moments = [state["exp_avg"][part]], [state["exp_avg_sq"][part]]
                _adam(groups[parameter], [parameter[part]], [gradient], *moments, [state["step"]])

        # The largest last would leave the other threads without work.
        share(sorted(enumerate(jobs), key=lambda job: -job[1][0].numel()), learn)
        return torch.linalg.vector_norm(norms)

    @torch.no_grad()
    def step_at_once(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """``step`` with all gradients in memory, for those that are ``small``; none where the norm is not finite."""
        parameters = self.parameters
        whole = torch.empty(sum(parameter.numel() for parameter in parameters))
        parts = whole.split([parameter.numel() for parameter in parameters])
        gradients = {
            parameter: self._of(parameter, slice(0, len(parameter)), part.view_as(parameter))
            for parameter, part in zip(parameters, parts, strict=True)
        }
        norm = norm_of(whole)
        if not bool(torch.isfinite(norm)):
            return norm
        groups, states = self._begin(optimizer)
        for group in optimizer.param_groups:
            of_group = [parameter for parameter in parameters if groups.get(parameter) is group]
            if of_group:
                of_states = [[states[parameter][name] for parameter in of_group] for name in MOMENTS]
                _adam(group, of_group, [gradients[parameter] for parameter in of_group], *of_states)
        return norm

    def _begin(self, optimizer: Any) -> tuple[dict[Tensor, dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """The group and the state of each parameter that ``optimizer`` has; a step is counted."""
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        states = {parameter: optimizer.state[parameter] for parameter in self.parameters if parameter in groups}
        for parameter, state in states.items():
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        torch._foreach_add_([state["step"] for state in states.values()], 1)
        # What a scheduler of torch's looks for.
        optimizer._opt_called = True
        return groups, states


def norm_of(matrix: Tensor) -> Tensor:
    """Its 2-norm, 0-d. What lies in one piece is read by BLAS: in half the time of torch's norm, and more exactly."""
    for plain in (matrix, matrix.t()):
        if plain.is_contiguous():
            flat = plain.view(-1)
            return torch.dot(flat, flat).sqrt()
    return torch.linalg.vector_norm(matrix)


def takes(optimizer: Any) -> bool:
    """Whether ``optimizer`` is torch's fused Adam and nothing more, nor watched: what can step one weight at a time."""
    step = vars(optimizer).get("step")
    watched = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    # A scheduler of torch's replaces ``step`` by one that counts.
    if (
        type(optimizer) is not torch.optim.Adam
        or watched
        or not (step is None or hasattr(step, "_wrapped_by_lr_sched"))
    ):
        return False
    return all(
        group["fused"] and not (group["amsgrad"] or group["maximize"] or group["weight_decay"])
        and not isinstance(group["lr"], Tensor)
        for group in optimizer.param_groups
    )  # fmt: skip


def _parts(parameter: Tensor) -> Iterator[slice]:
    """The rows of ``parameter`` in parts."""
    rows = len(parameter)
    at_once = max(MOST * rows // parameter.numel(), 1)
    for start in range(0, rows, at_once):
        yield slice(start, min(start + at_once, rows))


def _adam(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    beta1, beta2 = group["betas"]
    torch._fused_adam_(
        parameters, gradients, means, squares, [], steps,
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=0.0, eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip
