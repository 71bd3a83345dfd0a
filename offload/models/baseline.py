"""The baseline's Gaussians: everything on the host, nothing optimized (the naive offloading of GS-Scale)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload.adam.finite import FiniteGradients
from offload.adam.host import DeferredAdam
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import State, copy_current
from offload.culling.cameras import Cameras
from offload.culling.native import BlockBounds, visible_ids
from offload.models.contract import StepOrder, check_names, check_rows
from offload.pipelines.contract import MEANS, Counters, Displacement
from offload.pipelines.times import OffloadTimes
from offload.pipelines.transfer import RowTransfer
from offload.store.contract import RowStore
from offload.store.growth import peaks, total_growth
from offload.store.host_store import HostStore
from offload.store.layout import GROUP_NAMES
from offload.store.memory import HostArray


class BaselineGaussians:
    """All Gaussians in two host stores, of geometry and appearance.

    A step visits every one of them twice: culling and dense Adam. Nothing is done ahead. The verbs, and the order in
    which they may be called, are those of `offload.models.contract.GaussianModel`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        adam: AdamOptions,
        *,
        device: torch.device,
        max_gaussians: int = 0,
    ) -> None:
        """
        Args:
            parameters: The six tensors of `training.gaussians.initial_gaussians`.
            adam: Learning rates, decay rates and epsilon.
            device: Where views are rendered.
            max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        """
        self.steps_done = 0
        self._rendering_device = device
        self._times = OffloadTimes()
        self.stores: dict[str, HostStore] = {}
        self._adams: dict[str, DeferredAdam] = {}
        self._rates: dict[str, Callable[[int], list[float]]] = {}
        self._transfers: dict[str, RowTransfer] = {}
        self._gradients: dict[str, HostArray] = {}  # of all rows, zero but between the backward pass and Adam
        for name in GROUP_NAMES:
            store = HostStore(parameters, name, max_gaussians=max_gaussians, pin=device.type == "cuda")
            multipliers, self._rates[name] = schedules_of(name, store.sh_degree, adam)
            columns = multipliers.shape[1]
            self.stores[name] = store
            self._adams[name] = DeferredAdam(multipliers, adam.betas, adam.eps)
            self._transfers[name] = RowTransfer(columns, device, self._times)
            self._gradients[name] = HostArray(columns, max_rows=store.max_rows)
        self._ids = torch.zeros(0, dtype=torch.int64)  # [V] of the present view
        self._rows: dict[str, Tensor] = {}
        self._displaced: Displacement | None = None  # of all rows, with the present step
        self._finite = FiniteGradients(device)
        self._order = StepOrder()

    @property
    def num_gaussians(self) -> int:
        return self.stores["geometry"].num_gaussians

    @property
    def device(self) -> torch.device:
        """Return where geometry is."""
        return self.stores["geometry"].device

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras, sh_degree: int | None = None) -> dict[str, Tensor]:
        """Return the rows [V] that a view needs, on the device, for `training.gaussians.activate`."""
        with self._order.taking("fetch", cameras=cameras):
            self._ids = self._cull(cameras)
            self._rows = {name: rows.requires_grad_() for name, rows in self._upload(self._ids).items()}
            return self._to_render(self._rows)

    @property
    def ids(self) -> Tensor:
        """Return which Gaussians the last `fetch` gave, int64 [V] on the rendering device."""
        self._order.check_ids()
        return self._ids.to(self._rendering_device)

    def prefetch(self, cameras: Cameras, strays: Tensor | None = None) -> None:
        """Do nothing: the next view's rows are fetched when it is rendered."""
        with self._order.taking("prefetch", cameras=cameras):
            pass

    def displace(self, rows: Tensor, offsets: Tensor) -> None:
        """Move the means of these rows [D] of the view by offsets [D, 3], with the update."""
        with self._order.taking("displace"):
            self._displaced = Displacement(self._ids[rows.cpu()], offsets)

    def update(self) -> None:
        """Take a step of dense Adam over all rows, with the gradients of those that `fetch` gave."""
        with self._order.taking("update"):
            self._update()

    def _update(self) -> None:
        self._finite.keep(self._rows.values())
        for name, store in self.stores.items():
            leaves = self._rows[name]
            self._gradients[name].resize(self.num_gaussians)
            gradients = self._gradients[name].tensor  # [N, columns]
            if leaves.grad is not None:
                gradients.index_copy_(0, self._ids, self._transfers[name].download(leaves.grad).ready())
            adam = self._adams[name]
            adam.begin_step(self._rates[name](adam.step + 1))
            with store.changing(None) as rows:
                adam.dense(rows, gradients)
                if self._displaced is not None and name == "geometry":
                    self._displaced.add_to(rows.parameters[:, MEANS])
                    self._displaced = None
            gradients.index_fill_(0, self._ids, 0.0)
        self._rows = {}
        self._set_steps_done(self.steps_done + 1)

    # --------------------------------------------------------------------------------------------------- reading

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Return copies of the rows [V] that a view needs, as from `fetch`; training is not disturbed."""
        with self._order.taking("read", "read_view"):
            return self._to_render(self._upload(self._cull(cameras)))

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return slices of the stores: these rows of the six parameter tensors."""
        with self._order.taking("read", "rows"):
            check_rows(first, last, self.num_gaussians)
            stored = {name: values for store in self.stores.values() for name, values in store.snapshot().items()}
            return {name: values[first:last] for name, values in stored.items()}

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Return all that training goes on from, as `offload.adam.state` describes it: slices of the stores."""
        with self._order.taking("read", "state"):
            return {"step_count": torch.tensor(self.steps_done), **self._arrays_by_name()}

    def copied_before_change(self) -> dict[str, RowStore]:
        """Name no tensors of `state`: every step changes all rows."""
        return {}

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        with self._order.taking("change", "load_state"):
            copy_current(self._arrays_by_name(), state)
            for adam in self._adams.values():
                adam.load_state({"step_count": state["step_count"]})
            self._set_steps_done(int(state["step_count"]))

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        if any(adam.step != self.steps_done for adam in self._adams.values()):
            raise RuntimeError("the step had been applied in part")
        self._rows, self._displaced = {}, None
        self._order.undo()

    # --------------------------------------------------------------------------------------------------- figures

    def skipped_steps(self) -> tuple[int, int]:
        """Count the steps with a gradient that was not finite, and those of them that were the last in a row."""
        return self._finite.skipped_steps()

    def counters(self) -> Counters:
        """Count allocations of staging memory, and milliseconds of copies by direction."""
        staging_allocations = sum(transfer.staging_allocations for transfer in self._transfers.values())
        return Counters(staging_allocations, self._times.milliseconds())

    # --------------------------------------------------------------------------------------------- densification

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the values of one geometry parameter, a slice of the store; or copies of those of rows [M]."""
        with self._order.taking("change", "read"):
            return self.stores["geometry"].read(name, ids)

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        with self._order.taking("change", "append_copies"):
            for store in self.stores.values():
                store.append_copies(ids)

    def moving_rows(self, ids: Tensor) -> dict[str, Tensor]:
        """Return copies of rows [M] with their moments, named as in `state`; for `append_rows`."""
        with self._order.taking("change", "moving_rows"):
            return {key: stored[ids] for key, stored in self._arrays_by_name().items()}

    def append_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows [M] that `moving_rows` has returned."""
        with self._order.taking("change", "append_rows"):
            first = self.num_gaussians
            for store in self.stores.values():
                store.append_blank(len(rows["parameters/means"]))
            for key, stored in self._arrays_by_name().items():
                stored[first:] = rows[key]

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where one store has them only, since appending has failed."""
        with self._order.taking("change", "truncate"):
            for store in self.stores.values():
                store.truncate(num_gaussians)

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, unless they are left."""
        with self._order.taking("change", "overwrite"):
            check_names(values)
            for store in self.stores.values():
                store.overwrite(ids, values, leaves_moments=leaves_moments)

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""
        with self._order.taking("change", "relocate"):
            for store in self.stores.values():
                store.relocate(source_ids, target_ids)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        with self._order.taking("change", "keep"):
            for store in self.stores.values():
                store.keep(ids)

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        with self._order.taking("change", "clamp_opacities"):
            self.stores["geometry"].clamp_opacities(max_logit)

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Count the bytes of memory that appending this many Gaussians takes at its peak."""
        gradients = sum(4 * adam.columns for adam in self._adams.values())
        stores = peaks(total_growth(self.stores.values(), num_new))
        return {**stores, self.device: stores[self.device] + num_new * gradients}

    # --------------------------------------------------------------------------------------------------- inside

    def _set_steps_done(self, steps: int) -> None:
        self.steps_done = steps
        for store in self.stores.values():
            store.step = steps

    def _arrays_by_name(self) -> dict[str, Tensor]:
        return {key: value for store in self.stores.values() for key, value in store.arrays_by_name().items()}

    def _cull(self, cameras: Cameras) -> Tensor:
        geometry = self.stores["geometry"].rows.parameters
        return visible_ids(geometry, BlockBounds(geometry), cameras)  # all rows have moved, so the bounds are new

    def _upload(self, ids: Tensor) -> dict[str, Tensor]:
        rows = {}
        for name, store in self.stores.items():
            parameters = store.rows.parameters

            def fill(out: Tensor, begin: int, end: int, parameters: Tensor = parameters) -> None:
                torch.index_select(parameters, 0, ids[begin:end], out=out)

            rows[name] = self._transfers[name].upload(len(ids), fill).ready()
        return rows

    def _to_render(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value
            for name, store in self.stores.items()
            for key, value in store.layout.to_render(rows[name]).items()
        }
