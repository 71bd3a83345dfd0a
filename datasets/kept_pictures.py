"""Decoded pictures in host memory that nobody else needs, so that each is decoded once."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets.free_memory import leaves_enough
from datasets.scene import Scene
from errors import counted, format_bytes

if TYPE_CHECKING:
    from datasets.loader import Batch

ALIGNED = 64  # bytes, at whose multiples tensors begin
CAMERA_BYTES = 4 * ALIGNED  # of a view's camera and number, at most


class KeptPictures:
    """Keep batches of one view, up to a number of bytes: those that came first, for good.

    An order by permutations comes to each as often, so nothing is won by replacing one by another. Whoever gets a
    batch reads it only.
    """

    def __init__(self, most_bytes: int, *, pin_memory: bool = False) -> None:
        """
        Args:
            most_bytes: Of all of them together, in whole pages.
            pin_memory: Whether they are pinned.
        """
        self.nbytes = 0
        self._most_bytes = most_bytes
        self._pin_memory = pin_memory
        self._batches: dict[int, Batch] = {}  # by image
        self._lock = Lock()  # of whoever changes them

    def get(self, image_id: int) -> Batch | None:
        """Return the batch of an image; None where it is not kept."""
        return self._batches.get(image_id)

    def keep(self, image_id: int, batch: Batch) -> Batch:
        """Return the batch of an image as it is kept, or the one that is given, where there is no room for it."""
        tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
        num_bytes = _whole_pages(sum(_aligned(tensor.nbytes) for tensor in tensors.values()))
        with self._lock:
            if image_id in self._batches:  # which another thread has decoded at the same time
                return self._batches[image_id]
            held = self.nbytes + num_bytes
            if held > self._most_bytes or not leaves_enough(held):
                return batch
            try:
                memory = _Memory.anonymous(num_bytes, pinned=self._pin_memory)
            except OSError:  # no more is mapped, or pinned
                self._most_bytes = self.nbytes
                return batch
            self._batches[image_id] = replace(batch, **_copied(tensors, memory))
            self.nbytes = held
            return self._batches[image_id]

    def give_up(self) -> None:
        """Keep none any more; a picture's memory is given back when the last that uses it is done."""
        with self._lock:
            self._batches.clear()
            self.nbytes = self._most_bytes = 0


def what_is_kept(scene: Scene, most_bytes: int) -> str:
    """Say how many bytes decoded pictures of training take of those that they may; nothing where none fits."""
    all_bytes = [
        _picture_bytes(scene, image_id, camera_id)
        for image_id, camera_id in zip(scene.train_ids, scene.camera_indices[scene.train_ids], strict=True)
    ]
    if min(all_bytes) > most_bytes:
        return ""
    total, photos = sum(all_bytes), counted(len(all_bytes), "training photo")
    amount = format_bytes(min(most_bytes, total))
    of = f"about {amount} for" if total <= most_bytes else f"up to {amount}, of {format_bytes(total)} for"
    return f"Decoded photos are kept in this machine's memory while it is not needed otherwise: {of} {photos}."


def _picture_bytes(scene: Scene, image_id: int, camera_id: int) -> int:
    """Return the bytes of a kept picture, as far as they are known before it is decoded: transparency makes a mask."""
    camera = scene.cameras[camera_id]
    is_masked = scene.mask_paths[image_id] is not None or camera.fisheye
    bytes_per_pixel = 3 + is_masked + (0 if scene.depths is None else 4)
    return _whole_pages(camera.width * camera.height * bytes_per_pixel + CAMERA_BYTES)


def _copied(tensors: dict[str, torch.Tensor], memory: _Memory) -> dict[str, torch.Tensor]:
    """Copy tensors into some memory, one behind the other."""
    copies, begin = {}, 0
    for name, tensor in tensors.items():
        copy = np.frombuffer(memory, np.uint8, tensor.nbytes, begin).view(tensor.numpy().dtype).reshape(tensor.shape)
        np.copyto(copy, tensor.numpy())  # in this thread alone, where torch would wake others for it
        copies[name] = torch.from_numpy(copy)
        begin += _aligned(tensor.nbytes)
    return copies


class _Memory(mmap.mmap):
    """Anonymous memory, which the last tensor in it to go unpins and gives back to the system.

    That of torch's allocator would be rounded up to a power of two if it is pinned, and would stay in the process.
    """

    _address = 0  # where it is pinned
    _device = 0  # that was current then, which copies it

    @classmethod
    def anonymous(cls, num_bytes: int, *, pinned: bool) -> _Memory:
        """Map so many bytes.

        Raises:
            OSError: They cannot be had.
        """
        memory = cls(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if pinned:
            address = np.frombuffer(memory, np.uint8).ctypes.data
            status = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
            if status != 0:
                raise OSError(f"CUDA cannot pin {num_bytes} bytes (error {status})")
            memory._address, memory._device = address, torch.cuda.current_device()
        return memory

    def __del__(self) -> None:
        if self._address and not sys.is_finalizing():
            torch.cuda.synchronize(self._device)  # copies that nobody has waited for may be reading it
            torch.cuda.cudart().cudaHostUnregister(self._address)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED) * ALIGNED


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
