"""Batches of decoded pictures, read ahead by threads.

Threads, not processes: decoding and remapping release the interpreter's lock, and a trainer that holds tens of
gigabytes of pinned memory must not be forked. What they do with the lock held delays the thread that launches the
GPU's work, which is the time that a step of a small scene takes: so pictures are kept where there is memory for them
(`kept_pictures.py`), and a batch of one that is kept is no work at all.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import TracebackType

import numpy as np
import torch

from datasets.depths import Depths
from datasets.free_memory import spares
from datasets.image_files import decode_picture, fitting_workers
from datasets.kept_pictures import KeptPictures
from datasets.masks import seen_pixels
from datasets.scene import Scene
from datasets.view_order import ViewWindows
from errors import InputError

WHOLE = slice(None)


@dataclass(frozen=True)
class Batch:
    """Hold C views, in main memory; or the pictures of C of them, and the cameras of all G.

    Its tensors are read only: the loader may hold them, and give them out again.
    """

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
        keep_bytes: int = 0,
    ):
        """
        Args:
            scene: where pictures and cameras come from.
            batches_of_ids: [G] indices of the images of each batch.
            own: which of a batch's pictures are loaded; the cameras of all are given.
            num_workers: threads; one per processor, at most 16, where None.
            pin_memory: give pinned tensors, for asynchronous copies to a CUDA device.
            depths: where inverse depths come from; None: they are not wanted.
            keep_bytes: of host memory that decoded pictures may take, so that they are not decoded again.
        """
        pixels = max((camera.source_width * camera.source_height for camera in scene.cameras), default=1)
        workers = fitting_workers(num_workers or min(os.cpu_count() or 1, 16), pixels)
        self._scene = scene
        self._batches_of_ids = batches_of_ids
        self._own = own
        self._pin_memory = pin_memory
        self._depths = depths
        self._kept = KeptPictures(keep_bytes, pin_memory=pin_memory)
        spares(self)
        # Each thread begins on the first GPU, where it would make a context to pin memory in.
        initializer = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        self._pool = ThreadPoolExecutor(workers, "image-loader", initializer)
        self._pending: deque[tuple[np.ndarray, Batch | Future[Batch]]] = deque()  # with their ids, in their order
        for _ in range(2 * workers):
            self._submit_next()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            raise StopIteration
        _, begun = self._pending.popleft()
        batch = begun.result() if isinstance(begun, Future) else begun
        self._submit_next()
        return batch

    @property
    def spared_bytes(self) -> int:
        """Count the bytes of pictures that are kept."""
        return self._kept.nbytes

    def give_up(self) -> None:
        """Keep no pictures any more, since others need the memory; the batches stay those that they are."""
        self._kept.give_up()
        wait([begun for _, begun in self._pending if isinstance(begun, Future) and not begun.cancel()])
        self._pending = deque((ids, self._begin(ids)) for ids, _ in self._pending)

    def close(self) -> None:
        """Drop what is pending and kept; waits only for pictures that are being decoded."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._kept.give_up()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_next(self) -> None:
        ids = next(self._batches_of_ids, None)
        if ids is not None:
            self._pending.append((ids, self._begin(ids)))

    def _begin(self, ids: np.ndarray) -> Batch | Future[Batch]:
        """Return the batch of images [G] where it is kept; else let a thread make it."""
        kept = self._kept.get(int(ids[0])) if len(ids) == 1 else None
        return self._pool.submit(self._load, ids) if kept is None else kept

    def _load(self, ids: np.ndarray) -> Batch:
        views = [self._view(image_id) for image_id in ids[self._own].tolist()]
        batch = views[0] if len(ids) == 1 else _together(views, self._scene, ids)
        if not self._pin_memory:
            return batch
        return replace(batch, **{name: t.pin_memory() for name, t in vars(batch).items() if t is not None})

    def _view(self, image_id: int) -> Batch:
        """Return the batch of one image, kept or decoded."""
        kept = self._kept.get(image_id)
        return self._kept.keep(image_id, _decode(self._scene, image_id, self._depths)) if kept is None else kept


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
    keep_bytes: int = 0,
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
        keep_bytes: of host memory that decoded pictures may take, so that they are not decoded again.

    Raises:
        InputError: batch_size is below 1, or above 1 with pictures of different sizes.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size is {batch_size}: give at least 1.")
    if batch_size * num_ranks > 1:
        used = (scene.cameras[index] for index in np.unique(scene.camera_indices[train_ids]))
        sizes = sorted({(camera.width, camera.height) for camera in used})
        if len(sizes) > 1:
            several = f"--batch_size {batch_size}" if num_ranks == 1 else f"Training with {num_ranks} processes"
            raise InputError(
                f"{several} needs pictures of one size, but {scene.data_dir} has "
                f"{len(sizes)} sizes (such as {sizes[0][0]}x{sizes[0][1]} and {sizes[-1][0]}x{sizes[-1][1]}): "
                f"use {'--batch_size 1' if num_ranks == 1 else 'one process'}."
            )
    arrange = ViewWindows.of_scene(scene, view_window).arrange if view_window > 1 else None
    order = _training_order(train_ids, batch_size * num_ranks, seed, start_step, arrange)
    own = slice(rank * batch_size, (rank + 1) * batch_size)
    return BatchLoader(
        scene,
        order,
        own=own,
        num_workers=num_workers,
        pin_memory=pin_memory,
        depths=scene.depths,
        keep_bytes=keep_bytes,
    )


