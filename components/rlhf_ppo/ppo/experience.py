"""One batch of responses, of all processes, with all that its update needs; and how far that update has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlhf_ppo.config import PPOConfig
from rlhf_ppo.errors import InputError
from rlhf_ppo.ppo.advantages import last_tokens, on_last_token
from rlhf_ppo.ppo.kl_control import RunningMoments, shape_scores
from rlhf_ppo.ppo.rollout import Rollout
from rlhf_ppo.ppo.tensors import length_mask, pad_rows

Score = float | Tensor | Sequence[float]
"""What a response earned: one number, or one number for each of its tokens."""


@dataclass(frozen=True)
class Experience:
    """One batch, ready for the update, on the host. All arrays are (batch, response); entries outside ``mask`` are 0.

    ``earned`` is what the scores gave each token, ``rewards`` the same less the KL penalty.
    """

    rollout: Rollout
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    earned: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass
class Update:
    """A PPO step under way. ``order`` holds the rows of the pass ``epoch``, of which ``position`` are done.

    ``seen`` has the statistics of each minibatch (n,), in the order of ``names``; ``norms`` of each optimizer step the
    norm of the gradients, and whether any minibatch counted (2,). Both stay on the device until the end. ``extra`` goes
    among the step's statistics.
    """

    experience: Experience
    temperature: float
    scores: Tensor
    raw_scores: Tensor
    controller_kl: float
    epoch: int = 0
    order: list[int] = field(default_factory=list)
    position: int = 0
    optimizer_steps: int = 0
    names: list[str] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Everything, as nested dicts and lists of tensors and numbers."""
        experience = {**vars(self.experience), "rollout": dict(vars(self.experience.rollout))}
        return {**vars(self), "experience": experience}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Update:
        """The inverse of ``state``, with ``seen`` and ``norms`` on ``device``."""
        experience = dict(state["experience"])
        rollout = Rollout(**experience.pop("rollout"))
        measured = {name: [row.to(device) for row in state[name]] for name in ("seen", "norms")}
        return cls(**{**state, **measured, "experience": Experience(rollout=rollout, **experience)})


def gathered(
    accelerator: Accelerator,
    rollout: Rollout,
    columns: dict[str, list[Tensor]],
    totals: list[float],
    by_token: list[Tensor] | None,
) -> tuple[Rollout, dict[str, list[Tensor]], list[float], list[Tensor] | None]:
    """The rows of all processes, in the order of the processes. Raises InputError where their kinds of score differ."""
    if accelerator.num_processes == 1:
        return rollout, columns, totals, by_token
    found: dict[str, Any] = {}
    for name, rows in {**vars(rollout), **columns, "totals": totals, "by_token": by_token}.items():
        found[name] = gather_object(list(rows or [])) or None
    for name in ("masks", "by_token"):
        if found[name] is not None and len(found[name]) != len(found["totals"]):
            raise InputError(f"{name}: some processes gave them and others did not")
    whole = Rollout(**{name: found[name] for name in vars(rollout)})
    return whole, {name: found[name] for name in columns}, found["totals"], found["by_token"]


def response_mask(rollout: Rollout, width: int | None = None) -> Tensor:
    """(batch, response) booleans: the tokens that count; as wide as the longest response, or ``width``.

    Raises InputError for a mask of another length.
    """
    lengths = [len(response) for response in rollout.responses]
    mask = length_mask(lengths, width=width)
    if rollout.masks is None:
        return mask
    for row, given in enumerate(rollout.masks):
        if len(given) != lengths[row]:
            raise InputError(f"response_masks: row {row} has {len(given)} entries, its response {lengths[row]} tokens")
    return mask & pad_rows([row.bool() for row in rollout.masks], False, width)


def split_scores(scores: Sequence[Score], rollout: Rollout) -> tuple[list[float], list[Tensor] | None]:
    """The sum of what each response earned; and, where any score is one per token, what every token earned.

    A number among those is earned by the last token that is the policy's own. Raises InputError for a list of another
    length.
    """
    responses = rollout.responses
    tables = [score if isinstance(score, Tensor) else torch.tensor(score, dtype=torch.float32) for score in scores]
    by_token = [
        table.dim() == 1 and table.numel() != 1 or isinstance(scores[row], list) for row, table in enumerate(tables)
    ]
    for row, (table, response) in enumerate(zip(tables, responses, strict=True)):
        if table.dim() > 1 or (by_token[row] and len(table) != len(response)):
            raise InputError(
                f"scores: row {row} has shape {tuple(table.shape)}; give one number, or one for each of the response's "
                f"{len(response)} tokens"
            )
    totals = [float(table.double().sum()) for table in tables]
    if not any(by_token):
        return totals, None
    whole = []
    last = last_tokens(response_mask(rollout)).tolist()
    for table, each, response, place in zip(tables, by_token, responses, last, strict=True):
        alone = torch.zeros(len(response))
        if not each and place >= 0:
            alone[place] = float(table)
        whole.append(table.float().cpu().clone() if each else alone)
    return totals, whole


def fine(raw_scores: Tensor, by_token: list[Tensor] | None, ended: list[bool], mask: Tensor, penalty: float) -> Tensor:
    """``raw_scores`` (batch,) less ``penalty`` where a response has not ended; so are those ``by_token``.

    There the last token in ``mask`` (batch, response) pays.
    """
    last = last_tokens(mask).tolist() if by_token else []
    for row, tokens in enumerate(by_token or []):
        if not ended[row] and last[row] >= 0:
            tokens[last[row]] -= penalty
    return raw_scores - penalty * ~torch.tensor(ended)


def shaped_for(config: PPOConfig, scores: Tensor, moments: RunningMoments, by_token: bool) -> tuple[Tensor, float]:
    """Scores (batch,) scaled, centred and clipped as ``config`` says, and the scale.

    Raises InputError where that is for one score per response, and tokens have their own.
    """
    if by_token and (config.use_score_norm or config.score_clip is not None):
        raise InputError(
            f"use_score_norm={config.use_score_norm}, score_clip={config.score_clip}: these are for one score per "
            "response, and the reward gave one per token: set neither"
        )
    return shape_scores(
        scores, moments, scaling=config.use_score_scaling, center=config.use_score_norm, clip=config.score_clip
    )


def earned_by_token(shaped: Tensor, factor: float, rows: list[Tensor] | None, mask: Tensor) -> Tensor:
    """What each token earned (batch, response): ``shaped`` scores on the last, or ``rows`` times ``factor``.

    Raises InputError where a token that the mask leaves out earned something.
    """
    if rows is None:
        return on_last_token(shaped, mask)
    table = pad_rows(rows, 0, mask.shape[1]) * factor
    if bool((table[~mask] != 0).any()):
        raise InputError("scores: a token that response_masks leaves out earned something: give it 0")
    return table
