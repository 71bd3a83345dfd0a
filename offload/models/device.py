"""The Gaussians of GPU-only training: parameters and Adam moments of all of them on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from offload.adam.finite import FiniteGradients
from offload.adam.options import AdamOptions
from offload.adam.state import ARRAYS, State, copy_current
from offload.culling.cameras import Cameras
from offload.models.contract import StepOrder, check_names, check_rows
from offload.pipelines.contract import Counters, Displacement
from offload.store.contract import RowStore
from offload.store.host_store import check_relocation
from offload.store.kept_rows import kept_rows

BYTES_PER_GAUSSIAN = 59 * 4 * 4  # parameters, gradients and two Adam moments in float32


class DeviceGaussians:
    """All parameters as leaf tensors on one device, updated by one fused Adam.

    The verbs, and the order in which they may be called, are those of `offload.models.contract.GaussianModel`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], adam: AdamOptions, *, device: torch.device) -> None:
        """
        Args:
            parameters: The six tensors of `initial_gaussians`.
            adam: Learning rates, decay rates and epsilon.
            device: Where everything lives.
        """
        self.parameters = {
            name: value.detach().to(device, torch.float32, copy=True).requires_grad_()
            for name, value in parameters.items()
        }
        self.optimizer = torch.optim.Adam(
            [
                {"params": [parameter], "lr": adam.learning_rates[name], "name": name}
                for name, parameter in self.parameters.items()
            ],
            betas=adam.betas,
            eps=adam.eps,
            fused=True,
        )
        self.steps_done = 0
        self._means_lr = adam.means_lr
        self._finite = FiniteGradients(device)
        self._order = StepOrder()
        self._displaced: Displacement | None = None  # with the present step

    @property
    def num_gaussians(self) -> int:
        return len(self.parameters["means"])

    @property
    def device(self) -> torch.device:
        return self.parameters["means"].device

    # ------------------------------------------------------------------------------------------- a training step

    def fetch(self, cameras: Cameras, sh_degree: int | None = None) -> dict[str, Tensor]:
        """Return all parameters for `training.gaussians.activate`: they are on the device, whatever cameras see."""
        with self._order.taking("fetch", cameras=cameras):
            return self.parameters

    @property
    def ids(self) -> Tensor:
        """Return which Gaussians `fetch` gives: all, int64 [N] on the device, made anew each time."""
        self._order.check_ids()
        return torch.arange(self.num_gaussians, device=self.device)

    def prefetch(self, cameras: Cameras, strays: Tensor | None = None) -> None:
        """Do nothing: what the next view needs is on the device."""
        with self._order.taking("prefetch", cameras=cameras):
            pass

    def displace(self, rows: Tensor, offsets: Tensor) -> None:
        """Move the means of these rows [D] by offsets [D, 3], with the update."""
        with self._order.taking("displace"):
            self._displaced = Displacement(rows, offsets)

    def update(self, drawn: Tensor | None = None) -> None:
        """Take one step of Adam on the gradients of what `fetch` gave.

        Args:
            drawn: [V] int64, rows outside which all gradients are zero; rows may repeat. None: all rows. It spares
                looking at the others.
        """
        with self._order.taking("update"):
            self._finite.keep(self.parameters.values(), drawn)
            for group in self.optimizer.param_groups:
                if group["name"] == "means":
                    group["lr"] = self._means_lr(self.steps_done)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self._displaced is not None:
                self._displaced.add_to(self.parameters["means"].detach())
                self._displaced = None
            self.steps_done += 1

    # ----------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Return everything that training goes on from, as `offload.adam.state` describes it; not copied."""
        with self._order.taking("read", "state"):
            return self._state()

    def _state(self) -> dict[str, Tensor]:
        state = {"step_count": torch.tensor(self.steps_done)}
        for name, parameter in self.parameters.items():
            moments = self._moments(parameter) or dict.fromkeys(ARRAYS[1:], torch.zeros_like(parameter))
            state.update({f"parameters/{name}": parameter.detach()})
            state.update({f"{moment}/{name}": value.detach() for moment, value in moments.items()})
        return state

    def copied_before_change(self) -> dict[str, RowStore]:
        """Name no tensors of `state`: every step changes all rows."""
        return {}

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Go on from a state of as many Gaussians as there are here, whichever trainer has left it."""
        with self._order.taking("change", "load_state"):
            self.steps_done = int(state["step_count"])
            for parameter in self.parameters.values():
                step = torch.tensor(float(self.steps_done), device=parameter.device)
                moments = {moment: torch.empty_like(parameter) for moment in ARRAYS[1:]}
                self.optimizer.state[parameter] = {"step": step, **moments}
            copy_current({key: value for key, value in self._state().items() if key != "step_count"}, state)

    def undo_step(self) -> None:
        """Forget the gradients of the step that an error has ended.

        Raises:
            RuntimeError: They have been applied.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._displaced = None
        counts = (state["step"].item() for state in self.optimizer.state.values())
        if any(count != self.steps_done for count in counts):
            raise RuntimeError("the step had been applied in part")
        self._order.undo()

    # --------------------------------------------------------------------------------------------------- figures

    def skipped_steps(self) -> tuple[int, int]:
        """Count the steps with a gradient that was not finite, and those of them that were the last in a row."""
        return self._finite.skipped_steps()

    def counters(self) -> Counters:
        """Return nothing: nothing travels."""
        return Counters()

    # --------------------------------------------------------------------------------------------------- reading

    def read_view(self, cameras: Cameras) -> dict[str, Tensor]:
        """Return all parameters, detached, as from `fetch`; training is not disturbed."""
        with self._order.taking("read", "read_view"):
            return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return the current values of these rows of the six parameter tensors, detached; not copied."""
        with self._order.taking("read", "rows"):
            check_rows(first, last, self.num_gaussians)
            return {name: parameter.detach()[first:last] for name, parameter in self.parameters.items()}

    # --------------------------------------------------------------------------------------------- densification

    def read(self, name: str, ids: Tensor | None = None) -> Tensor:
        """Return the current values of one geometry parameter, not copied, or those of rows [M]; detached."""
        with self._order.taking("change", "read"):
            values = self.parameters[name].detach()
            return values if ids is None else values[ids]

    def append_copies(self, ids: Tensor) -> None:
        """Append a copy of each of these rows [M]; the copies start without Adam moments."""
        with self._order.taking("change", "append_copies"):
            self._replace_rows(
                lambda value: torch.cat([value, value[ids]]),
                lambda moment: torch.cat([moment, moment.new_zeros(len(ids), *moment.shape[1:])]),
            )

    def moving_rows(self, ids: Tensor) -> dict[str, Tensor]:
        """Return copies of rows [M] with their moments, named as in `state`; for `append_rows`."""
        with self._order.taking("change", "moving_rows"):
            return {key: value[ids] for key, value in self._state().items() if key != "step_count"}

    def append_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows [M] that `moving_rows` has returned."""
        with self._order.taking("change", "append_rows"):
            first, count = self.num_gaussians, len(rows["parameters/means"])

            def grown(value: Tensor) -> Tensor:
                return torch.cat([value, value.new_zeros(count, *value.shape[1:])])

            self._replace_rows(grown, grown)
            for key, stored in self._state().items():
                if key != "step_count":
                    stored[first:] = rows[key].to(self.device)

    def truncate(self, num_gaussians: int) -> None:
        """Keep only the first rows, also where some tensors have them only, since appending has failed."""
        with self._order.taking("change", "truncate"):
            self._replace_rows(lambda value: value[:num_gaussians], lambda moment: moment[:num_gaussians])

    @torch.no_grad()
    def overwrite(self, ids: Tensor, values: Mapping[str, Tensor], *, leaves_moments: bool = False) -> None:
        """Give these rows [M] new values; all their moments become zero, named or not, unless they are left."""
        with self._order.taking("change", "overwrite"):
            check_names(values)
            self._overwrite(ids, values, leaves_moments)

    @torch.no_grad()
    def relocate(self, source_ids: Tensor, target_ids: Tensor) -> None:
        """Copy rows [M] onto other rows [M], whose moments become zero. No row is a source and a target."""
        with self._order.taking("change", "relocate"):
            check_relocation(source_ids, target_ids)
            self._overwrite(target_ids, {name: value[source_ids] for name, value in self.parameters.items()}, False)

    def keep(self, ids: Tensor) -> None:
        """Keep only these rows [M], in this order."""
        with self._order.taking("change", "keep"):
            self._replace_rows(lambda value: kept_rows(value, ids), lambda moment: kept_rows(moment, ids))

    @torch.no_grad()
    def clamp_opacities(self, max_logit: float) -> None:
        """Lower every logit opacity to at most this, and forget the moments of all opacities."""
        with self._order.taking("change", "clamp_opacities"):
            parameter = self.parameters["opacities"]
            parameter.clamp_(max=max_logit)
            for moment in self._moments(parameter).values():
                moment.zero_()

    def growth_bytes(self, num_new: int) -> dict[torch.device, int]:
        """Count the bytes of memory that appending this many Gaussians takes at its peak.

        Tensors are replaced one at a time, so beside the growth the largest one stands twice.
        """
        largest = max(parameter.numel() * 4 for parameter in self.parameters.values())
        return {self.device: num_new * BYTES_PER_GAUSSIAN + largest}

    # --------------------------------------------------------------------------------------------------- inside

    def _overwrite(self, ids: Tensor, values: Mapping[str, Tensor], leaves_moments: bool) -> None:
        for name, parameter in self.parameters.items():
            if name in values:
                parameter[ids] = values[name]
            if not leaves_moments:
                for moment in self._moments(parameter).values():
                    moment[ids] = 0

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if key != "step"}

    @torch.no_grad()
    def _replace_rows(self, of_parameter: Callable[[Tensor], Tensor], of_moment: Callable[[Tensor], Tensor]) -> None:
        """Change one tensor after the other, so that only one stands twice; an error leaves none without rows."""
        for group in self.optimizer.param_groups:
            old = self.parameters[group["name"]]
            new = of_parameter(old.detach()).requires_grad_()
            state = self.optimizer.state.pop(old, {})
            if state:
                self.optimizer.state[new] = state
            self.parameters[group["name"]] = new
            group["params"] = [new]
            del old
            for key in state.keys() - {"step"}:
                state[key] = of_moment(state[key])