def evaluation_loader(scene: Scene, image_ids: np.ndarray, *, num_workers: int | None = None) -> BatchLoader:
    """Make one pass over the given images in their order, one view in a batch."""
    order = (np.array([image_id]) for image_id in image_ids)
    return BatchLoader(scene, order, num_workers=num_workers)


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


def _decode(scene: Scene, image_id: int, depths: Depths | None) -> Batch:
    """Return the batch of one image."""
    camera = scene.cameras[scene.camera_indices[image_id]]
    image, seen = decode_picture(scene.image_paths[image_id], (camera.source_width, camera.source_height))
    mask = seen_pixels(seen, scene.mask_paths[image_id], camera)
    inverse = None if depths is None else depths.inverse(image_id, camera, scene.camtoworlds[image_id])
    return Batch(
        images=torch.from_numpy(np.array(camera.undistort(image)[None])),
        masks=None if mask is None else torch.from_numpy(np.array(mask[None])),
        inverse_depths=None if inverse is None else torch.from_numpy(inverse[None]),
        **_cameras(scene, np.array([image_id])),
    )


def _together(views: list[Batch], scene: Scene, ids: np.ndarray) -> Batch:
    """Return the batch of images [G], of which views [C] have the pictures; the tensors of one view are not copied."""
    masks = None
    if any(view.masks is not None for view in views):
        whole = torch.ones(views[0].images.shape[:3], dtype=torch.bool)
        masks = _joined([whole if view.masks is None else view.masks for view in views])
    inverse = [view.inverse_depths for view in views if view.inverse_depths is not None]  # of all views, or of none
    return Batch(
        images=_joined([view.images for view in views]),
        masks=masks,
        inverse_depths=_joined(inverse) if inverse else None,
        **_cameras(scene, ids),
    )


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    # In this thread alone, where torch would wake others for it.
    return tensors[0] if len(tensors) == 1 else torch.from_numpy(np.concatenate([t.numpy() for t in tensors]))


def _cameras(scene: Scene, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Return what a batch holds of the cameras of images [G], by its names."""
    Ks = np.stack([scene.cameras[index].K for index in scene.camera_indices[ids]])
    return dict(
        Ks=torch.from_numpy(Ks).float(),
        camtoworlds=torch.from_numpy(scene.camtoworlds[ids]).float(),
        image_ids=torch.from_numpy(ids),
    )
