"""What a store does in the same way wherever its rows are: it tells of changes, names columns, and overwrites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from offload.store.layout import RowLayout, RowState, StateFormat, storable


class StoredRows:
    """Rows of one group; `HostStore` and `DeviceStore` say where they are, and how many fit.

    The verbs are those of `offload.store.contract.RowStore`.
    """

    def __init__(self, group: str, parameters: Mapping[str, Tensor], state: StateFormat) -> None:
        """
        Args:
            group: Which of the parameters are held: "geometry" or "appearance".
            parameters: With shN [N, K - 1, 3], which says the degree of the spherical harmonics.
            state: The form of rows.
        """
        self.step = 0
        self.before_change: Callable[[Tensor | None], None] | None = None
        self.on_change: Callable[[Tensor | None], None] | None = None
        self.sh_degree = math.isqrt(parameters["shN"].shape[1] + 1) - 1
        self.layout = RowLayout.of(group, self.sh_degree, state)
        self._group = group

    @property
    def rows(self) -> RowState:
        """Return all rows, which may be written inside of `changing` only."""
        raise NotImplementedError

    @property
    def packed(self) -> Tensor:
        """Return all rows of a compact store as words, int32 [N, words]; written as `rows`."""
        raise NotImplementedError

    @property
    def last_step(self) -> Tensor:
        """Return the step of each row's last update, [N] int32; 0 before the first one."""
        raise NotImplementedError

    @contextmanager
    def changing(self, ids: Tensor | None) -> Iterator[RowState]:
        """Change rows, as `RowStore.changing`; it waits for the device where somebody listens to `before_change`.

        Args:
            ids: int64 [M] on any device, the rows; None: all of them.
        """
        if (listens := self.before_change) is not None:  # which another thread takes away when all has been copied
            listens(None if ids is None else ids.cpu())
        yield self.rows
        if self.on_change is not None:
            self.on_change(ids)

    def snapshot(self) -> dict[str, Tensor]:
        """Return the stored parameters by name: views of the rows."""
        return self.layout.named(self.rows.parameters)

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the stored values [N, ...] of one parameter, a view of the rows; or copies of those of rows [M]."""
        stored = self.snapshot()[name]
        return stored if ids is None else stored[ids.to(stored.device)]

    def arrays_by_name(self) -> dict[str, Tensor]:
        """Return views of what is stored, under the names of `offload.adam.state`."""
        if self.layout.state == "compact":
            return {f"packed/{self._group}": self.packed}
        rows = self.rows
        arrays = {"parameters": rows.parameters, "exp_avg": rows.exp_avg, "exp_avg_sq": rows.exp_avg_sq}
        return {
            f"{array}/{name}": view
            for array, values in arrays.items()
            for name, view in self.layout.named(values).items()
        }

    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, named or not, unless they are left.

        Names of parameters that the store does not hold are passed over.
        """
        ids = self._ids_here(ids)
        with self.changing(ids):
            for name, stored in self.snapshot().items():
                if name in values:
                    stored[ids] = storable(values[name], stored)
            if not leaves_moments:
                self._forget(ids)

    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        opacities = self.layout.columns["opacities"]
        with self.changing(None) as rows:
            rows.parameters[:, opacities].clamp_(max=max_logit)
            for moments in rows.moments:
                moments[:, opacities].zero_()

    def _ids_here(self, ids: Tensor) -> Tensor:
        """Return row numbers [M] as the verbs of this store take them."""
        raise NotImplementedError

    def _forget(self, ids: Tensor) -> None:
        """Leave rows [M] without moments, as if they had been updated at the last step."""
        for moments in self.rows.moments:
            moments.index_fill_(0, ids, 0)
        self.last_step.index_fill_(0, ids, self.step)
