"""The contract of Gaussians that are trained: what every model of them can do, and in which order it may be asked.

A training step is

    rows = model.fetch(cameras)     the rows that the view needs, as leaves of autograd or made of such; told which
                                    degree is rendered, it may make the harmonics' gradient itself
    model.prefetch(next_cameras)    optional: the rows of the next view travel while this one is rendered
    ...                             rendering and the backward pass
    model.displace(rows, offsets)   optional: means of rows of the view move with the update
    model.update()                  one step of Adam on the gradients of the rows

Where something has been prefetched, the next `fetch` must be of those very cameras: of the same object, not of equal
ones. Between steps, and only there, rows may be read (`read_view`, `rows`, `state`), which keeps what was prefetched,
and changed (`read`, `append_copies`, `moving_rows`, `append_rows`, `truncate`, `overwrite`, `relocate`, `keep`,
`clamp_opacities`, `load_state`), which drops it. `undo_step` is allowed at any time and leads back to where the step
began. Everything else, numbers of Gaussians and counters, may be asked at any time.

`ORDER` says the same as a table, and `StepOrder` keeps a model to it: whatever is asked in a wrong order is refused by
one sentence, before anything has changed.

A `fetch` that has failed, as where device memory has run out, may be repeated with the same cameras. Anything else,
and anything at all after a `train_view` that has failed, needs `undo_step` first.

What is given is checked alike in every model: `overwrite` refuses names that are no parameters (ValueError), `rows`
refuses rows that there are not (IndexError), and `relocate` what its sentence rules out (ValueError).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from offload.adam.state import State
from offload.culling.cameras import Cameras
from offload.culling.cells import CoveredCells
from offload.pipelines.contract import Counters
from offload.store.contract import RowStore
from offload.store.growth import Growth
from offload.store.layout import GROUP_NAMES, group_shapes

Phase = Literal[
    "between steps",
    "before fetch() has succeeded",
    "before train_view() has succeeded",
    "between fetch() and update()",
    "between prefetch() and update()",
]
Verb = Literal["fetch", "prefetch", "displace", "update", "read", "change"]

ORDER: Mapping[tuple[Phase, Verb], Phase] = {
    ("between steps", "read"): "between steps",
    ("between steps", "change"): "between steps",
    ("between steps", "fetch"): "between fetch() and update()",
    ("before fetch() has succeeded", "fetch"): "between fetch() and update()",
    ("between fetch() and update()", "prefetch"): "between prefetch() and update()",
    ("between fetch() and update()", "displace"): "between fetch() and update()",
    ("between prefetch() and update()", "displace"): "between prefetch() and update()",
    ("between fetch() and update()", "update"): "between steps",
    ("between prefetch() and update()", "update"): "between steps",
}
BEGUN: Mapping[str, Phase] = {
    "fetch": "before fetch() has succeeded",
    "train_view": "before train_view() has succeeded",
}
PLACES: Mapping[Verb, str] = {
    "fetch": "between steps, once before each update()",
    "prefetch": "between fetch() and update(), once a step",
    "displace": "between fetch() and update()",
    "update": "after fetch(), once a step",
    "read": "between steps",
    "change": "between steps",
}


class WrongOrder(RuntimeError):
    """A method of a model was called where the contract does not allow it; nothing has changed."""


class StepOrder:
    """Keeps a model to the order of its contract."""

    def __init__(self) -> None:
        self._phase: Phase = "between steps"
        self._present: Cameras | None = None  # of the step, from the beginning of `fetch` on
        self._upcoming: Cameras | None = None  # that have been prefetched
        self._ids_are_good = True  # whether no rows have been changed since `fetch`
        self._changes = 0  # how often values of rows may have changed, in steps and between them
        self._undone: Cameras | None = None  # of the step that was undone, whose rows are known

    @contextmanager
    def taking(self, verb: Verb, method: str = "", cameras: Cameras | None = None) -> Iterator[None]:
        """Do what a method does, and then be in the phase that follows.

        Where that fails, the phase is the same as before; a fetch that fails has begun a step, though, which may be on
        the device in part.

        Args:
            verb: The kind of the method.
            method: Its name; the verb, where none is given.
            cameras: What `fetch` or `prefetch` is given.

        Raises:
            WrongOrder: It may not be called now.
        """
        following = ORDER.get((self._phase, verb))
        if following is None:
            raise WrongOrder(f"{method or verb}() was called {self._phase}, but belongs {PLACES[verb]}.")
        if verb == "fetch":
            self._begin(method or verb, cameras)
        elif verb == "change":
            self._upcoming = self._undone = None
            self._ids_are_good = False
        if verb in ("update", "change"):
            self._changes += 1
        yield
        self._phase = following
        if verb == "fetch":
            self._upcoming = self._undone = None
        elif verb == "prefetch":
            self._upcoming = cameras

    def _begin(self, method: str, cameras: Cameras | None) -> None:
        """Be in a step on these cameras, whose rows are not yet there.

        Raises:
            WrongOrder: Those of other cameras are on the way.
        """
        if self._phase != "between steps" and cameras is not self._present:
            raise WrongOrder(
                f"{method}() was given other cameras than the fetch() before it, which has failed: "
                "give it the same object, or call undo_step() first."
            )
        if self._upcoming is not None and cameras is not self._upcoming:
            raise WrongOrder(f"{method}() was given other cameras than prefetch() before it: give it the same object.")
        self._phase, self._present, self._ids_are_good = BEGUN[method], cameras, True

    def check_ids(self) -> None:
        """Check that the ids of the last view still name its rows.

        Raises:
            WrongOrder: Rows have been changed.
        """
        if not self._ids_are_good:
            raise WrongOrder("ids was asked for after rows had changed: it names those of the last fetch() until then.")

    @contextmanager
    def reading_on(self, method: str, changes: int) -> Iterator[None]:
        """Go on reading what `method` had begun to read after so many `changes`.

        Raises:
            WrongOrder: It may not be read now, or rows have changed.
        """
        with self.taking("read", method):
            if changes != self._changes:
                raise WrongOrder(f"{method}() was read on after rows had changed: call it again.")
            yield

    @property
    def changes(self) -> int:
        """Return how often values of rows may have changed."""
        return self._changes

    def knows_rows_of_other(self, cameras: Cameras) -> bool:
        """Tell whether the rows known for the next step are those of a step undone, and not of these cameras."""
        return self._undone is not None and cameras is not self._undone

    def undo(self) -> None:
        """Go back to where the step began."""
        if self._phase != "between steps":
            self._undone, self._upcoming = self._present, None
        self._phase = "between steps"


def check_rows(first: int, last: int, num_gaussians: int) -> None:
    """Check that there are rows `first` to `last - 1`.

    Raises:
        IndexError: There are not.
    """
    if not 0 <= first <= last <= num_gaussians:
        raise IndexError(f"rows {first} to {last - 1} of {num_gaussians}")


def check_names(names: Iterable[str]) -> None:
    """Check that these are names of parameters.

    Raises:
        ValueError: One is not.
    """
    known = [name for group in GROUP_NAMES for name in group_shapes(group, 0)]
    for name in names:
        if name not in known:
            raise ValueError(f'"{name}" is no parameter of Gaussians: they have {", ".join(known)}.')


class GaussianModel(Protocol):
    """N Gaussians that are trained, wherever their parameters and Adam moments are."""

    steps_done: int

    @property
    def num_gaussians(self) -> int:
        """Return N."""

    @property
    def device(self) -> torch.device:
        """Return where geometry is; densification keeps its statistics there."""

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras, sh_degree: int | None = None) -> Mapping[str, Any]:
        """Return the rows [V] that cameras may draw, for `training.gaussians.activate`, on the rendering device.

        They are read until `update`: a model may make some of them when they are asked for.

        Args:
            cameras: Of the view.
            sh_degree: Of the harmonics that these cameras will render, where they stand, and no others. A model may
                then give harmonics in a form of its own, as `colors`, and make the gradient of shN from that of sh0,
                to which colours alone add. None: all parameters are tensors, and receive their gradients.
        """

    def prefetch(self, cameras: Cameras, strays: Tensor | None = None) -> None:
        """Prepare the view after this one; not where rows will be changed before it.

        Args:
            cameras: Of that view.
            strays: int64 [F], sorted, rows of the present view that `displace` may move farther than
                `AdamOptions.displacement`, which belong to that view wherever they lie; None: none.
        """

    def update(self) -> None:
        """Take one step of Adam on the gradients of the rows that `fetch` gave; all others have none."""

    def displace(self, rows: Tensor, offsets: Tensor) -> None:
        """Move the means of some rows of the view together with the step of Adam that `update` takes.

        Where the next view is prefetched, rows that move farther than `AdamOptions.displacement` in any coordinate have
        been named there. Where the step is undone, nothing has moved. It is called once a step.

        Args:
            rows: int64 [D] on the rendering device, positions among the rows of the view, ascending, each once.
            offsets: float32 [D, 3] there, in world units.
        """

    @property
    def ids(self) -> Tensor:
        """Return which Gaussians the last `fetch` gave, int64 [V] on the rendering device.

        Raises:
            WrongOrder: Rows have been changed since.
        """

    # --------------------------------------------------------------------------------------------------- reading

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Return rows [V] as `fetch` does, without gradients; training is not disturbed."""

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return the current values of rows `first` to `last - 1` of the six parameters, detached."""

    # --------------------------------------------------------------------------------------------- densification

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the current values [N, ...] of one geometry parameter, or those of rows [M], detached.

        All of them are not copied, where they lie on `device`.
        """

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M]; the copies start without Adam moments."""

    def moving_rows(self, ids: Tensor) -> dict[str, Tensor]:
        """Return copies of rows [M] with their moments, all steps applied, named as in `state`; for `append_rows`."""

    def append_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows [M] that a model of the same kind has returned from `moving_rows` after as many steps."""

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where appending has failed half-way."""

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, named or not, unless they are left."""

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Count the bytes of each device's memory that appending so many Gaussians takes at its peak."""

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Return everything that training goes on from, as `offload.adam.state` describes it; not copied."""

    def copied_before_change(self) -> dict[str, RowStore]:
        """Name the tensors of `state` that change only after `before_change` of their store has been called.

        All others may change as soon as training goes on.
        """

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """

    # --------------------------------------------------------------------------------------------------- figures

    def skipped_steps(self) -> tuple[int, int]:
        """Count the steps with a gradient that was not finite, and those of them that were the last in a row."""

    def counters(self) -> Counters:
        """Return what has been counted so far; waits for what counts on the device."""


