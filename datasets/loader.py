"""Batches of decoded pictures, read ahead by threads.

Threads, not processes: decoding and remapping release the interpreter's lock, and a trainer that holds tens of
gigabytes of pinned memory must not be forked.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType

import numpy as np
import torch

from datasets.depths import Depths
from datasets.image_files import decode_picture, fitting_workers
from datasets.images import seen_pixels
from datasets.scene import Scene
from datasets.view_order import ViewWindows
from errors import InputError

WHOLE = slice(None)


@dataclass(frozen=True)
class Batch:
    """Hold C views, in main memory; or the pictures of C of them, and the cameras of all G."""

    images: torch.Tensor  # [C, H, W, 3] uint8
    masks: torch.Tensor | None  # [C, H, W] bool, false where a pixel has no source or is hidden; None: nowhere
    Ks: torch.Tensor  # [G, 3, 3] float32, pixels
    camtoworlds: torch.Tensor  # [G, 4, 4] float32, normalized world
    image_ids: torch.Tensor  # [G] int64, into the scene's images
    inverse_depths: torch.Tensor | None = None  # [C, H, W] float32, one over the depth, 0: unknown; None: not wanted


class BatchLoader:
    """Iterate over batches that a pool of threads prepares ahead; use it in a `with` block.

    At most twice as many batches as threads are held ready. A picture that cannot be decoded surfaces as InputError
    when its batch is asked for.
    """

    def __init__(
        self,
        scene: Scene,
        batches_of_ids: Iterator[np.ndarray],
        *,
        own: slice = WHOLE,
        num_workers: int | None = None,
        pin_memory: bool = False,
        depths: Depths | None = None,
    ):
        """
        Args:
            scene: where pictures and cameras come from.
            batches_of_ids: [G] indices of the images of each batch.
            own: which of a batch's pictures are loaded; the cameras of all are given.
            num_workers: threads; one per processor, at most 16, where None.
            pin_memory: give pinned tensors, for asynchronous copies to a CUDA device.
        """
        pixels = max((camera.source_width * camera.source_height for camera in scene.cameras), default=1)
        workers = fitting_workers(num_workers or min(os.cpu_count() or 1, 16), pixels)
        self._scene = scene
        self._batches_of_ids = batches_of_ids
        self._own = own
        self._pin_memory = pin_memory
        self._depths = depths
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="image-loader")
        self._pending: deque[Future[Batch]] = deque()
        for _ in range(2 * workers):
            self._submit_next()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft().result()
        self._submit_next()
        return batch

    def close(self) -> None:
        """Drop what is pending; waits only for pictures that are being decoded."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_next(self) -> None:
        ids = next(self._batches_of_ids, None)
        if ids is not None:
            work = self._pool.submit(_load_batch, self._scene, ids, self._own, self._pin_memory, self._depths)
            self._pending.append(work)


