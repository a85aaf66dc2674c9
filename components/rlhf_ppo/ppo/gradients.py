"""Gradients of weights as what they are the product of, until an optimizer takes them: one weight at a time.

That of all weights is then never in memory.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rlhf_ppo.ppo.lanes import share
from rlhf_ppo.ppo.products import weight_gradient

PART = 1 << 20
"""Numbers of a weight that are learned at once, so that a thread needs little memory."""
SMALL = 1 << 18
"""Numbers of a weight whose gradient may as well be in memory."""


class Product(NamedTuple):
    """Gradients of weights (n, k) below each other: ``of_output`` (tokens, all n) transposed, times ``inputs``."""

    weights: Sequence[Tensor]
    of_output: Tensor
    inputs: Tensor


class Part(NamedTuple):
    """What the gradient of some rows of a weight (n, k) is made of: a product, and ``added`` to its rows ``ids``."""

    weight: Tensor
    of_output: Tensor | None
    inputs: Tensor | None
    ids: Tensor | None
    added: Tensor | None

    def gradient(self) -> Tensor:
        """(rows, k)."""
        if self.of_output is None or self.inputs is None:
            found = torch.zeros_like(self.weight)
        else:
            found = weight_gradient(self.of_output, self.inputs)
        return found if self.ids is None or self.added is None else found.index_add_(0, self.ids, self.added)


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
        """``parameter``, of no product and without rows, has ``gradient``."""
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
        products = [norm_of(of_output) * norm_of(inputs) for _, of_output, inputs in self.products]
        others = [norm_of(other) for other in (*(rows for _, rows in self.rows.values()), *self.others.values())]
        return torch.stack([*products, *others]).sum()

    def materialize(self) -> None:
        """Add the gradients to the parameters' ``grad``."""

        def add(parameter: Tensor) -> None:
            parts = self._parts(parameter)
            whole = parameter.grad is None and len(parts) == 1
            if parameter.grad is None:
                parameter.grad = parts[0].gradient() if whole else torch.zeros_like(parameter)
            if not whole:
                for part, rows in zip(parts, parameter.grad.split(_at_once(parameter)), strict=True):
                    rows += part.gradient()

        with torch.no_grad():
            for parameter, gradient in self.others.items():
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
            if not self.small:
                share(self._large, add)
                return
            # Threads would wait for each other longer than they compute: each operation has all cores.
            for parameter in self._large:
                add(parameter)

    @cached_property
    def _large(self) -> list[Tensor]:
        """The parameters but for those whose gradients are here as they are."""
        return self.parameters[: len(self.parameters) - len(self.others)]

    @cached_property
    def _factors(self) -> dict[int, tuple[Tensor, Tensor]]:
        """What the gradient of each weight, by its id, is the product of."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for weights, of_output, inputs in self.products:
            parts = zip(weights, _apart(of_output, weights), strict=True)
            found |= {id(weight): (part, inputs) for weight, part in parts}
        return found

    def _parts(self, parameter: Tensor) -> list[Part]:
        """Those of ``parameter`` (n, k), each of ``_at_once`` rows."""
        size = _at_once(parameter)
        weights = parameter.split(size)
        nothing: list[Any] = [None] * len(weights)
        of_output, inputs = self._factors.get(id(parameter), (None, None))
        outputs = nothing if of_output is None else of_output.split(size, 1)
        ids = added = nothing
        if parameter in self.rows:
            ordered, order = self.rows[parameter][0].sort(stable=True)
            counts = torch.bincount(ordered // size, minlength=len(weights)).tolist()
            ids, added = ordered.remainder(size).split(counts), self.rows[parameter][1][order].split(counts)
        return [
            Part(weight, output, inputs, *rows)
            for weight, output, *rows in zip(weights, outputs, ids, added, strict=True)
        ]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of ``optimizer``, of which ``takes`` is true; returns the norm of all gradients, 0-d."""
        known, jobs = _known(self.parameters, optimizer), []
        torch._foreach_add_([state["step"] for _, state in known if state is not None], 1)
        for parameter, (group, state) in zip(self._large, known, strict=False):
            parts = self._parts(parameter)
            nothing: list[Any] = [None] * len(parts)
            means, squares = (
                nothing if group is None else state[name].split(_at_once(parameter))
                for name in ("exp_avg", "exp_avg_sq")
            )
            jobs += [(group, state, *each) for each in zip(parts, means, squares, strict=True)]
        # One tensor each, made between gradients, would leave holes of a hundred megabytes.
        norms = torch.zeros(len(jobs))

        def learn(number: int) -> None:
            group, state, part, mean, square = jobs[number]
            gradient = part.gradient()
            norms[number] = norm_of(gradient)
            if group is not None:
                _adam(group, [part.weight], [gradient], [mean], [square], [state["step"]])

        # The largest last would leave the other threads without work.
        share(sorted(range(len(jobs)), key=lambda number: -jobs[number][2].weight.numel()), learn)
        others = list(self.others.items())
        _adam_of_all([(*row, *of_it) for row, of_it in zip(others, known[len(self._large) :], strict=True)])
        return torch.linalg.vector_norm(torch.stack([norm_of(norms), *map(norm_of, self.others.values())]))

    @torch.no_grad()
    def step_at_once(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """``step`` with all gradients in memory, for those that are ``small``; none where the norm is not finite."""
        together = _together.get(optimizer)
        if together is None or not together.fits(self.parameters):
            together = _together[optimizer] = _Together(self)
        norm = together.take(self)
        if math.isfinite(norm):
            together.learn(optimizer)
        return norm


class _Together:
    """Memory for the gradients of small weights: one piece, which each step of an optimizer writes anew."""

    def __init__(self, gradients: Gradients) -> None:
        self.parameters = gradients.parameters
        self.whole = torch.empty(sum(parameter.numel() for parameter in self.parameters))
        # What each product is written to, and then the gradient of each of the parameters
        self.products: list[Tensor] = []
        self.parts: list[Tensor] = []
        place = 0
        for weights, of_output, inputs in gradients.products:
            shape = of_output.shape[1], inputs.shape[1]
            found = self.whole.as_strided(shape, (shape[1], 1), place)
            self.products.append(found)
            self.parts += found.split([weight.shape[0] for weight in weights])
            place += found.numel()
        self.rest, others = self.whole[place:], self.parameters[len(self.parts) :]
        parts = self.rest.split([parameter.numel() for parameter in others])
        self.parts += [part.view_as(parameter) for parameter, part in zip(others, parts, strict=True)]
        self.by_id = dict(zip(map(id, self.parameters), self.parts, strict=True))
        # What an optimizer's states count their steps with: parts of one tensor, so that they count in one operation
        self.steps = torch.empty(0)
        self.counts: list[Tensor] = []

    def fits(self, parameters: list[Tensor]) -> bool:
        """Whether it is made for these."""
        return _same(parameters, self.parameters)

    def take(self, gradients: Gradients) -> Tensor:
        """Write them here; returns their norm, 0-d."""
        for (_, of_output, inputs), found in zip(gradients.products, self.products, strict=True):
            weight_gradient(of_output, inputs, out=found)
        self.rest.zero_()
        for parameter, (ids, rows) in gradients.rows.items():
            self.by_id[id(parameter)].index_add_(0, ids, rows)
        others = self.parts[len(self.parts) - len(gradients.others) :]
        torch._foreach_copy_(others, list(gradients.others.values()))
        return norm_of(self.whole)

    def learn(self, optimizer: Any) -> None:
        """One step of ``optimizer`` with what was taken."""
        known = _known(self.parameters, optimizer)
        states = [state for _, state in known if state is not None]
        if states and not _same([state["step"] for state in states], self.counts):
            self.steps = torch.stack([state["step"] for state in states])
            self.counts = list(self.steps.unbind())
            for state, count in zip(states, self.counts, strict=True):
                state["step"] = count
        self.steps += 1
        rows = zip(self.parameters, self.parts, known, strict=True)
        _adam_of_all([(parameter, part, *of_it) for parameter, part, of_it in rows])


_together: WeakKeyDictionary[torch.optim.Optimizer, _Together] = WeakKeyDictionary()


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they are the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


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


def _at_once(parameter: Tensor) -> int:
    """How many of its rows are learned at once: parts alike, of ``PART`` numbers or fewer."""
    rows = len(parameter)
    return -(-rows // min(-(-parameter.numel() // PART), rows))


def _known(parameters: list[Tensor], optimizer: Any) -> list[tuple[Any, Any]]:
    """The group and the state of each of ``parameters``, which learn now; None where ``optimizer`` lacks it."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    found = []
    for parameter in parameters:
        group = groups.get(id(parameter))
        state = None if group is None else optimizer.state[parameter]
        if state is not None and not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        found.append((group, state))
    # What a scheduler of torch's looks for.
    optimizer._opt_called = True
    return found


def _adam_of_all(rows: list[tuple[Tensor, Tensor, Any, Any]]) -> None:
    """One step of parameters with their gradients, groups and states, all in one go but for those without a group."""
    learned: dict[int, tuple[Any, list[Any]]] = {}
    for parameter, gradient, group, state in rows:
        if group is not None:
            row = parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"]
            learned.setdefault(id(group), (group, []))[1].append(row)
    for group, of_group in learned.values():
        _adam(group, *map(list, zip(*of_group, strict=True)))


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
