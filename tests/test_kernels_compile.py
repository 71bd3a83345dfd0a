"""Every kernel in Triton compiles for a GPU, for the arguments that tests launch it with; no GPU is needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from tests import (
    test_bounds,
    test_culling,
    test_deferral_tables,
    test_device_geometry,
    test_gradients,
    test_harmonics_gradient,
    test_losses,
    test_named_rows,
    test_overlap,
    test_pairs,
    test_row_kernels,
    test_spherical_harmonics_triton,
    test_split_planning,
    test_stored_harmonics,
)
from tests.compiled_kernels import compiled_as_launched
from tests.triton_places import INTERPRETED

ROOT = Path(__file__).parent.parent
HERE = ("triton", "cpu")

pytestmark = [pytest.mark.skipif(not INTERPRETED, reason="a GPU has them compiled by other tests"), pytest.mark.slow]


def kernels_of(*rooms: str) -> set[str]:
    """The kernels in these folders that no other one calls."""
    texts = [path.read_text() for room in rooms for path in (ROOT / room).rglob("*_triton.py")]
    kernels = {name for text in texts for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+)\(", text)}
    called = {name for text in texts for name in re.findall(r"(?<!def )\b(\w+)\(", text)}
    return kernels - called - {"_of_tuple", "_of_tensor"}  # which others call as `number`


def test_kernels_are_written_as_the_oldest_triton_understands():
    """That of torch 2.6, 3.2, refuses calls with `*values`, which the newer ones that compile them here take."""
    files = [path for room in ("distributed", "offload", "rendering") for path in (ROOT / room).rglob("*_triton.py")]
    assert files
    for path in files:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in function.decorator_list
            ):
                starred = [node for node in ast.walk(function) if isinstance(node, ast.Starred)]
                assert not starred, f"{path.name}:{starred[0].lineno}"


def launch_row_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in test_row_kernels.APART:
        test_row_kernels.test_triton_equals_torch(*HERE, "appearance", 79, form)
        for gradient in (True, False):
            test_row_kernels.test_a_step_on_the_host_is_that_of_rows_that_come_and_go(*HERE, "geometry", form, gradient)
    for group, degree in test_row_kernels.PACKED[:2]:
        for gradient in (True, False):
            test_row_kernels.test_triton_equals_torch_for_packed_rows(*HERE, group, degree, 79, gradient)
        groups = test_row_kernels.PACKED[:2]
        test_row_kernels.test_packed_rows_are_copied_as_they_are(*HERE, groups, degree == 3, 256)
    test_row_kernels.test_tight_rows_are_read_and_stepped_as_others(*HERE, 79)
    test_harmonics_gradient.test_rows_take_the_step_of_the_gradient_itself(*HERE, 3, 3, 79)
    monkeypatch.setattr("offload.backends._takes_triton", lambda device: True)
    for case in test_named_rows.CASES:
        test_named_rows.test_values_and_gradients_are_those_of_each_operation(*HERE, 1, *case)
    test_named_rows.test_parts_are_joined(*HERE, 1)
    for form in ("compact, in order", "compact", "float32", "float32, values"):
        test_stored_harmonics.test_colors_and_gradients_are_those_of_the_values(*HERE, 3, 3, form)
    test_stored_harmonics.test_a_step_without_values_is_the_step_on_those_that_are_fetched(*HERE, 3)
    test_stored_harmonics.test_a_step_of_geometry_without_values_is_the_step_on_those_that_are_fetched(*HERE)
    test_stored_harmonics.test_a_step_of_float32_without_values_is_that_on_the_gradient_itself(*HERE, 3)
    test_gradients.test_all_are_cleared_unless_all_are_finite(*HERE, True, 1.0)
    with monkeypatch.context() as for_tables:
        test_deferral_tables.test_a_step_that_is_undone_leaves_no_trace(*HERE, 3, for_tables)
        test_deferral_tables.test_steps_that_begin_together_are_those_that_begin_alone(*HERE, (2, 1), 0, for_tables)
    test_device_geometry.test_what_is_read_equals_dense_adam_in_float64(*HERE)
    test_device_geometry.test_what_is_settled_equals_dense_adam_in_float64(*HERE)


def launch_culling(monkeypatch: pytest.MonkeyPatch) -> None:
    test_bounds.test_kernels_find_what_torch_finds("cpu")
    test_bounds.test_kernels_follow_rows_as_torch_does("cpu")
    test_overlap.test_each_row_is_found_where_it_is(*HERE)
    rows = test_culling.random_geometry(100, seed=1)
    for antialiased in (False, True):
        cameras = test_culling.random_cameras(2, antialiased=antialiased)
        test_culling.with_triton(rows, cameras)
        test_split_planning.with_triton(rows, torch.arange(100), cameras, test_split_planning.NO_MARGIN)


def launch_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    for degree in (0, 3):
        for num_cameras in (1, 2):
            test_spherical_harmonics_triton.test_colors_and_gradients_equal_the_native_ones(num_cameras, degree, 2)
    test_losses.test_interpreted_triton_kernels_equal_torch()


def launch_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    test_pairs.test_columns_come_as_they_went(*HERE, is_ordered=True)
    test_pairs.test_columns_come_as_they_went(*HERE, is_ordered=False)
    test_pairs.test_gradients_are_divided_and_marked(*HERE, 0.0)


LAUNCHES = {
    launch_row_kernels: ("offload/adam", "offload/models"),
    launch_culling: ("offload/culling", "offload/pipelines"),
    launch_rendering: ("rendering",),
    launch_exchange: ("distributed",),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_kernels_compile(launch, monkeypatch):
    with compiled_as_launched() as names:
        launch(monkeypatch)
    assert names >= kernels_of(*LAUNCHES[launch])  # none is forgotten


def test_what_the_compiler_refuses_is_noticed():
    """A number that is a constant to the interpreter, and once it has a name no longer one to the compiler."""
    from tests.refused_kernel import double

    with pytest.raises(AssertionError, match="double does not compile"), compiled_as_launched():
        double[(1,)](torch.ones(8), (1.0, 2.0), BLOCK=8)
