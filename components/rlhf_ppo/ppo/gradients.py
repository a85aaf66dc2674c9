"""Gradients of weights as what they are the product of, until an optimizer takes them: one weight at a time.

The whole gradient of a weight then never leaves the processor's cache, and that of all weights is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.ppo.lanes import share

MOST = 1 << 22
"""Numbers of a weight that is learned at once; of a larger one (embeddings) as many rows as have fewer."""
SMALL = 1 << 18
"""Numbers of a weight whose gradient may as well be in memory."""


class Product(NamedTuple):
    """Gradients of weights (n, k) below each other: ``of_output`` (tokens, all n) transposed, times ``inputs``."""

    weights: Sequence[Tensor]
    of_output: Tensor
    inputs: Tensor


class Gradients:
    """What a backward pass gives: products, rows of embeddings, and small gradients as they are."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.rows: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.others: dict[Tensor, Tensor] = {}

    def add_products(self, weights: Sequence[Tensor], of_output: Tensor, inputs: Tensor) -> None:
        """``weights`` have the rows of ``of_output`` (tokens, n) transposed times ``inputs`` (tokens, k), in order."""
        if all(weight.requires_grad for weight in weights):
            self.products.append(Product(weights, of_output, inputs))
            return
        for weight, part in zip(weights, _apart(of_output, weights), strict=True):
            if weight.requires_grad:
                self.products.append(Product([weight], part, inputs))

    def add_rows(self, weight: Tensor, ids: Tensor, rows: Tensor) -> None:
        """The rows ``ids`` (tokens,) of ``weight`` (n, k) have ``rows`` (tokens, k)."""
        if weight.requires_grad:
            self.rows[weight] = (ids, rows)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """``parameter`` has ``gradient``."""
        if parameter.requires_grad:
            self.others[parameter] = gradient

    @cached_property
    def parameters(self) -> list[Tensor]:
        """What has a gradient, once all is added; those of a product stand next to each other."""
        learned = [weight for product in self.products for weight in product.weights]
        # By their ids: a tensor's hash is a function of Python's.
        return list({id(parameter): parameter for parameter in (*learned, *self.rows, *self.others)}.values())

    @property
    def small(self) -> bool:
        """Whether all of it may as well be in memory."""
        return all(parameter.numel() <= SMALL for parameter in self.parameters)

    def bound(self) -> Tensor:
        """A number that the norm of all gradients does not exceed, 0-d: a product's is at most its factors' product."""
        factors = [factor for product in self.products for factor in (product.of_output, product.inputs)]
        norms = torch.zeros(len(factors))

        def read(number: int) -> None:
            norms[number] = norm_of(factors[number])

        share(sorted(range(len(factors)), key=lambda number: -factors[number].numel()), read)
        others = [*(rows for _, rows in self.rows.values()), *self.others.values()]
        return torch.cat([norms.view(-1, 2).prod(1), *(norm_of(other)[None] for other in others)]).sum()

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

    @cached_property
    def _factors(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """What the gradient of each weight is the product of."""
        found: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for weights, of_output, inputs in self.products:
            found |= {weight: (part, inputs) for weight, part in zip(weights, _apart(of_output, weights), strict=True)}
        return found

    def _of(self, parameter: Tensor, part: slice) -> Tensor:
        """The gradient of the rows ``part`` of ``parameter``."""
        found = torch.empty_like(parameter[part])
        if parameter in self._factors:
            of_output, inputs = self._factors[parameter]
            torch.mm(of_output[:, part].t(), inputs, out=found)
        else:
            found.zero_()
        self._add_the_rest(found, parameter, part)
        return found

    def _add_the_rest(self, gradient: Tensor, parameter: Tensor, part: slice) -> None:
        """Add what is no product to the ``gradient`` of the rows ``part`` of ``parameter``."""
        if parameter in self.rows:
            ids, rows = self.rows[parameter]
            if len(gradient) < len(parameter):
                here = (ids >= part.start) & (ids < part.stop)
                ids, rows = ids[here] - part.start, rows[here]
            gradient.index_add_(0, ids, rows)
        if parameter in self.others:
            gradient += self.others[parameter][part]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of ``optimizer``, of which ``takes`` is true; returns the norm of all gradients, 0-d."""
        known = zip(self.parameters, self._begin(optimizer), strict=True)
        jobs = [(parameter, part, *of_it) for parameter, of_it in known for part in _parts(parameter)]
        norms = torch.zeros(len(jobs))

        def learn(job: tuple[int, tuple[Tensor, slice, Any, Any]]) -> None:
            number, (parameter, part, group, state) = job
            gradient = self._of(parameter, part)
            norms[number] = norm_of(gradient)
            if group is not None:
                moments = [state["exp_avg"][part]], [state["exp_avg_sq"][part]]
                _adam(group, [parameter[part]], [gradient], *moments, [state["step"]])

        # The largest last would leave the other threads without work.
        share(sorted(enumerate(jobs), key=lambda job: -job[1][0].numel()), learn)
        return torch.linalg.vector_norm(norms)

    @torch.no_grad()
    def step_at_once(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """``step`` with all gradients in memory, for those that are ``small``; none where the norm is not finite."""
        whole = torch.empty(sum(parameter.numel() for parameter in self.parameters))
        parts: list[Tensor] = []
        place = 0
        for weights, of_output, inputs in self.products:
            shape = of_output.shape[1], inputs.shape[1]
            found = whole.as_strided(shape, (shape[1], 1), place)
            torch.mm(of_output.t(), inputs, out=found)
            parts += [found] if len(weights) == 1 else found.split([weight.shape[0] for weight in weights])
            place += shape[0] * shape[1]
        rest = self.parameters[len(parts) :]
        others = whole[place:].zero_().split([parameter.numel() for parameter in rest])
        parts += [part.view_as(parameter) for parameter, part in zip(rest, others, strict=True)]
        by_id = dict(zip(map(id, self.parameters), parts, strict=True))
        for parameter in {*self.rows, *self.others}:
            self._add_the_rest(by_id[id(parameter)], parameter, slice(0, parameter.shape[0]))
        norm = norm_of(whole)
        if not bool(torch.isfinite(norm)):
            return norm
        learned: dict[int, tuple[Any, list[Any]]] = {}
        for parameter, part, (group, state) in zip(self.parameters, parts, self._begin(optimizer), strict=True):
            if group is not None:
                row = parameter, part, state["exp_avg"], state["exp_avg_sq"], state["step"]
                learned.setdefault(id(group), (group, []))[1].append(row)
        for group, rows in learned.values():
            _adam(group, *map(list, zip(*rows, strict=True)))
        return norm

    def _begin(self, optimizer: Any) -> list[tuple[Any, Any]]:
        """The group and the state of each of the parameters, None where ``optimizer`` lacks it; a step is counted."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        found = []
        for parameter in self.parameters:
            group = groups.get(id(parameter))
            state = None if group is None else optimizer.state[parameter]
            if state is not None and not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            found.append((group, state))
        torch._foreach_add_([state["step"] for _, state in found if state is not None], 1)
        # What a scheduler of torch's looks for.
        optimizer._opt_called = True
        return found


def _apart(of_output: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """What each of ``weights`` (n, k) has of ``of_output`` (tokens, all n)."""
    return of_output.split([weight.shape[0] for weight in weights], 1)


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
