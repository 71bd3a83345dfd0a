"""What a checkpoint is, the format of its file, and how it is read: checked by checksums, running no code in it.

`training/checkpoint_writing.py` writes it.

    16 bytes   MAGIC
    28 bytes   version uint32, place and length of the header uint64, CRC-32 of the header, CRC-32 of all before this
    ...        the tensors, one after the other, each from a multiple of 64 bytes on; little-endian
    ...        the header, JSON: steps, sequence, periodic, transform, options, photos and, of each tensor, its dtype,
               shape, place, rows per block and the CRC-32 of each block; a tensor of no bytes has no blocks;
               also_trained_on where there are such photos

Files of earlier versions lack the photos.

Where several processes train one model, each writes its Gaussians into a file of its own, a part, and the first then
a file without tensors, whose header names the parts with their sizes and the checksums of their headers: that is the
checkpoint, and appears when all its parts are on disk. The header of a part has, beside the above, its place among
the parts and the names of the tensors that have a row of each Gaussian; the others are the same in all parts.

Files of version 1, which hold the six parameters only, are torch's own archives; they can still be evaluated.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import DamagedError, InputError
from offload.adam.state import ARRAYS, check_state, current_values, format_of, num_gaussians_of, sh_degree_of
from offload.store.layout import GROUP_NAMES, packed_words
from training.gaussians import PARAMETER_NAMES
from training.joined_rows import joined_state

# Of tight rows; of other parts and what joins them 4, of another whole compact state 3, and else 2: each says so, that
# earlier versions of this suite read what they can.
FORMAT_VERSION = 5
MAGIC = b"3DGS checkpoint\n"
PROLOGUE = struct.Struct("<16sIQQI")  # magic, version, place of the header, its length, its CRC-32
PROLOGUE_BYTES = PROLOGUE.size + 4  # and the CRC-32 of those
ALIGNMENT = 64
DTYPES = {"float32": torch.float32, "float64": torch.float64, "int32": torch.int32, "int64": torch.int64}
DTYPES |= {"uint8": torch.uint8, "bool": torch.bool, "bfloat16": torch.bfloat16}
MAX_STEPS = 4_000_000  # tables of skipped steps grow with the steps
THREADS = min(os.cpu_count() or 1, 16)


@dataclass(frozen=True)
class Part:
    """Say which part of a checkpoint a file holds."""

    rank: int  # of the process that wrote it, from 0
    size: int  # how many parts there are
    of_rows: Sequence[str]  # names of the tensors that have a row of each Gaussian


@dataclass(frozen=True)
class Checkpoint:
    """Hold what a checkpoint file holds."""

    steps: int  # training steps done
    transform: np.ndarray  # [4, 4] similarity from the dataset's coordinates to the model's
    # As `offload.adam.state`, and more that a run needs to go on; read as views of the file, or of several.
    state: Mapping[str, Tensor]
    options: Mapping[str, object] = field(default_factory=dict)  # of the run
    sequence: int = 0  # larger than that of all checkpoints that lay in the folder before
    periodic: bool = False  # whether later ones may take its place
    # Of the dataset: positions in the model's world.
    photos: Mapping[str, Sequence[float]] = field(default_factory=dict)
    also_trained_on: Sequence[str] = ()  # photos that it was trained on before, and that options and photos do not say
    part: Part | None = None  # where it is not the whole model
    parts: Sequence[Checkpoint] = ()  # of which it is joined

    @property
    def gaussians(self) -> dict[str, Tensor]:
        """Return the six parameter tensors as `training.gaussians.initial_gaussians`, after the last step."""
        return current_values(self.state)

    @property
    def can_resume(self) -> bool:
        """Tell whether it holds what training goes on from, not the parameters alone."""
        return "step_count" in self.state


class _Block(NamedTuple):
    """Hold some rows of a tensor in a file, and the checksum that they should have."""

    file: Path
    content: memoryview
    crc32: int

    def is_right(self) -> bool:
        return zlib.crc32(self.content) == self.crc32


def load_checkpoint(path: Path, *, share: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Read a checkpoint and compare it with its checksums. Tensors are views of the file; of several, `JoinedRows`.

    Args:
        path: Of the file; of one in parts the one that names them.
        share: Number of this process, and how many read the same file and compare a share of its blocks each.

    Raises:
        InputError: There is no such file, it is damaged, or it was written by a newer version.
    """
    checkpoint, blocks = _open_checkpoint(path)
    number, count = share
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint") as threads:
        own = blocks[number::count]
        for block, is_right in zip(own, threads.map(_Block.is_right, own), strict=True):
            if not is_right:
                raise _damaged(path) if block.file == path else _damaged_part(path, block.file)
    try:
        for part in checkpoint.parts or [checkpoint]:
            check_state(part.state)
    except Exception as error:  # whatever the numbers of a stranger's file may lead to
        raise _damaged(path) from error
    return checkpoint