def training_loader(
    scene: Scene,
    train_ids: np.ndarray,
    *,
    batch_size: int = 1,
    seed: int = 0,
    view_window: int = 1,
    start_step: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """Make an endless stream of training batches in an order that the seed alone decides.

    Args:
        scene: where pictures and cameras come from.
        train_ids: [n] indices of the images to train on.
        batch_size: views in a batch of one process; together they are what one would draw of as many.
        seed: decides the order: one permutation of `train_ids` after another.
        view_window: so many consecutive images of a permutation are arranged so that neighbours see the same points;
            1 leaves them as drawn.
        start_step: batches to pass over, so that a resumed run goes on where it stopped.
        rank: which of the processes that train together this is; it loads its own pictures only.
        num_ranks: how many there are.
        num_workers: threads; one per processor, at most 16, where None.
        pin_memory: give pinned tensors, for asynchronous copies to a CUDA device.

    Raises:
        InputError: batch_size is below 1, or above 1 with pictures of different sizes.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1 (got {batch_size}).")
    if batch_size * num_ranks > 1:
        used = (scene.cameras[index] for index in np.unique(scene.camera_indices[train_ids]))
        sizes = sorted({(camera.width, camera.height) for camera in used})
        if len(sizes) > 1:
            several = f"batch_size={batch_size}" if num_ranks == 1 else f"Training with {num_ranks} processes"
            raise InputError(
                f"{several} needs pictures of one size, but {scene.data_dir} has "
                f"{len(sizes)} sizes (such as {sizes[0][0]}x{sizes[0][1]} and {sizes[-1][0]}x{sizes[-1][1]}): "
                f"use {'batch_size=1' if num_ranks == 1 else 'one process'}."
            )
    arrange = ViewWindows.of_scene(scene, view_window).arrange if view_window > 1 else None
    order = _training_order(train_ids, batch_size * num_ranks, seed, start_step, arrange)
    own = slice(rank * batch_size, (rank + 1) * batch_size)
    return BatchLoader(scene, order, own=own, num_workers=num_workers, pin_memory=pin_memory, depths=scene.depths)


def evaluation_loader(
    scene: Scene, image_ids: np.ndarray, *, num_workers: int | None = None, pin_memory: bool = False
) -> BatchLoader:
    """Make one pass over the given images in their order, one view in a batch."""
    order = (np.array([image_id]) for image_id in image_ids)
    return BatchLoader(scene, order, num_workers=num_workers, pin_memory=pin_memory)


def _training_order(
    train_ids: np.ndarray,
    batch_size: int,
    seed: int,
    start_step: int,
    arrange: Callable[[np.ndarray], np.ndarray] | None,
) -> Iterator[np.ndarray]:
    """Yield consecutive runs of `batch_size` out of one permutation after another; a batch may lie across two.

    Where `arrange` is given, each permutation [n] is drawn at random and then changed by it.
    """
    epoch, shuffled = -1, train_ids
    for position in count(start_step * batch_size, batch_size):
        batch = np.empty(batch_size, np.int64)
        for slot in range(batch_size):
            wanted_epoch, index = divmod(position + slot, len(train_ids))
            if wanted_epoch != epoch:  # seeded by epoch, so that any step can be the first
                epoch = wanted_epoch
                shuffled = np.random.default_rng([seed, epoch]).permutation(train_ids)
                shuffled = shuffled if arrange is None else arrange(shuffled)
            batch[slot] = shuffled[index]
        yield batch


def _load_batch(scene: Scene, image_ids: np.ndarray, own: slice, pin_memory: bool, depths: Depths | None) -> Batch:
    cameras = [scene.cameras[index] for index in scene.camera_indices[image_ids]]
    images, masks = [], []
    for image_id, camera in zip(image_ids[own], cameras[own], strict=True):
        size = camera.source_width, camera.source_height
        image, seen = decode_picture(scene.image_paths[image_id], size)
        images.append(camera.undistort(image))
        masks.append(seen_pixels(seen, scene.mask_paths[image_id], camera))
    batch = Batch(
        images=torch.from_numpy(np.stack(images)),
        masks=_stack_masks(masks, images),
        Ks=torch.from_numpy(np.stack([camera.K for camera in cameras])).float(),
        camtoworlds=torch.from_numpy(scene.camtoworlds[image_ids]).float(),
        image_ids=torch.from_numpy(image_ids),
    )
    if depths is not None:
        inverse = [
            depths.inverse(int(image_id), camera, scene.camtoworlds[image_id])
            for image_id, camera in zip(image_ids[own], cameras[own], strict=True)
        ]
        batch = replace(batch, inverse_depths=torch.from_numpy(np.stack(inverse)))
    if not pin_memory:
        return batch
    return replace(batch, **{name: t.pin_memory() for name, t in vars(batch).items() if t is not None})


def _stack_masks(masks: list[np.ndarray | None], images: list[np.ndarray]) -> torch.Tensor | None:
    if all(mask is None for mask in masks):
        return None
    whole = np.ones(images[0].shape[:2], bool)
    return torch.from_numpy(np.stack([whole if mask is None else mask for mask in masks]))