class GeometryPlace(Protocol):
    """Where geometry is: `DeviceGeometry`, `PackedGeometry`, `HostGeometry` or `CulledGeometry`."""

    @property
    def num_gaussians(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def stores(self) -> Mapping[str, RowStore]:
        """Return the store by its group, where rows of geometry travel as those of the appearance do; none else."""

    @property
    def steps_done(self) -> int: ...

    def visible_ids(self, cameras: Cameras) -> Tensor:
        """Find the sorted ids [V], where geometry is, of what cameras may draw after one more step."""

    def expect_strays(self, ids: Tensor | None) -> None:
        """Find these rows, sorted int64 [F], for every camera from now on; None: none any more."""

    def covered_cells(self, ids: Tensor, cameras: Cameras, *, halo: int, cell: int) -> list[CoveredCells]:
        """Find in which cells of each camera's picture rows [V] may draw after one more step.

        Args:
            ids: int64 [V] where geometry is.
            cameras: C of them.
            halo: Pixels that are added to what a row draws.
            cell: Pixels of a cell's side.
        """

    def gather(self, ids: Tensor) -> dict[str, Tensor]:
        """Copy the current values of rows [V] by name, sh0 too where they have it; nothing where they travel."""

    def update(self, ids: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Take the next step of Adam on rows [V] with their gradients, as from `gather`."""

    def displace(self, ids: Tensor, offsets: Tensor) -> None:
        """Add offsets [D, 3] to the means of rows [D], where geometry does not travel; they may lag behind."""

    def catch_up(self, ids: Tensor | None) -> None:
        """Apply the skipped steps of rows [M], each of them once; None: of all rows.

        Rows that travel are caught up by their pipeline, which comes first.
        """

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the values [N, ...] of a parameter, or those of rows [M], on `device`; all have been caught up."""

    def append_blank(self, count: int) -> None: ...

    def append_copies(self, ids: Tensor) -> None: ...

    def truncate(self, num_gaussians: int) -> None: ...

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None: ...

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None: ...

    def keep(self, ids: Tensor) -> None: ...

    def clamp_opacities(self, max_logit: float) -> None: ...

    def growth(self, num_new: int) -> dict[torch.device, Growth]: ...

    def state(self) -> dict[str, Tensor]:
        """Return all that training goes on from and that no store has, as `offload.adam.state` names it."""

    def load_state(self, state: State) -> None:
        """Go on from a state; its rows that travel have been loaded."""