def peek_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without comparing its tensors with their checksums.

    Raises:
        InputError: As `load_checkpoint`, as far as it is seen.
    """
    return _open_checkpoint(path)[0]


def files_of_parts(path: Path) -> list[Path]:
    """Return the files that a checkpoint names as its parts, whether they are there or not; none where it is whole.

    Raises:
        InputError: The file is none of this suite's.
    """
    return [path.parent / entry["file"] for entry in _read_header(path)[0].get("parts", [])]


def _damaged(path: Path) -> DamagedError:
    return DamagedError(f"{path} is not a complete checkpoint of this suite: choose another.")


def _damaged_part(path: Path, file: Path) -> DamagedError:
    return DamagedError(
        f"{path} has a damaged part, {file.name}: copy that one again from where it was written, or choose another "
        "checkpoint."
    )


def _open_checkpoint(path: Path) -> tuple[Checkpoint, list[_Block]]:
    """Return a checkpoint, and all blocks of its tensors."""
    if not path.is_file():
        fault = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"Checkpoint {path} {fault}: give --ckpt a file such as ckpts/ckpt_30000.pt.")
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_version_1(path), []
        header, content, end, _ = _read_header(path)
        if "parts" in header:
            return _join(path, header)
        if "part" in header:
            raise InputError(
                f"{path} is one of the {_part_of(header).size} parts of a checkpoint: give the file that names them, "
                f"ckpt_{header['steps']}.pt beside it."
            )
        checkpoint, blocks = _parse(path, header, content, end)
        if num_gaussians_of(checkpoint.state) == 0:
            raise ValueError("no Gaussians")
        return checkpoint, blocks
    except (InputError, PermissionError):
        raise
    # What torch and the standard library raise for content that nobody has meant to write is beyond listing.
    except Exception as error:
        raise _damaged(path) from error


def _read_header(path: Path) -> tuple[dict[str, Any], mmap.mmap, int, int]:
    """Return the header of a file, the file's content, the place where its tensors end, and the header's checksum."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        prologue, (prologue_crc,) = content[: PROLOGUE.size], struct.unpack_from("<I", content, PROLOGUE.size)
        magic, version, header_place, header_length, header_crc = PROLOGUE.unpack(prologue)
        if magic != MAGIC or zlib.crc32(prologue) != prologue_crc:
            raise _damaged(path)
        if version > FORMAT_VERSION:
            raise _newer(path, version)
        header = content[header_place : header_place + header_length]
        if header_place + header_length != len(content) or zlib.crc32(header) != header_crc:
            raise _damaged(path)
        return json.loads(header), content, header_place, header_crc
    except (InputError, PermissionError):
        raise
    except Exception as error:  # as in `_open_checkpoint`
        raise _damaged(path) from error


def _join(path: Path, header: Mapping[str, Any]) -> tuple[Checkpoint, list[_Block]]:
    """Return the checkpoint whose header names its parts, and the blocks of all of them."""
    parts: list[Checkpoint] = []
    all_blocks: list[_Block] = []
    for rank, entry in enumerate(header["parts"]):
        file = path.parent / entry["file"]
        if file.parent != path.parent:
            raise ValueError(entry["file"])
        if not file.is_file():
            raise DamagedError(f"{path} lacks its part {file.name}: put it back beside it, or choose another.")
        try:
            part_header, content, end, crc = _read_header(file)
        except DamagedError as error:
            raise _damaged_part(path, file) from error
        is_of_it = crc == entry["crc32"] and len(content) == entry["bytes"]
        part = _part_of(part_header)
        if not is_of_it or (part.rank, part.size) != (rank, len(header["parts"])):
            raise DamagedError(f"{path} was written with another {file.name} than the one beside it: choose another.")
        checkpoint, blocks = _parse(file, part_header, content, end)
        parts.append(replace(checkpoint, part=part))
        all_blocks += blocks
    of_rows = parts[0].part.of_rows if parts[0].part else ()
    if any(part.steps != header["steps"] or not part.part or part.part.of_rows != of_rows for part in parts):
        raise ValueError("parts")
    state = joined_state([part.state for part in parts], of_rows)
    if num_gaussians_of(state) == 0:
        raise ValueError("no Gaussians")
    return replace(_checkpoint_of(header, state), parts=parts), all_blocks


