"""Gaussians whose rows of a view are brought to where it is rendered: where they are, and what works on all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor

from offload.adam.deferral import DeferralTables
from offload.adam.finite import FiniteGradients, gradient_of
from offload.adam.harmonics import HarmonicsGradient, position_of
from offload.adam.options import AdamOptions
from offload.adam.schedules import schedules_of
from offload.adam.state import ARRAYS, PACKED_GEOMETRY, State, load_deferred, named_tables
from offload.adam.stored_harmonics import StoredHarmonics
from offload.culling.cameras import Cameras
from offload.models.contract import GeometryPlace, StepOrder, WrongOrder, check_names, check_rows
from offload.models.geometry_culled import CulledGeometry
from offload.models.geometry_device import DeviceGeometry
from offload.models.geometry_host import HostGeometry
from offload.models.geometry_packed import PackedGeometry
from offload.models.named_rows import NamedRows
from offload.pipelines.contract import Counters, Displacement, FetchedRows, FetchesStored, Pipeline, ReadsPresent
from offload.pipelines.groups import RowGroup
from offload.store.contract import RowStore
from offload.store.growth import peaks, total_growth
from offload.store.host_store import HostStore
from offload.store.layout import TIGHT_WORDS, Moments, StateFormat, group_columns, with_words

CONSTANT = group_columns("geometry", sh_degree=0, state="compact")["sh0"]  # columns of a row of geometry
Place = Literal["device", "host"]
Parts = tuple[GeometryPlace, Mapping[str, RowGroup], Pipeline]  # in which a model holds its rows
Adam = TypeVar("Adam", bound=DeferralTables)


class OffloadedGaussians:
    """Gaussians whose geometry has a place, and whose other rows travel through a pipeline.

    The verbs, and the order in which they may be called, are those of `offload.models.contract.GaussianModel`.
    """

    def __init__(
        self,
        geometry: GeometryPlace,
        groups: Mapping[str, RowGroup],
        pipeline: Pipeline,
        device: torch.device,
    ) -> None:
        """
        Args:
            geometry: Where means, scales, quats and opacities are.
            groups: What travels: the appearance, and geometry where it is on the host.
            pipeline: Moves it.
            device: Where views are rendered.
        """
        self.steps_done = 0
        self._use(geometry, groups, pipeline)
        self._rendering_device = device
        self._order = StepOrder()
        self._caught_up_at: int | None = None  # the step at which all rows of geometry were last brought to it
        self._finite = FiniteGradients(device)
        self._rows: FetchedRows | None = None  # of the present view, or of its present tile
        self._ids = torch.zeros(0, dtype=torch.int64, device=device)  # [V] of the present view
        self._leaves: dict[str, Tensor] = {}  # [V, ...] of geometry that does not travel
        self._displaced: Displacement | None = None  # rows of the present view, with its update
        # The camera, the harmonics and the means [V, 3] of the present view, where harmonics are not copied, and their
        # gradient is made.
        self._seen: tuple[Cameras, StoredHarmonics, Tensor] | None = None

    @property
    def num_gaussians(self) -> int:
        return self._groups["appearance"].store.num_gaussians

    @property
    def device(self) -> torch.device:
        """Return where geometry is."""
        return self._geometry.device

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras, sh_degree: int | None = None) -> NamedRows:
        """Return the rows [V] that a view needs, on the device, for `training.gaussians.activate`."""
        with self._order.taking("fetch", cameras=cameras):
            self._forget_other_rows(cameras)
            self._seen = None
            if sh_degree is None or len(cameras.viewmats) != 1 or self._stored is None:
                rows = self._pipeline.fetch(cameras)
                with self._known_for_another_fetch(rows):
                    return self._to_render(rows)
            rows, stored = self._stored.fetch_stored(cameras, "appearance")
            with self._known_for_another_fetch(rows):
                named = self._to_render(rows)
                if stored.has_constant:  # zeros receive its gradient
                    named["sh0"] = torch.zeros(len(rows.ids), 1, 3, device=rows.ids.device).requires_grad_()
                harmonics = StoredHarmonics(named.pop("sh0"), stored, sh_degree)
                self._seen = cameras, harmonics, named["means"].detach()
                named["colors"] = harmonics
                return named

    @property
    def ids(self) -> Tensor:
        """Return which Gaussians the last `fetch` gave, int64 [V] on the rendering device."""
        self._order.check_ids()
        return self._ids

    def prefetch(self, cameras: Cameras, strays: Tensor | None = None) -> None:
        """Prepare the view after this one, `strays` [F] included; not where densification changes rows before it."""
        with self._order.taking("prefetch", cameras=cameras):
            self._geometry.expect_strays(strays)
            self._pipeline.prefetch(cameras)

    def displace(self, rows: Tensor, offsets: Tensor) -> None:
        """Move the means of these rows [D] of the view by offsets [D, 3], with the update."""
        with self._order.taking("displace"):
            self._displaced = Displacement(rows, offsets)

    def update(self) -> None:
        """Take Adam's step on the gradients of the rows that `fetch` gave."""
        with self._order.taking("update"):
            self._keep_finite()
            gradients = self._geometry_gradients()
            made = self._harmonics_gradient()
            travels, displaced = "geometry" in self._groups, self._displaced
            if travels and displaced is not None:
                self._pipeline.displace(displaced)
            self._update_travelled(made)
            self._forget_harmonics()
            if not travels and displaced is not None:
                self._geometry.displace(self._ids[displaced.rows], displaced.offsets)
            self._displaced = None
            self._geometry.update(self._ids, gradients)
            self._pipeline.geometry_moved()
            self._geometry.expect_strays(None)  # which have moved, so that they are found where they lie
            self._leaves, self._rows = {}, None
            self.steps_done += 1

    # --------------------------------------------------------------------------------------------------- reading

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Return copies of the rows [V] that a view needs, as from `fetch`; training is not disturbed."""
        with self._order.taking("read", "read_view"):
            self._pipeline.finish()
            return self._copies_to_render(self._geometry.visible_ids(cameras))

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return copies of the current values of these rows of the six parameter tensors."""
        with self._order.taking("read", "rows"):
            check_rows(first, last, self.num_gaussians)
            ids = torch.arange(first, last)
            values = self._geometry.gather(ids.to(self.device))
            for name, group in self._groups.items():
                values.update(group.store.layout.named(self._pipeline.read(name, ids)))
            return values

    # --------------------------------------------------------------------------------------------- densification

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the current values of one geometry parameter, or those of rows [M]."""
        with self._order.taking("change", "read"):
            self._catch_geometry_up()
            return self._geometry.read(name, ids)

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M], without moments."""
        with self._changing("append_copies", ids):
            for place in self._places():
                place.append_copies(ids)

    def moving_rows(self, ids: Tensor) -> dict[str, Tensor]:
        """Return copies of rows [M] with their moments, all steps applied, named as in `state`; for `append_rows`."""
        with self._changing("moving_rows", ids):
            rows = {key: stored[ids.to(stored.device)] for key, stored in self._stored_rows().items()}
            if PACKED_GEOMETRY in rows:  # which other ranks may have elsewhere
                rows[PACKED_GEOMETRY] = with_words(rows[PACKED_GEOMETRY], TIGHT_WORDS)
            return rows

    def append_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows [M] that `moving_rows` has returned after as many steps."""
        first, count = self.num_gaussians, len(next(iter(rows.values())))
        with self._changing("append_rows", torch.zeros(0, dtype=torch.int64)), ExitStack() as changes:
            for place in self._places():
                place.append_blank(count)
            for group in self._groups.values():
                changes.enter_context(group.store.changing(None))
            for key, stored in self._stored_rows().items():
                came = rows[key].to(stored.device)
                stored[first:] = with_words(came, stored.shape[1]) if key == PACKED_GEOMETRY else came

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some places have them only, since appending has failed."""
        with self._order.taking("change", "truncate"):
            self._pipeline.forget_upcoming()
            for place in self._places():
                place.truncate(num_gaussians)

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, unless they are left."""
        with self._changing("overwrite", ids):
            check_names(values)
            for place in self._places():
                place.overwrite(ids, values, leaves_moments=leaves_moments)

    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""
        with self._changing("relocate", torch.cat([source_ids, target_ids])):
            for place in self._places():
                place.relocate(source_ids, target_ids)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        with self._changing("keep", ids[:0]):
            if self._geometry.stores:  # so all places are where these are, and ids go there but once
                ids = ids.to(self._groups["appearance"].store.device)
            for place in self._places():
                place.keep(ids)

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        with self._order.taking("change", "clamp_opacities"):
            self._catch_geometry_up()
            self._geometry.clamp_opacities(max_logit)

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Count the bytes of host and device memory that appending this many Gaussians takes at its peak."""
        return peaks(total_growth(self._places(), num_new))

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Return all that training goes on from, as `offload.adam.state` describes it: views of the stores."""
        with self._order.taking("read", "state"):
            self._pipeline.finish()
            state = {"step_count": torch.tensor(self.steps_done), **self._geometry.state()}
            for name, group in self._groups.items():
                state.update(group.store.arrays_by_name())
                state[f"last_step/{name}"] = self._pipeline.last_step(name)
                state.update(named_tables(name, group.adam))
            appearance = self._groups["appearance"].store
            if appearance.layout.state == "compact":
                state["packed/sh_degree"] = torch.tensor(appearance.sh_degree)
            return {**state, **self._pipeline.state()}

    def copied_before_change(self) -> dict[str, RowStore]:
        """Name the tensors of `state` that change only after their store has been told; others may at any time."""
        copied = {key: group.store for group in self._groups.values() for key in group.store.arrays_by_name()}
        if self._pipeline.last_step_in_store:
            copied.update({f"last_step/{name}": group.store for name, group in self._groups.items()})
        return copied

    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        with self._order.taking("change", "load_state"):
            self._pipeline.forget_upcoming()
            self.steps_done, self._caught_up_at = int(state["step_count"]), None
            for name, group in self._groups.items():
                with group.store.changing(None):
                    load_deferred(group.store, name, group.adam, group.learning_rates, state)
                group.store.step = self.steps_done
            self._geometry.load_state(state)
            self._pipeline.load_state(state)

    def undo_step(self) -> None:
        """Forget the step that an error has ended.

        Raises:
            RuntimeError: It has been applied in part.
        """
        self._pipeline.undo_step(self.steps_done)
        counts = [self._geometry.steps_done, *(group.adam.step for group in self._groups.values())]
        if any(count != self.steps_done for count in counts):
            raise RuntimeError("the step had been applied in part")
        self._forget_harmonics()
        self._leaves, self._rows, self._displaced = {}, None, None
        self._geometry.expect_strays(None)
        self._order.undo()

    # --------------------------------------------------------------------------------------------------- figures

    def skipped_steps(self) -> tuple[int, int]:
        """Count the steps with a gradient that was not finite, and those of them that were the last in a row."""
        return self._finite.skipped_steps()

    def counters(self) -> Counters:
        """Return what the pipeline has counted so far; waits for what it counts on the device."""
        return self._pipeline.counters()

    # --------------------------------------------------------------------------------------------------- inside

    def _use(self, geometry: GeometryPlace, groups: Mapping[str, RowGroup], pipeline: Pipeline) -> None:
        """Hold rows in these, from now on."""
        self._geometry = geometry
        self._groups = groups
        self._pipeline = pipeline
        self._stored = pipeline if isinstance(pipeline, FetchesStored) else None
        self._reads_present = pipeline if isinstance(pipeline, ReadsPresent) else None

    def _forget_other_rows(self, cameras: Cameras) -> None:
        """Cull anew, where what is known of the next view is of a step that was undone and was on other cameras."""
        if self._order.knows_rows_of_other(cameras):
            self._pipeline.forget_upcoming()

    @contextmanager
    def _known_for_another_fetch(self, rows: FetchedRows) -> Iterator[None]:
        """Take rows as those of the present view; where what follows fails they are known for a repeated `fetch`."""
        self._ids = rows.ids
        try:
            yield
        except BaseException:
            self._leaves, self._rows, self._seen = {}, None, None
            self._pipeline.undo_step(self.steps_done)
            raise

    def _to_render(self, rows: FetchedRows) -> NamedRows:
        """Return rows as rendering takes them, those of geometry that does not travel as leaves."""
        self._rows = rows
        self._leaves = {name: value.requires_grad_() for name, value in self._geometry.gather(rows.ids).items()}
        named = NamedRows(self._leaves)
        for name, values in rows.values.items():
            layout = self._groups[name].store.layout
            if name == "geometry" and layout.state == "compact":
                named.take(layout, values, partial(self._read_present, name, rows.ids))
            else:
                named.update(layout.to_render(values))
        return named

    def _read_present(self, name: str, ids: Tensor) -> Tensor:
        """Return the values [V, columns] of a group's rows of a view, whose ids `fetch` has given.

        Raises:
            WrongOrder: The step on them has ended.
        """
        if self._rows is None or self._rows.ids is not ids:
            raise WrongOrder("parameters of rows were first asked for after the step on these rows had ended")
        if self._reads_present is None:
            return self._rows.values[name].detach()
        return self._reads_present.read_present(name)

    def _copies_to_render(self, ids: Tensor) -> dict[str, Tensor]:
        """Return copies of rows [V], whose ids are where geometry is, on the rendering device."""
        rows = self._geometry.gather(ids)
        for name, group in self._groups.items():
            rows.update(group.store.layout.to_render(self._pipeline.read(name, ids)))
        return {name: value.to(self._rendering_device) for name, value in rows.items()}

    def _update_travelled(self, made: HarmonicsGradient | None) -> None:
        if self._stored is None:
            self._pipeline.update()
        else:
            self._stored.update(made)

    def _keep_finite(self) -> None:
        if self._rows is not None:
            constant = [self._seen[1].sh0] if self._seen is not None and self._seen[1].others.has_constant else []
            self._finite.keep([*self._rows.values.values(), *self._leaves.values(), *constant])

    def _forget_harmonics(self) -> None:
        if self._seen is not None:
            self._seen[1].others.forget()
        self._seen = None

    def _geometry_gradients(self) -> dict[str, Tensor]:
        """Return the gradients [V, ...] of geometry that does not travel."""
        return {name: gradient_of(leaf) for name, leaf in self._leaves.items()}

    def _harmonics_gradient(self) -> HarmonicsGradient | None:
        """Return what that of the present view is made of, before its means move; None: a leaf has one."""
        if self._seen is None or self._rows is None:
            return None
        cameras, harmonics, means = self._seen
        has_constant, geometry = harmonics.others.has_constant, self._rows.values.get("geometry")
        if geometry is not None and means.untyped_storage().data_ptr() == geometry.untyped_storage().data_ptr():
            means = means.clone()  # of rows that the update writes to
        if has_constant or geometry is None:
            constant = gradient_of(harmonics.sh0)[:, 0]
        else:
            constant = gradient_of(geometry)[:, CONSTANT]
        return HarmonicsGradient(means, constant, position_of(cameras), harmonics.sh_degree, has_constant)

    @contextmanager
    def _changing(self, method: str, ids: Tensor) -> Iterator[None]:
        """Change rows [M], of which the current values are read, when they have been caught up."""
        with self._order.taking("change", method):
            ids = ids.unique()
            self._pipeline.forget_upcoming()
            for name in self._groups:
                self._pipeline.catch_up(name, ids)
            self._geometry.catch_up(ids)
            yield

    def _catch_geometry_up(self) -> None:
        """Bring all rows of geometry to the present step, once: what changes rows between steps leaves them there."""
        self._pipeline.forget_upcoming()
        if self._caught_up_at == self.steps_done:
            return
        for name in self._geometry.stores:
            self._pipeline.catch_up(name, None)
        self._geometry.catch_up(None)
        self._caught_up_at = self.steps_done

    def _stored_rows(self) -> dict[str, Tensor]:
        """Return the parameters and moments of all rows [N, ...] under the names of `state`; not copied."""
        arrays = (*ARRAYS, "packed")
        rows = {key: value for key, value in self._geometry.state().items() if key.partition("/")[0] in arrays}
        for group in self._groups.values():
            rows.update(group.store.arrays_by_name())
        return rows

    def _places(self) -> list[GeometryPlace | RowStore]:
        """Return geometry and the stores of all else."""
        others = [group.store for name, group in self._groups.items() if name not in self._geometry.stores]
        return [self._geometry, *others]


def geometry_in(
    place: Place,
    parameters: Mapping[str, Tensor],
    adam: AdamOptions,
    *,
    device: torch.device,
    max_gaussians: int,
    state: StateFormat = "float32",
    pad_to_cache_line: bool = False,
) -> GeometryPlace:
    """Put geometry into its place.

    Args:
        place: Which one.
        parameters: The six tensors of `training.gaussians.initial_gaussians`.
        adam: Learning rates, decay rates and epsilon.
        device: Where views are rendered.
        max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        state: The form of rows.
        pad_to_cache_line: As for `HostStore`, where it is on the host.
    """
    if place == "device":
        if state == "compact":
            return PackedGeometry(parameters, adam, device=device)
        return DeviceGeometry(parameters, adam, device=device)
    return HostGeometry(
        parameters,
        adam,
        state=state,
        max_gaussians=max_gaussians,
        pin=device.type == "cuda",
        pad_to_cache_line=pad_to_cache_line,
    )


def groups_beside(
    geometry: GeometryPlace,
    parameters: Mapping[str, Tensor],
    adam: AdamOptions,
    tables: Callable[[Tensor], Adam],
    *,
    device: torch.device,
    max_gaussians: int,
    moments: Moments = "float32",
    state: StateFormat = "float32",
) -> dict[str, RowGroup[Adam]]:
    """Make the groups of rows that travel: the appearance, and geometry where it is on the host.

    Args:
        geometry: In its place.
        parameters: The six tensors of `training.gaussians.initial_gaussians`.
        adam: Learning rates, decay rates and epsilon.
        tables: Makes what updates the rows of a group from its multipliers [schedules, columns].
        device: Where views are rendered.
        max_gaussians: Bound on the number of Gaussians; 0 allows what host memory could hold.
        moments: The precision in which Adam's moments of the appearance are kept, where the state is float32.
        state: The form of rows.
    """
    pin = device.type == "cuda"
    appearance = HostStore(parameters, "appearance", moments=moments, state=state, max_gaussians=max_gaussians, pin=pin)
    return row_groups(geometry, appearance, adam, tables)


def row_groups(
    geometry: GeometryPlace, appearance: RowStore, adam: AdamOptions, tables: Callable[[Tensor], Adam]
) -> dict[str, RowGroup[Adam]]:
    """Give each store of rows that travel, named by its group, the optimizer of its rows.

    Args:
        geometry: In its place.
        appearance: Rows of the group "appearance".
        adam: Learning rates, decay rates and epsilon.
        tables: Makes what updates the rows of a group from its multipliers [schedules, columns].
    """
    groups = {}
    for name, store in {**geometry.stores, "appearance": appearance}.items():
        multipliers, learning_rates = schedules_of(name, store.sh_degree, adam, store.layout.state)
        follow = geometry.follow if name == "geometry" and isinstance(geometry, CulledGeometry) else None
        groups[name] = RowGroup(store, tables(multipliers), learning_rates, follow)
    return groups
