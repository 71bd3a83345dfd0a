"""What a run trains beside the Gaussians, such as a sky or each photo's exposure: parameters with their own Adam."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.adam.deferral import DeferralTables, adam_step, caught_up, decayed

EPS = 1e-15  # of Adam, as for the Gaussians
ALL = slice(None)
ARRAYS = ("rows", "exp_avg", "exp_avg_sq")  # [n, d] each


@dataclass(frozen=True)
class Training:
    """Say how a run trains its modules."""

    decay: Callable[[int], float]  # of learning rates, at a step from 0
    betas: tuple[float, float]  # Adam's decay rates per step
    device: torch.device  # where pictures are rendered


class TrainedModule(nn.Module):
    """Hold n rows of d parameters, each row with a name, and the Adam that trains them.

    A step reads and updates the rows of its view alone. The others are deferred as those of Gaussians are, so that a
    step costs nothing for them and the result is that of dense Adam (`offload/adam/deferral.py`). A step is

        module.fetch(rows)  # which rows the view needs
        used = module.leaf()  # once for each part of the view that is propagated back by itself
        module.gather()  # when that part's backward pass is complete; the last part may leave it to `update`
        module.update()

    A part that fails, as where memory runs out, is begun again by `leaf`, and what it had left is forgotten.
    """

    by_row: tuple[str, ...] = (*ARRAYS, "last_step")  # buffers that belong to rows, and are known again with them
    rows: Tensor  # [n, d], which lag behind by the steps since their last update
    last_step: Tensor  # [n] int64, of each row's last update

    def __init__(
        self,
        names: Sequence[str],
        initial: Tensor,
        learning_rate: float,
        training: Training,
        multipliers: Tensor | None = None,
    ) -> None:
        """
        Args:
            names: n different ones, by which a resumed run knows the rows again.
            initial: [...] with d numbers, what each row is at first.
            learning_rate: Of the first step.
            training: How it goes on.
            multipliers: [d] of the learning rate, where it is not the same of all numbers of a row.
        """
        super().__init__()
        self.names = list(names)
        self._shape = tuple(initial.shape)
        self._learning_rate = learning_rate
        self._decay = training.decay
        device = training.device
        rows = initial.detach().to(device, torch.float32).reshape(1, -1).repeat(len(self.names), 1)  # [n, d]
        for name, value in zip(ARRAYS, (rows, torch.zeros_like(rows), torch.zeros_like(rows)), strict=True):
            self.register_buffer(name, value)
        self.register_buffer("last_step", torch.zeros(len(rows), dtype=torch.int64, device=device))
        multipliers = torch.ones(1) if multipliers is None else multipliers
        self._tables = DeferralTables(multipliers[None], training.betas, EPS, device)
        self._ids: Tensor | None = None  # [U] int64, the rows of the step, each once
        self._places: Tensor | None = None  # [C] int64, of the view's rows in these
        self._values = self._gradient = rows[:0]  # [U, d]
        self._leaf: Tensor | None = None  # of a part whose gradient is not gathered yet

    @property
    def is_fetched(self) -> bool:
        """Tell whether a step has begun and is not complete."""
        return self._ids is not None

    @property
    def steps_done(self) -> int:
        return self._tables.step

    def begin_at(self, steps_done: int) -> None:
        """Let the rows, as they are, be those after so many steps, in which they had no gradient."""
        self._tables.load_state({"step_count": torch.tensor(steps_done)})

    def values(self, rows: Tensor) -> Tensor:
        """Return rows [C, ...] after the last step, without a gradient.

        Args:
            rows: [C] int64, anywhere.
        """
        w, m, v, last_step = self._stored(rows.to(self.last_step.device))
        return caught_up(w, m, v, last_step, self._tables).view(-1, *self._shape)

    def values_ahead(self, rows: Tensor) -> Tensor:
        """Return what `values` will after the present step, bit for bit, of rows that are not in it.

        Args:
            rows: [C] int64, anywhere.
        """
        self._tables.begin_step(self._next_rate())
        values = self.values(rows)
        self._tables.undo_step()
        return values

    def fetch(self, rows: Tensor, own: slice = ALL) -> None:
        """Begin a step that uses rows.

        Args:
            rows: [G] int64 on the host, of which some may be the same. Where ranks train together, those of all ranks,
                which have the sum of their gradients.
            own: Which of them this process uses: C.
        """
        ids, places = torch.unique(rows, return_inverse=True)  # on the host, where nothing waits for the device
        ids, self._places = (t.to(self.last_step.device, non_blocking=True) for t in (ids, places[own]))
        self._ids = ids
        self._values = self.values(ids).view(len(ids), -1)
        self._gradient = torch.zeros_like(self._values)
        self._leaf = None

    def leaf(self) -> Tensor:
        """Return the view's rows [C, ...] for one part of it, of which autograd finds the gradient.

        Raises:
            RuntimeError: No step has begun.
        """
        if self._places is None:
            raise RuntimeError("a module's rows are used before they are fetched")
        self._leaf = self._values.clone().requires_grad_()
        return self._leaf.view(-1, *self._shape)[self._places]

    def gather(self) -> None:
        """Add the gradient of the part that `leaf` began to that of the step; one that is yet to come is waited for."""
        if self._leaf is not None and self._leaf.grad is not None:
            self._gradient += self._leaf.grad
            self._leaf = None

    def forget_gradient(self) -> None:
        """Let the gradient of the step be zero, whatever parts of the view have had of it."""
        self._leaf = None
        self._gradient.zero_()

    @property
    def gradient(self) -> Tensor:
        """Return the gradient [U, d] of the step's rows, as far as it is gathered; not copied."""
        return self._gradient

    def penalty(self, rows: Tensor) -> Tensor | None:
        """Return what the loss has of the step's rows [U, ...] themselves, whatever they show; None for nothing."""
        return None

    def update(self) -> None:
        """Apply one step of Adam to the rows that were fetched; a row's gradient that is not finite counts as zero."""
        self.gather()
        rate = self._next_rate()
        if self._ids is not None:
            penalised = self._values.clone().requires_grad_()
            penalty = self.penalty(penalised.view(-1, *self._shape))
            if penalty is not None:
                self._gradient += torch.autograd.grad(penalty, penalised)[0]
            finite = self._gradient.isfinite().all(dim=1, keepdim=True)
            self._step(self._ids, torch.where(finite, self._gradient, 0.0), rate)
        self._tables.begin_step(rate)
        self._ids = self._places = None

    def _next_rate(self) -> list[float]:
        return [self._learning_rate * self._decay(self._tables.step)]

    def _step(self, ids: Tensor, gradient: Tensor, rate: list[float]) -> None:
        w, m, v, last_step = self._stored(ids)
        w = caught_up(w, m, v, last_step, self._tables)
        m, v = decayed(m, v, self._tables.step - last_step, self._tables)
        step = self._tables.next_step_sizes(rate)
        adam_step(w, m, v, gradient, step.sizes, step)
        for name, value in zip(ARRAYS, (w, m, v), strict=True):
            self.get_buffer(name)[ids] = value
        self.last_step[ids] = self._tables.step + 1

    def _stored(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copy rows [U, d] with both moments, and the step [U] of their last update."""
        w, m, v = (self.get_buffer(name)[ids] for name in ARRAYS)
        return w, m, v, self.last_step[ids]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return everything that training goes on from, by name; names of rows as bytes."""
        names = "\0".join(self.names).encode("utf-8", "surrogateescape")
        return {
            **super().state_dict(),
            **self._tables.tables(),
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Tensor], *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Go on from such a state; rows of names that it lacks stay as they are. An empty one changes nothing.

        Raises:
            KeyError, ValueError: It is not a state of such a module.
        """
        if not state:
            return
        names = bytes(state["names"].tolist()).decode("utf-8", "surrogateescape").split("\0")
        loaded = {name: state[name].to(self.last_step.device) for name in self.by_row}
        for name, value in loaded.items():
            if value.shape != (len(names), *self.get_buffer(name).shape[1:]):
                raise ValueError(name)
        if self._tables.matches(state):
            self._tables.load_state(state)
        else:  # Adam goes on otherwise, so no row may lag behind
            self._catch_up(loaded, state)
            self._tables.load_state({"step_count": state["step_count"]})
        before = {name: row for row, name in enumerate(names)}
        pairs = [(row, before[name]) for row, name in enumerate(self.names) if name in before]
        if pairs:
            now, then = torch.tensor(pairs, device=self.last_step.device).T
            for name, value in loaded.items():
                self.get_buffer(name)[now] = value[then]

    def _catch_up(self, loaded: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Bring loaded rows to the last step that their own tables know."""
        b1, b2 = state["betas"].tolist()
        tables = DeferralTables(state["multipliers"], (b1, b2), state["eps"].item(), self.last_step.device)
        tables.load_state(state)
        w, m, v, last_step = (loaded[name] for name in (*ARRAYS, "last_step"))
        loaded["rows"] = caught_up(w, m, v, last_step, tables)
        loaded["exp_avg"], loaded["exp_avg_sq"] = decayed(m, v, tables.step - last_step, tables)
        loaded["last_step"] = torch.full_like(last_step, tables.step)