def _part_of(header: Mapping[str, Any]) -> Part:
    part = header["part"]
    return Part(_count(part["rank"]), _count(part["size"]), [str(name) for name in part["of_rows"]])


def _newer(path: Path, version: object) -> InputError:
    return InputError(
        f"{path} was written by a newer version of this suite (format {version}, known: {FORMAT_VERSION}): "
        "update this one."
    )


def _parse(path: Path, header: Mapping[str, Any], content: mmap.mmap, end: int) -> tuple[Checkpoint, list[_Block]]:
    """Return the checkpoint in a file whose tensors lie before `end`; allocate nothing that it cannot hold."""
    state, blocks, view = {}, [], memoryview(content)
    for name, entry in header["tensors"].items():
        dtype, shape = DTYPES[entry["dtype"]], tuple(_count(size) for size in entry["shape"])
        num_values, place, block_rows = math.prod(shape), _count(entry["place"]), _count(entry["block_rows"])
        num_bytes = num_values * dtype.itemsize
        rows = shape[0] if shape else 1
        num_blocks = -(-rows // block_rows) if num_bytes else 0
        if len(shape) > 8 or place + num_bytes > end or num_blocks != len(entry["crc32"]):
            raise ValueError(name)
        if num_values:
            state[name] = torch.frombuffer(content, dtype=dtype, count=num_values, offset=place).view(shape)
        else:
            state[name] = torch.empty(shape, dtype=dtype)
        row_bytes = num_bytes // max(rows, 1)
        for index, crc in enumerate(entry["crc32"]):
            first = place + index * block_rows * row_bytes
            rows_of_block = view[first : min(first + block_rows * row_bytes, place + num_bytes)]
            blocks.append(_Block(path, rows_of_block, crc))
    counts = [tensor.item() for name, tensor in state.items() if name.rpartition("/")[2] == "step_count"]
    if any(count != header["steps"] for count in counts):
        raise ValueError("steps")
    checkpoint = _checkpoint_of(header, state)
    _check_gaussians(state, checkpoint.transform)
    return checkpoint, blocks


def _checkpoint_of(header: Mapping[str, Any], state: Mapping[str, Tensor]) -> Checkpoint:
    """Return a checkpoint with a state, and what a header says beside its tensors."""
    steps = _count(header["steps"])
    if steps > MAX_STEPS:
        raise ValueError("steps")
    photos = {str(name): [float(x) for x in position] for name, position in header.get("photos", {}).items()}
    if any(len(position) != 3 or not np.isfinite(position).all() for position in photos.values()):
        raise ValueError("photos")
    return Checkpoint(
        steps,
        np.array(header["transform"], np.float64),
        state,
        options=dict(header["options"]),
        sequence=_count(header["sequence"]),
        periodic=header["periodic"] is True,
        photos=photos,
        also_trained_on=[str(name) for name in header.get("also_trained_on", [])],
    )


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _check_gaussians(state: Mapping[str, Tensor], transform: np.ndarray) -> None:
    """Raise ValueError or KeyError unless all that belongs to Gaussians has their shapes."""
    if format_of(state) == "compact":
        degree = sh_degree_of(state)
        for group in GROUP_NAMES:
            rows = state[f"packed/{group}"]
            words = [packed_words(group, degree, tight=tight) for tight in (False, True)]
            if rows.ndim != 2 or len(rows) != num_gaussians_of(state) or rows.shape[1] not in words:
                raise ValueError(group)
            if rows.dtype != torch.int32:
                raise ValueError(group)
        if degree not in range(4) or transform.shape != (4, 4):
            raise ValueError("degree")
        return
    num_gaussians, num_rest = state["parameters/shN"].shape[:2]
    rest = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (num_rest, 3)}
    arrays = ARRAYS if "step_count" in state else ARRAYS[:1]
    for name, shape in rest.items():
        for array in arrays:
            tensor = state[f"{array}/{name}"]
            dtypes = (torch.float32,) if array == "parameters" else (torch.float32, torch.bfloat16)
            if tensor.shape != (num_gaussians, *shape) or tensor.dtype not in dtypes:
                raise ValueError(name)
    if num_rest not in (0, 3, 8, 15) or transform.shape != (4, 4):
        raise ValueError("degree")


def _read_version_1(path: Path) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if content["version"] != 1:
        raise _newer(path, content["version"])
    state = {f"parameters/{name}": content["splats"][name] for name in PARAMETER_NAMES}
    transform = content["transform"].numpy()
    _check_gaussians(state, transform)
    if num_gaussians_of(state) == 0:
        raise ValueError("no Gaussians")
    return Checkpoint(_count(content["step"]), transform, state)
