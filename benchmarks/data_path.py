"""What the data path costs: images per second of the loaders, and of RandAugment alone.

    python -m benchmarks.data_path          # about two minutes, on two otherwise idle cores
    python -m benchmarks.data_path --short

The loaders read JPEGs of 400 × 500 pixels and deliver normalised float32 batches of 224 × 224:

  FFCV           FFCV's own Loader, RandomResizedCrop, RandomHorizontalFlip and NormalizeImage
  TrainData      this repository's
  + RandAugment  this repository's, depth 2, severity 10, all operations
  FFCV + PIL     FFCV's with composer's RandAugment on PIL images, the same settings

Each has a process of its own, confined to as many cores as the loader has workers, with one thread
for torch. They take turns, and every ratio is the median of the ratios within a turn. What runs on
one core is timed in processor seconds, which others on the machine disturb little. An epoch's first
and last batches aren't timed: FFCV's memory is new, or nothing is left to prefetch.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from numba import njit
from PIL import Image
from sklearn.datasets import load_sample_images

from data import write
from data.loaders import TrainData
from data.randaugment import RandAugment, transform

SIDE, BATCH, UNTIMED = 224, 32, 5
STORED = (400, 500)
SETTINGS = RandAugment(depth=2, severity=10, operations="all")
LOADERS = ["FFCV", "TrainData", "+ RandAugment", "FFCV + PIL"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Epoch = Callable[[], Iterator[object]]  # the batches
Rates = dict[str, list[float]]  # images per second, turn by turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=768, help="in the file")
    parser.add_argument("--short", action="store_true", help="two repeats with 448 images")
    options = parser.parse_args()
    if options.short:
        options.repeats, options.images = 2, 448
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.images)
        loaders = measure_loaders(folder, options.repeats)
    print(report(loaders, measure_alone(options.repeats), options))


def write_photographs(folder: Path, count: int) -> None:
    """Crops of scikit-learn's two photographs, of different sizes, as JPEGs of quality 90."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    height, width = STORED
    samples = []
    for number in range(count):
        photograph, share = photographs[number % 2], rng.uniform(0.5, 1)
        w, h = share * photograph.width, share * photograph.width * height / width
        h, w = (h, w) if h <= photograph.height else (photograph.height, photograph.height * 1.25)
        left, top = rng.uniform(0, photograph.width - w), rng.uniform(0, photograph.height - h)
        crop = photograph.resize((width, height), box=(left, top, left + w, top + h))
        samples.append((np.asarray(crop), number % 2))
    content = write.Content(["a", "b"], MEAN, STD, samples, samples[:1], mode="jpg")
    write.write_content("photographs", {}, content, folder)


def measure_loaders(folder: str, repeats: int) -> dict[int, Rates]:
    """By the number of workers and by loader."""
    rates: dict[int, Rates] = {workers: {name: [] for name in LOADERS} for workers in (1, 2)}
    with started(folder) as processes:
        for _ in range(repeats):
            for workers in (1, 2):
                for name, connection in processes.items():
                    connection.send(workers)
                    rates[workers][name].append(connection.recv())
    return rates


@contextmanager
def started(folder: str) -> Iterator[dict[str, Connection]]:
    """A process for each loader: it answers a number of workers with images per second."""
    context = get_context("spawn")
    connections, processes = {}, []
    for name in LOADERS:
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, folder, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that we hear of its end
    try:
        for connection in connections.values():
            connection.recv()
        yield connections
    finally:
        for process in processes:
            process.terminate()


def serve(name: str, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    open_loader = open_traindata if name in LOADERS[1:3] else open_ffcv
    epochs = {}
    for workers in (1, 2):  # one after the other: FFCV compiles in the first epoch
        epochs[workers] = open_loader(name, Path(folder) / "train.beton", workers)
        images_per_second(epochs[workers], workers)
    connection.send("ready")
    while True:
        workers = connection.recv()
        confine(workers)
        connection.send(images_per_second(epochs[workers], workers))


def images_per_second(epoch: Epoch, workers: int) -> float:
    clock = time.process_time if workers == 1 else time.perf_counter
    times = [clock() for _ in epoch()][UNTIMED:-UNTIMED]
    return BATCH * (len(times) - 1) / (times[-1] - times[0])


def confine(cores: int) -> None:
    """Let this process's threads run on so many cores only."""
    allowed = sorted(ALL_CORES)[:cores]
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), allowed)


