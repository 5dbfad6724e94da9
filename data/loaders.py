"""TrainData and ValData: what the training program iterates, on top of FFCV's Loader.

FFCV reads, prefetches and decodes; which samples, which crops and which flips are decided here,
from `order` and `augment`, and handed to FFCV's decoder as columns of the sample table.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from data import augment, order
from data.augment import SAMPLE, BoxDecoder
from data.dataset import Dataset, checked, damaged
from data.ffcv_parts import (
    JPEG,
    RAW,
    Compiler,
    EpochIterator,
    Loader,
    OrderOption,
    OSCacheContext,
    OSCacheManager,
    Reader,
    loader_module,
)
from data.order import Stream
from data.randaugment import RandAugment
from data.randaugment_gpu import transform_for

Batch = tuple[torch.Tensor, torch.Tensor]  # (b, 3, R, R) float32 channels_last; (b,) int64

BATCHES_AHEAD = 3
_CHUNK = 16_384  # samples whose boxes are computed at once: 5 MB of draws


class Beton:
    """An open .beton file: batches of chosen samples, each cropped and flipped as told.

    Args:
        path: the file, with dataset.json in the same folder.
        resolution: R, the side of the square images returned, in pixels.
        batch_size: samples per batch.
        workers: threads that decode; the result doesn't depend on their number.
        device: where the batches go.
        padding: by how many pixels boxes may leave their image on each side; it is black there.
        randaugment: what else happens to the images; None for nothing. It is computed by the
            threads that decode or, where the device is a GPU, there; the pixels are the same.

    Attributes:
        dataset: the description: class names, mean and standard deviation.
        images: number of images in the file.
        heights, widths: (images,) sizes in pixels as stored.
        labels: (images,) int64.

    Raises:
        DataError: the file is missing or damaged.
        ValueError: a number is too small.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resolution: int,
        batch_size: int,
        workers: int,
        device: torch.device | str,
        padding: int = 0,
        randaugment: RandAugment | None = None,
    ) -> None:
        for name, value in (
            ("resolution", resolution), ("batch size", batch_size), ("workers", workers)
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if padding < 0:
            raise ValueError(f"padding must be at least 0, got {padding}")
        path, device = Path(path), torch.device(device)
        self.dataset = checked(path)
        self._samples, self.labels = _tables(path, self.dataset)
        self.images = len(self.labels)
        self.heights, self.widths = self._samples["height"], self._samples["width"]
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._padding, self._padded = padding, True if padding else None
        batched = _augments_batches(device)
        self._randaugment = None if batched else randaugment
        decoder = BoxDecoder(resolution, pool, workers, self._padded, self._randaugment)
        self._loader = _open(path, decoder, batch_size)
        self._receive = _Receiver(
            device, self.dataset, resolution, randaugment if batched else None
        )
        self._compile(resolution)

    def batches(
        self,
        indices: np.ndarray,
        boxes: np.ndarray,
        flips: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
        pace: Pace | None = None,
    ) -> Iterator[Batch]:
        """The chosen samples in the given order; the last batch may be smaller.

        FFCV works ahead in a thread, which ends with the iterator, be it exhausted or abandoned.

        Args:
            indices: (m,) which samples, none twice.
            boxes: (m, 4) their crops: top, left, height, width in pixels of the stored image.
            flips: (m,) bool, which to mirror; None for none.
            seeds: (m,) uint64 for RandAugment; None for zeros.
            pace: where to count how fast this goes.

        Raises:
            ValueError: an index is out of range or given twice, or a box leaves its padded image.
        """
        self._check(indices, boxes)
        # A fresh table each time: a thread still at work on an abandoned epoch keeps its own.
        table = np.empty(self.images, [(self._image_column, SAMPLE)])
        samples = table[self._image_column]
        samples[:] = self._samples
        for name, column in zip(("top", "left", "crop_height", "crop_width"), boxes.T, strict=True):
            samples[name][indices] = column
        if flips is not None:
            samples["flip"][indices] = flips
        if seeds is not None:
            samples["seed"][indices] = seeds
        return self._iterate(np.ascontiguousarray(indices, np.int64), table, pace or Pace())

    def _iterate(self, indices: np.ndarray, table: np.ndarray, pace: Pace) -> Iterator[Batch]:
        self._loader.reader.metadata = table
        epoch = _Epoch(self._loader, indices, pace)
        position = 0
        try:
            for pixels in epoch:
                batch = indices[position : position + len(pixels)]
                position += len(pixels)
                seeds = table[self._image_column]["seed"][batch]
                yield self._receive(pixels, self.labels[batch], seeds)
                self._receive.wait()
        finally:
            self._receive.wait()
            epoch.stop()

    @property
    def _image_column(self) -> str:
        return f"f{self._loader.field_name_to_f_ix['image']}"

    def _check(self, indices: np.ndarray, boxes: np.ndarray) -> None:
        """OpenCV would end the process over a box that leaves its image."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.images:
            raise ValueError(f"indices exceed the {self.images} images of the file")
        if np.bincount(indices, minlength=1).max() > 1:
            raise ValueError("an index is given twice")
        top, left, height, width = boxes.T
        padding = self._padding
        inside = (top >= -padding) & (left >= -padding) & (height > 0) & (width > 0)
        inside &= top + height - padding <= self.heights[indices]
        inside &= left + width - padding <= self.widths[indices]
        if not inside.all():
            at = int(np.flatnonzero(~inside)[0])
            raise ValueError(f"the box {boxes[at].tolist()} leaves image {indices[at]}")

    def _compile(self, resolution: int) -> None:
        """Compile the threads' code now (once per process) rather than within the first step."""
        with self._loader.memory_manager.schedule_epoch([]) as context:
            nothing = np.empty((0, resolution, resolution, 3), np.uint8)
            none = np.empty(0, np.int64)
            augment.decode_samples(none, self._samples, context.state[0], nothing, self._padded)
        if self._randaugment is not None:
            self._randaugment.apply(nothing, np.empty(0, np.uint64))


@dataclass
class Pace:
    """How the loader has kept up with training in an epoch, after its first batch.

    Attributes:
        images: that it has made.
        seconds: in which it made them.
        waited: seconds that training waited for it.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class TrainData:
    """The training part: shuffled, randomly cropped and flipped, cut into ranks and micro-batches.

    Everything is a function of (seed, epoch, sample index). The union over ranks of a step's images
    is the same for every world size.

    Unless `label_skew` is given: then each rank has a fixed shard of its own, of equal size and
    with a class mix of its own (`order.label_shards`), and every epoch is a permutation of it, a
    function of (seed, epoch, rank).

    Args:
        path: train.beton.
        total_batch: images per step over all ranks.
        physical_batch: images per micro-batch.
        rank, world_size: which share of each step is this process's.
        seed: of order and augmentation, at least 0.
        resolution: R, the side of the images returned, in pixels.
        scale, ratio: of the random crops, see `augment.random_resized_crop`.
        flip: mirror half of the images.
        padding: if positive, crops are those of `augment.padded_crop` instead, which shift an image
            by up to so many pixels as it is stored. The window, of the stored image's size, is then
            resized to R like any other crop; where the stored image is of that size, not at all.
        label_skew: if positive, the concentration of the ranks' class mixes; 0 for no skew.
        randaugment: applied after crop, resize and flip, before the normalisation.
        workers, device: see `Beton`.

    Attributes:
        dataset: the file's description.
        images: number of images in the file.
        num_classes: number of classes.
        micro_batches: per step on this rank.
        steps_per_epoch: whole global batches in an epoch, or, which is as many, whole batches in a
            rank's own shard.
        pace: of the last `epoch`.

    Raises:
        DataError: the file is missing or damaged.
        ValueError: batches, ranks and images don't fit together.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        total_batch: int,
        physical_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        resolution: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        padding: int = 0,
        label_skew: float = 0.0,
        randaugment: RandAugment | None = None,
        workers: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._beton = Beton(
            path, resolution=resolution, batch_size=physical_batch, workers=workers, device=device,
            padding=padding, randaugment=randaugment,
        )  # fmt: skip
        self.dataset = self._beton.dataset
        self.images = self._beton.images
        self.num_classes = len(self.dataset.classes)
        self._shard = {"rank": rank, "world_size": world_size, "total_batch": total_batch}
        self._rank, self._world_size = rank, world_size
        self._physical_batch = physical_batch
        self._seed, self._scale, self._ratio, self._flip = seed, scale, ratio, flip
        self._padding = padding

        first = order.shard(order.epoch_order(self.images, seed, 0), **self._shard, steps=1)
        if len(first) % physical_batch:
            raise ValueError(
                f"the local batch {len(first)} (total batch {total_batch} over {world_size} ranks) "
                f"isn't divisible by the physical batch {physical_batch}"
            )
        self.micro_batches = len(first) // physical_batch
        self._local_batch, self._own = len(first), None
        if label_skew:
            shards = order.label_shards(self._beton.labels, world_size, label_skew, seed)
            self._own = shards[rank]
        self.steps_per_epoch = self.images // total_batch
        self.pace = Pace()

    def epoch(self, epoch: int, start_step: int = 0, steps: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, `micro_batches` for each step.

        Args:
            epoch: from 0.
            start_step: the first step wanted; the same images come as in the uninterrupted epoch.
            steps: how many; None for the rest of the epoch.

        Raises:
            ValueError: the epoch doesn't have these steps.
        """
        self.pace = Pace()
        indices = self._indices(epoch, start_step, steps)
        return self._augmented(indices, self._seed, epoch, self.pace)

    def _indices(self, epoch: int, start_step: int, steps: int | None) -> np.ndarray:
        if self._own is None:
            whole, place = order.epoch_order(self.images, self._seed, epoch), self._shard
        else:
            whole = order.shard_order(self._own, self._rank, self._seed, epoch)
            place = {"rank": 0, "world_size": 1, "total_batch": self._local_batch}
        return order.shard(whole, **place, start_step=start_step, steps=steps)

    def estimation(self, epoch: int, batches: int) -> Iterator[Batch]:
        """Micro-batches to estimate BatchNorm's statistics on, augmented as for training.

        Order, crops and flips come from a stream of their own, so the estimate doesn't reuse the
        epoch's. Where the file has fewer images than asked for, it is gone through again.

        With `label_skew` too the images are drawn from the whole file: the statistics are those of
        the consensus, which is evaluated on all classes in their natural shares.

        Args:
            epoch: from 0.
            batches: micro-batches in all; rank r gets numbers r, r + world_size, …

        Raises:
            ValueError: fewer batches than ranks; one would have nothing to estimate from.
        """
        if batches < self._world_size:
            raise ValueError(
                f"{batches} batches for BatchNorm's statistics leave some of the "
                f"{self._world_size} ranks without any"
            )
        return self._estimation(epoch, batches)

    def _estimation(self, epoch: int, batches: int) -> Iterator[Batch]:
        each_pass = self.images // self._physical_batch
        starts = range(0, batches, each_pass)
        seeds = order.bits(self._seed, epoch, np.arange(len(starts)), 1, Stream.ESTIMATION)[:, 0]
        for start, seed in zip(starts, seeds.tolist(), strict=True):
            permutation = order.epoch_order(self.images, seed, epoch)
            number = np.arange(start, min(start + each_pass, batches))
            mine = number % self._world_size == self._rank
            whole = permutation[: len(number) * self._physical_batch]
            indices = whole.reshape(len(number), self._physical_batch)[mine].reshape(-1)
            yield from self._augmented(indices, seed, epoch)

    def _augmented(
        self, indices: np.ndarray, seed: int, epoch: int, pace: Pace | None = None
    ) -> Iterator[Batch]:
        def boxes(some: np.ndarray) -> np.ndarray:
            sizes = self._beton.heights[some], self._beton.widths[some]
            if self._padding:
                shifts = order.draws(seed, epoch, some, 2, Stream.SHIFT)
                return augment.padded_crop(shifts, *sizes, self._padding)
            return augment.random_resized_crop(
                order.draws(seed, epoch, some, augment.CROP_DRAWS, Stream.CROP),
                *sizes,
                self._scale,
                self._ratio,
            )

        flips = None
        if self._flip:
            flips = augment.flip(order.draws(seed, epoch, indices, 1, Stream.FLIP)[:, 0])
        seeds = order.bits(seed, epoch, indices, 1, Stream.PIXELS)[:, 0]
        crops = _in_chunks(boxes, indices)
        return self._beton.batches(indices, crops, flips, seeds, pace)


class ValData:
    """The evaluation part: this rank's images exactly once, central crops, none padded.

    Iterating yields batches of at most `batch` images; a rank may have none.

    Args:
        path: val.beton.
        rank, world_size: which share is this process's.
        batch: images per batch.
        resolution: R, the side of the images returned, in pixels.
        crop_ratio: the crop's side over the image's shorter side; 224/256 for "resize 256, centre
            crop 224".
        workers, device: see `Beton`.

    Attributes:
        dataset: the file's description.
        images: number of images in the file, over all ranks; also `len()`.
        num_classes: number of classes.

    Raises:
        DataError: the file is missing or damaged.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rank: int,
        world_size: int,
        batch: int,
        resolution: int,
        crop_ratio: float = 224 / 256,
        workers: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio must lie in (0, 1], got {crop_ratio}")
        self._beton = Beton(
            path, resolution=resolution, batch_size=batch, workers=workers, device=device
        )
        self.dataset = self._beton.dataset
        self.images = self._beton.images
        self.num_classes = len(self.dataset.classes)
        self._indices = order.validation_shard(self.images, rank, world_size)
        self._boxes = augment.center_crop(
            self._beton.heights[self._indices], self._beton.widths[self._indices], crop_ratio
        )

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[Batch]:
        return self._beton.batches(self._indices, self._boxes)


class _Epoch(EpochIterator):
    """FFCV's prefetching thread, made safe to fail and to abandon. Yields (b, R, R, 3) uint8.

    The arrays are FFCV's own memory, which it fills again after the next one has been asked for.
    """

    error: Exception | None = None

    def __init__(self, loader: Loader, indices: np.ndarray, pace: Pace) -> None:
        self._pace, self._asked = pace, 0
        super().__init__(loader, indices)  # starts the thread
        _open_epochs.add(self)

    def run_pipeline(self, number: int, indices: np.ndarray, *slot: Any) -> Any:
        started = time.perf_counter()
        made = super().run_pipeline(number, indices, *slot)
        if number:
            self._pace.images += len(indices)
            self._pace.seconds += time.perf_counter() - started
        return made

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # FFCV's consumer would wait for ever
            self.error = error
            self.output_queue.put(None)

    def __next__(self) -> np.ndarray:
        started = time.perf_counter()
        try:
            batch = super().__next__()[0]
            if self._asked:
                self._pace.waited += time.perf_counter() - started
            self._asked += 1
            return batch
        except StopIteration:
            if self.error is not None:
                raise self.error from None
            raise

    def stop(self) -> None:
        """End the thread and wait for it. FFCV's own `close` leaves it blocked on a full queue."""
        self.iter_ixes = iter(())
        self.terminate_event.set()
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get(timeout=0.01)
        self.close()
        _open_epochs.discard(self)


_open_epochs: weakref.WeakSet[_Epoch] = weakref.WeakSet()


@atexit.register
def _stop_open_epochs() -> None:
    """Python ends a thread that comes back from compiled code while it shuts down; C++ answers that
    with an abort of the process."""
    for epoch in list(_open_epochs):
        epoch.stop()


class _MappedFile(OSCacheManager):
    """FFCV's mapped file without its dictionaries of pages and addresses, which nothing here uses.

    For ImageNet they would take four seconds and 0.7 GB in every process.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.ptrs = self.sizes = None
        self.context = OSCacheContext(self)

    def compile_reader(self) -> None:
        """BoxDecoder reads for itself. FFCV's reader marks numba's one type of byte arrays as
        read-only on the way, and nothing compiled afterwards could write to such an array."""


def _augments_batches(device: torch.device) -> bool:
    """Whether RandAugment runs on the device, rather than in the threads that decode."""
    return device.type != "cpu"


class _Receiver:
    """Takes pixels out of FFCV's memory, augments and normalises them on the device."""

    def __init__(
        self,
        device: torch.device,
        dataset: Dataset,
        resolution: int,
        randaugment: RandAugment | None,
    ) -> None:
        self.device = device
        self.randaugment = randaugment
        # Now, for a GPU's kernels are compiled and tried first.
        self.transform = None if randaugment is None else transform_for(device)
        # For a row of pixels, (R * 3,): torch is slow where the innermost dimension is of size 3.
        self.mean, self.std = (
            torch.tensor(values, device=device).mul_(255).repeat(resolution)
            for values in (dataset.mean, dataset.std)
        )
        # On a stream of their own copies don't queue behind the model's work: the wait is short.
        self.stream = torch.Stream(device) if device.type != "cpu" else None

    def __call__(self, pixels: np.ndarray, labels: np.ndarray, seeds: np.ndarray) -> Batch:
        """From (b, R, R, 3) uint8 and (b,) int64 and uint64 to a Batch in memory of its own."""
        images, labels = torch.from_numpy(pixels), torch.from_numpy(labels)
        if self.stream is not None:
            images, labels = self._copy(images, labels)
        images = images.to(self.device)
        if self.randaugment is not None:
            plan = self.randaugment.plan(seeds, *pixels.shape[1:3])
            images = self.transform(images, plan)
        normalised = images.flatten(2).float().sub_(self.mean).div_(self.std)
        # channels_last, for the memory stays as it is
        return normalised.view(images.shape).permute(0, 3, 1, 2), labels.to(self.device)

    def _copy(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        assert self.stream is not None
        with self.stream:
            copies = [x.to(self.device, non_blocking=True) for x in (images, labels.pin_memory())]
        current = torch.accelerator.current_stream(self.device)
        current.wait_stream(self.stream)
        for copy in copies:
            copy.record_stream(current)
        return copies[0], copies[1]

    def wait(self) -> None:
        """Wait until the last pixels have left FFCV's memory, which it is about to fill again."""
        if self.stream is not None:
            self.stream.synchronize()


def _open(path: Path, decoder: BoxDecoder, batch_size: int) -> Loader:
    """FFCV's Loader for the images. Labels are looked up in the table that `_tables` returns.

    The decoder brings its compiled code, so FFCV has nothing to compile, which would take seconds
    for every Loader. FFCV's constructor sets torch's threads, and draws a seed if given none.
    """
    threads = torch.get_num_threads()
    Compiler.set_enabled(False)
    try:
        with patch.object(loader_module, "OSCacheManager", _MappedFile):
            return Loader(
                str(path),
                batch_size=batch_size,
                num_workers=1,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                seed=0,
                pipelines={"image": [decoder], "label": None},
                drop_last=False,
                batches_ahead=BATCHES_AHEAD,
            )
    finally:
        Compiler.set_enabled(True)
        torch.set_num_threads(threads)


def _tables(path: Path, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Where each image lies, (n,) SAMPLE with zeros for crop and flip, and the labels (n,) int64.

    Raises:
        DataError: the file's own tables contradict each other or the description.
    """
    try:
        reader = Reader(str(path))
        columns = {name: f"f{i}" for i, name in enumerate(reader.field_names)}
        stored, labels = (reader.metadata[columns[name]] for name in ("image", "label"))
        allocated = reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        place = np.searchsorted(allocated["ptr"], stored["data_ptr"])
        sizes = allocated["size"][place]
        exact = allocated["ptr"][place] == stored["data_ptr"]
    except Exception as error:  # FFCV doesn't say what it raises for a malformed file
        raise damaged(path, f"isn't a readable .beton ({error!r})") from None

    samples = np.zeros(len(stored), SAMPLE)
    for name in ("data_ptr", "height", "width", "mode"):
        samples[name] = stored[name]
    samples["size"] = sizes
    ends = stored["data_ptr"] + sizes
    pixels = 3 * stored["height"].astype(np.uint64) * stored["width"]
    raw = stored["mode"] == RAW
    sound = exact & (ends <= reader.header["alloc_table_ptr"]) & (ends >= sizes) & (pixels > 0)
    sound &= np.where(raw, sizes == pixels, stored["mode"] == JPEG)
    sound &= (labels >= 0) & (labels < len(dataset.classes))
    if len(stored) != dataset.files[path.name].images or not sound.all():
        raise damaged(path, "has inconsistent tables")
    return samples, labels.astype(np.int64)


def stored_side(path: str | Path) -> int | None:
    """The side in pixels, if all images of a file are squares of one size; else None.

    Raises:
        DataError: the file is missing or damaged.
    """
    samples, _ = _tables(Path(path), checked(path))
    sides = np.unique(np.concatenate([samples["height"], samples["width"]]))
    return int(sides[0]) if len(sides) == 1 else None


def _in_chunks(function: Callable[[np.ndarray], np.ndarray], indices: np.ndarray) -> np.ndarray:
    """`function` of `indices` (m,), a few at a time to save memory; (m, 4)."""
    parts = [function(indices[i : i + _CHUNK]) for i in range(0, len(indices), _CHUNK)]
    return np.concatenate(parts) if parts else np.empty((0, 4), np.int64)