ALL_CORES = os.sched_getaffinity(0)


def open_traindata(name: str, path: Path, workers: int) -> Epoch:
    data = TrainData(
        path, total_batch=BATCH, physical_batch=BATCH, rank=0, world_size=1, seed=0,
        resolution=SIDE, workers=workers, randaugment=SETTINGS if "RandAugment" in name else None,
    )  # fmt: skip
    return lambda: data.epoch(0)


def open_ffcv(name: str, path: Path, workers: int) -> Epoch:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = (np.array(numbers) * 255 for numbers in (MEAN, STD))
    image = [RandomResizedCropRGBImageDecoder((SIDE, SIDE)), RandomHorizontalFlip()]
    if "PIL" in name:  # FFCV cannot compile what follows an operation in Python
        image += [pil_operation(), ToTensor()]
    else:
        image += [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(path), batch_size=BATCH, num_workers=workers, order=OrderOption.RANDOM, seed=0,
        drop_last=True, os_cache=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip
    if "PIL" not in name:
        return lambda: iter(loader)
    mean, std = (torch.tensor(x, dtype=torch.float32).repeat(SIDE) for x in (mean, std))
    return lambda: (images.flatten(2).float().sub_(mean).div_(std) for images, _ in loader)


def pil_operation() -> object:
    """composer's RandAugment as an operation of FFCV's, image by image."""
    from dataclasses import replace

    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    augment = composers()

    class PILRandAugment(Operation):
        def generate_code(self) -> Callable:
            def operation(images, out):
                for i, image in enumerate(images):
                    out[i] = augment(image)
                return out[: len(images)]

            return operation

        def declare_state_and_memory(self, previous_state):
            query = AllocationQuery(previous_state.shape, previous_state.dtype)
            return replace(previous_state, jit_mode=False), query

    return PILRandAugment()


def composers() -> Callable[[np.ndarray], np.ndarray]:
    """composer's RandAugment of one image, from array to array."""
    import training.methods  # noqa: F401, I001, which makes composer fit to be imported
    from composer.algorithms.utils import augmentation_sets
    from composer.functional import randaugment_image

    operations = augmentation_sets[SETTINGS.operations]

    def augment(image: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(image)
        picture = randaugment_image(picture, SETTINGS.severity, SETTINGS.depth, operations)
        return np.asarray(picture)

    return augment


def measure_alone(repeats: int, count: int = 256) -> Rates:
    """RandAugment without a loader, and a loop that only computes, on one thread and on two."""
    photograph = Image.fromarray(load_sample_images().images[0]).resize((SIDE, SIDE))
    images = np.stack([np.asarray(photograph)] * count)
    seeds = np.tile(np.arange(count // 2, dtype=np.uint64), 2)  # the same work for both threads
    out = np.empty_like(images)
    pil, pool = composers(), ThreadPoolExecutor(2)

    def ours(*parts: slice) -> None:
        plan = SETTINGS.plan(seeds, SIDE, SIDE)

        def augment(part: slice) -> None:
            out[part] = images[part]
            transform(out[part], *(numbers[part] for numbers in plan))

        list(pool.map(augment, parts))

    def loop(*parts: slice) -> None:
        list(pool.map(lambda part: spin((part.stop - part.start) * 200_000), parts))

    whole, halves = slice(0, count), (slice(0, count // 2), slice(count // 2, count))
    tasks: dict[str, Callable[[], object]] = {
        "PIL": lambda: [pil(image) for image in images],
        "ours": lambda: ours(whole),
        "loop": lambda: loop(whole),
        "ours, 2 threads": lambda: ours(*halves),
        "loop, 2 threads": lambda: loop(*halves),
    }
    rates: Rates = {name: [] for name in tasks}
    for repeat in range(-1, repeats):  # the first time is for warming up
        for name, task in tasks.items():
            clock = time.perf_counter if "2 threads" in name else time.process_time
            began = clock()
            task()
            if repeat >= 0:
                rates[name].append(count / (clock() - began))
    return rates


@njit(nogil=True)
def spin(steps: int) -> int:
    """Marsaglia's xorshift, each step of which has to wait for the one before."""
    state = np.uint64(1)
    for _ in range(steps):
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
    return state


def report(loaders: dict[int, Rates], alone: Rates, options: argparse.Namespace) -> str:
    return "\n".join([
        machine(options), "",
        "| loader | images/s, 1 worker, 1 core | / FFCV's | images/s, 2 workers, 2 cores | "
        "/ FFCV's | 2 workers / 1 |",
        "|---|---|---|---|---|---|",
        *(loader_row(name, loaders) for name in LOADERS), "",
        "| RandAugment alone | images/s, 1 thread | / PIL's | images/s, 2 threads | "
        "2 threads / 1 |",
        "|---|---|---|---|---|",
        *alone_rows(alone), "",
        "| ratio | found | at least |",
        "|---|---|---|",
        *bars(loaders, alone),
    ])  # fmt: skip


def machine(options: argparse.Namespace) -> str:
    names = ("ffcv", "mosaicml", "numba", "pillow", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return (
        f"Commit {subprocess.run(commit, capture_output=True, text=True).stdout.strip()}, "
        f"{len(ALL_CORES)} cores, Python {platform.python_version()}, {versions}; "
        f"{options.images} JPEGs of {STORED[0]} × {STORED[1]}, "
        f"batches of {BATCH} × {SIDE} × {SIDE}; medians of {options.repeats}"
    )


def loader_row(name: str, loaders: dict[int, Rates]) -> str:
    cells = []
    for rates in loaders.values():
        cells += [f"{statistics.median(rates[name]):.0f}", f"{ratio(rates, name, 'FFCV'):.2f}"]
    one, two = (rates[name] for rates in loaders.values())
    return f"| {name} | {' | '.join(cells)} | {ratio({'1': one, '2': two}, '2', '1'):.2f} |"


def alone_rows(alone: Rates) -> list[str]:
    def median(name: str) -> str:
        return f"{statistics.median(alone[name]):.0f}"

    scaling = {name: ratio(alone, f"{name}, 2 threads", name) for name in ("ours", "loop")}
    return [
        f"| composer's, PIL | {median('PIL')} | 1.00 | | |",
        f"| this one | {median('ours')} | {ratio(alone, 'ours', 'PIL'):.2f} | "
        f"{median('ours, 2 threads')} | {scaling['ours']:.2f} |",
        f"| a compiled loop that only computes | | | | {scaling['loop']:.2f} |",
    ]


def bars(loaders: dict[int, Rates], alone: Rates) -> list[str]:
    """What is asked for, and what was found."""
    one = loaders[1]
    scaling = {name: ratios(alone, f"{name}, 2 threads", name) for name in ("ours", "loop")}
    figures = [
        ("TrainData / FFCV", ratio(one, "TrainData", "FFCV"), 0.95),
        ("TrainData + RandAugment / FFCV + PIL", ratio(one, "+ RandAugment", "FFCV + PIL"), 1),
        ("RandAugment alone / PIL", ratio(alone, "ours", "PIL"), 1),
        ("RandAugment's 2 threads / 1, over the loop's", ratio(scaling, "ours", "loop"), 0.9),
    ]
    return [f"| {name} | {found:.2f} | {least:.2f} |" for name, found, least in figures]


def ratio(rates: Rates, name: str, base: str) -> float:
    """The median over the turns."""
    return statistics.median(ratios(rates, name, base))


def ratios(rates: Rates, name: str, base: str) -> list[float]:
    return [a / b for a, b in zip(rates[name], rates[base], strict=True)]


if __name__ == "__main__":
    main()
