"""data.imagefolder: a tree of photographs becomes .beton files, and broken ones are named."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image

from data import imagefolder, write
from data.dataset import DataError
from data.ffcv_parts import JPEG, RAW, Reader, RGBImageField, ctypes_imdecode
from data.loaders import TrainData, ValData
from tests.support.photographs import jpegs, make_tree

pytestmark = pytest.mark.slow  # its workers are processes

CLASSES = ["n01440764", "n01443843", "n01446922"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three classes; 12 images of up to 100 x 130 pixels to train on, 6 to evaluate on."""
    folder = tmp_path_factory.mktemp("tree")
    assert make_tree(folder, classes=3, train=4, val=2, size=(100, 130)) == CLASSES
    return folder


@pytest.fixture
def own(tree, tmp_path):
    """A copy to change."""
    return shutil.copytree(tree, tmp_path / "tree")


def run(tree, out, *flags):
    command = ["imagefolder", "--folder", str(tree), "--out", str(out), "--workers", "2"]
    return write.main([*command, *map(str, flags)])


def written(tree, out, *flags):
    assert run(tree, out, *flags) == 0
    return out


def description(out):
    return json.loads((out / "dataset.json").read_text())


def stored(path):
    """Of each image in a .beton: mode, height, width, content, label."""
    reader, content = Reader(str(path)), path.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"], strict=True))
    images = []
    for (mode, width, height, place), label in reader.metadata.tolist():
        images.append((mode, height, width, content[place : place + sizes[place]], label))
    return images


def pixels(path):
    """The images of a .beton as arrays."""
    arrays = []
    for mode, height, width, content, _ in stored(path):
        array = np.frombuffer(content, np.uint8)
        if mode == JPEG:
            arrays.append(cv2.imdecode(array, cv2.IMREAD_COLOR_RGB))
        else:
            arrays.append(array.reshape(height, width, 3))
    return arrays


def files(tree, part):
    return sorted((tree / part).glob("*/*"))


def add(tree, content, name="more.JPEG"):
    """One more image for the first class, as the first or, with this name, the last of it."""
    path = tree / "train" / CLASSES[0] / name
    path.write_bytes(content)
    return path


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_line(text):
    assert text.endswith("\n") and text.count("\n") == 1
    return text


def by_ffcv(path, **settings):
    """What FFCV itself stores of a file."""
    settings = {"max_resolution": 500, "jpeg_quality": 90} | settings
    room = np.empty(2**20, np.uint8)
    metadata = np.zeros(1, RGBImageField().metadata_type)

    def malloc(size):
        room.resize(size, refcheck=False)
        return 0, room

    RGBImageField(**settings).encode(metadata, Image.open(path).convert("RGB"), malloc)
    mode, width, height, _ = metadata[0].tolist()
    return mode, height, width, room.tobytes()


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize("size", [500, 77])
def test_images_are_stored_as_ffcv_stores_them(tree, tmp_path, mode, size):
    out = written(tree, tmp_path, "--mode", mode, "--max-size", size, "--quality", 80)
    for part in ("train", "val"):
        settings = {"write_mode": mode, "max_resolution": size, "jpeg_quality": 80}
        expected = [by_ffcv(path, **settings) for path in files(tree, part)]
        assert [image[:-1] for image in stored(out / f"{part}.beton")] == expected


def test_jpegs_look_like_their_photographs(tree, tmp_path):
    out = written(tree, tmp_path, "--mode", "jpg")
    for image, path in zip(pixels(out / "train.beton"), files(tree, "train"), strict=True):
        original = np.asarray(Image.open(path))
        assert image.shape == original.shape
        assert np.abs(image.astype(float) - original).mean() < 5


def test_the_longer_side_is_limited_and_the_shape_kept(own, tmp_path):
    for number, shape in enumerate([(300, 200), (200, 300), (150, 150), (151, 149), (20, 10)]):
        image = np.zeros((*shape, 3), np.uint8)
        add(own, encoded(Image.fromarray(image)), f"x{number}.png")
    add(own, encoded(Image.new("L", (3000, 1))), "y.png")
    out = written(own, tmp_path / "out", "--max-size", 150)
    sizes = [image[1:3] for image in stored(out / "train.beton")[4:10]]
    assert sizes == [(150, 100), (100, 150), (150, 150), (150, 148), (20, 10), (1, 150)]


def test_scaling_averages_over_areas():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    means = image.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))
    assert np.abs(imagefolder.shrunk(image, 30) - means).max() <= 0.5


def test_the_share_of_jpegs_is_a_function_of_the_index():
    indices = np.arange(10_000)
    jpegs = {x: imagefolder.Storage(500, 90, x).jpegs(indices) for x in (0.0, 0.3, 0.5, 1.0)}
    for share, chosen in jpegs.items():
        assert abs(chosen.mean() - share) < 0.02
    assert not jpegs[0.0].any() and jpegs[1.0].all() and jpegs[0.5][jpegs[0.3]].all()
    assert (imagefolder.Storage(9, 1, 0.5).jpegs(indices[77:80]) == jpegs[0.5][77:80]).all()


def test_defaults_are_those_of_ffcv_s_imagenet(tree, tmp_path):
    out = written(tree, tmp_path)
    settings = description(out)["settings"]
    assert (settings["max_size"], settings["quality"], settings["jpeg_share"]) == (500, 90, 0.5)
    images = stored(out / "train.beton")
    assert {image[0] for image in images} == {RAW, JPEG}
    for index, (image, path) in enumerate(zip(images, files(tree, "train"), strict=True)):
        chosen = "jpg" if image[0] == JPEG else "raw"
        assert image[:-1] == by_ffcv(path, write_mode=chosen), index
    assert description(out)["mean"] == [0.485, 0.456, 0.406]
    assert description(out)["std"] == [0.229, 0.224, 0.225]


def test_quality_decides_the_size(tree, tmp_path):
    sizes = []
    for quality in (30, 90, 100):
        out = written(tree, tmp_path / str(quality), "--mode", "jpg", "--quality", quality)
        sizes.append(sum(len(image[3]) for image in stored(out / "train.beton")))
    assert sizes[0] < 0.5 * sizes[1] < 0.5 * sizes[2]


def test_the_number_of_workers_changes_nothing(own, tmp_path):
    for number in range(40):
        add(own, jpegs((100, 130))[number], f"more{number}.JPEG")
    add(own, b"broken")
    first, second = (
        written(own, tmp_path / str(workers), "--workers", workers, "--skip-broken")
        for workers in (1, 3)
    )
    for name in ("train.beton", "val.beton", "dataset.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_what_was_handed_over_is_not_overwritten(own):
    """A worker that is far ahead has to wait for the memory that it is to fill."""
    for number in range(60):
        add(own, jpegs((100, 130))[number % 40], f"more{number}.JPEG")
    part, storage = imagefolder.find(own).train, imagefolder.Storage(500, 90, 0.0)
    sums = []
    for number, (image, _) in enumerate(imagefolder.Images(part, storage, workers=1)):
        time.sleep(0.2 if number == 1 else 0)
        sums.append(hashlib.sha256(image.content).hexdigest())
    files = ((part.folder / name).read_bytes() for name in part.names)
    assert sums == [hashlib.sha256(imagefolder.decoded(file)).hexdigest() for file in files]


def test_noise_of_any_size_has_room(own, tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (700, 700, 3)).astype(np.uint8) * 255
    add(own, encoded(Image.fromarray(noise)), "noise.png")
    for size in (1, 700):
        flags = ("--max-size", size, "--quality", 100, "--mode", "jpg")
        images = stored(written(own, tmp_path / str(size), *flags) / "train.beton")
        assert images[4][1:3] == (size, size)


def test_labels_are_places_among_the_sorted_classes(own, tmp_path):
    shutil.rmtree(own / "val" / CLASSES[1])  # a class need not be evaluated
    (own / "train" / "a class").mkdir()
    (own / "train" / "a class" / "é.PNG").write_bytes(encoded(Image.new("RGB", (9, 9))))
    out = written(own, tmp_path / "out")
    assert description(out)["classes"] == ["a class", *CLASSES]
    labels = [[image[-1] for image in stored(out / f"{part}.beton")] for part in ("train", "val")]
    assert labels == [[0] + [1] * 4 + [2] * 4 + [3] * 4, [1, 1, 3, 3]]


def test_links_and_subfolders_are_followed_and_other_files_ignored(own):
    place = own / "train" / CLASSES[2]
    place.rename(own / "elsewhere")
    place.symlink_to(own / "elsewhere")
    (place / "b").mkdir()
    for name in ("b/2.png", "b/1.webp", "z.BMP"):
        (place / name).touch()
    (place / ".hidden").mkdir()
    (own / "val" / ".git").mkdir()
    for name in (".DS_Store", "._a.JPEG", "notes.txt", "b/._1.png", ".hidden/1.png"):
        (place / name).touch()
    (own / "train" / "list.txt").touch()
    names = [name for name in imagefolder.find(own).train.names if CLASSES[2] in name]
    assert [Path(name).name for name in names[:4]] == [
        path.name for path in sorted((own / "elsewhere").glob("n*.JPEG"))
    ]
    assert [name.removeprefix(f"train/{CLASSES[2]}/") for name in names[4:]] == [
        "z.BMP", "b/1.webp", "b/2.png",
    ]  # fmt: skip


def photograph():
    return Image.open(BytesIO(jpegs((100, 130))[0]))


def turned():
    """The camera says that it was held on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(), "JPEG", exif=exif, quality=95)


KINDS = {
    "CMYK": lambda: encoded(photograph().convert("CMYK"), "JPEG", quality=95),
    "PNG": lambda: encoded(photograph()),
    "grey": lambda: encoded(photograph().convert("L"), "JPEG"),
    "grey PNG with transparency": lambda: encoded(photograph().convert("LA")),
    "transparency": lambda: encoded(photograph().convert("RGBA")),
    "palette": lambda: encoded(photograph().quantize(17)),
    "two colours": lambda: encoded(photograph().convert("1")),
    "turned": turned,
    "progressive": lambda: encoded(photograph(), "JPEG", progressive=True),
    "BMP": lambda: encoded(photograph(), "BMP"),
    "TIFF": lambda: encoded(photograph(), "TIFF"),
    "WEBP": lambda: encoded(photograph(), "WEBP"),
    "bytes after the end": lambda: jpegs((100, 130))[3] + b"more" * 99,
}


def test_every_kind_of_image_is_read_as_pillow_converts_it(own, tmp_path):
    """ImageNet has photographs in CMYK and a PNG, all named .JPEG."""
    for number, make in enumerate(KINDS.values()):
        add(own, make(), f"x{number:02}.JPEG")
    out = written(own, tmp_path / "out", "--mode", "raw")
    found = pixels(out / "train.beton")[4 : 4 + len(KINDS)]
    for image, name, make in zip(found, KINDS, KINDS.values(), strict=True):
        expected = np.asarray(Image.open(BytesIO(make())).convert("RGB"))
        assert image.shape == expected.shape and (image == expected).all(), name


def test_sixteen_bits_become_eight():
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    image = imagefolder.decoded(encoded(Image.fromarray(levels)))
    assert image.shape == (256, 256, 3) and (image == np.arange(256)[:, None, None]).all()
    with pytest.raises(ValueError, match="mode F"):
        imagefolder.decoded(encoded(Image.new("F", (9, 9)), "TIFF"))


def with_extraneous_bytes(content):
    """Behind the first segment, where the decoder expects a marker and warns."""
    end = 4 + int.from_bytes(content[4:6])
    return content[:end] + b"\0\1\2\3" + content[end:]


def turbo_jpeg(content, height, width):
    """The status of the decoder that training uses; not zero for a warning too."""
    source, target = np.frombuffer(content, np.uint8), np.empty((height, width, 3), np.uint8)
    return ctypes_imdecode(
        source.ctypes.data, source.size, height, width, target.ctypes.data, height, width,
        0, 0, 1, 1, False, False,
    )  # fmt: skip


def test_a_jpeg_that_the_decoder_warns_of_is_stored_without_what_it_warns_of(own, tmp_path):
    odd = with_extraneous_bytes(jpegs((100, 130))[0])
    assert turbo_jpeg(odd, 100, 130) != 0
    add(own, odd)
    out = written(own, tmp_path / "out", "--mode", "jpg")
    for _, height, width, content, _ in stored(out / "train.beton"):
        assert turbo_jpeg(content, height, width) == 0
    [_] = train_data(out, total_batch=13).epoch(0)


def train_data(out, total_batch):
    return TrainData(
        out / "train.beton", total_batch=total_batch, physical_batch=total_batch, rank=0,
        world_size=1, seed=0, resolution=32,
    )  # fmt: skip


def test_the_loaders_read_it(tree, tmp_path):
    out = written(tree, tmp_path)
    data = train_data(out, total_batch=6)
    batches = list(data.epoch(0))
    assert data.dataset.classes == CLASSES and len(batches) == 2
    labels = [label for _, labels in batches for label in labels.tolist()]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    val = ValData(out / "val.beton", rank=0, world_size=1, batch=4, resolution=32)
    labels = [label for _, labels in val for label in labels.tolist()]
    assert labels == [0, 0, 1, 1, 2, 2]


def test_statistics_can_be_measured(tree, tmp_path):
    flags = ("--statistics", "measured", "--mode", "raw", "--max-size", 64)
    out = written(tree, tmp_path, *flags)
    levels = np.concatenate([image.reshape(-1, 3) for image in pixels(out / "train.beton")]) / 255
    assert np.allclose(description(out)["mean"], levels.mean(0), atol=1e-6)
    assert np.allclose(description(out)["std"], levels.std(0), atol=1e-6)


def damage(tree):
    """Break images in several ways: their names, and a piece of what is to be said of each."""
    train, val = files(tree, "train"), files(tree, "val")
    train[0].write_bytes(b"")
    train[3].write_bytes(train[3].read_bytes()[:-2000])
    train[7].write_text("<html>404</html>\n")
    train[8].unlink()
    train[8].symlink_to("nowhere")
    val[5].write_bytes(encoded(Image.new("P", (9, 9)), "GIF"))
    reasons = ["empty", "truncated", "not an image", "No such file", "not an image"]
    return dict(zip([*train[:1], train[3], *train[7:9], val[5]], reasons, strict=True))


def test_all_broken_files_are_named_and_nothing_is_written(own, tmp_path, capfd):
    broken, out = damage(own), tmp_path / "out"
    assert run(own, out) == 2
    message = capfd.readouterr().err[: -len("\n")].rpartition("python -m data.write: ")[2]
    first, *lines = message.split("\n")
    assert first.startswith("5 of 18 images are broken") and "--skip-broken" in first
    assert len(lines) == len(broken)
    for line, (path, reason) in zip(lines, broken.items(), strict=True):
        assert str(path) in line and reason in line
    assert not list(out.iterdir())


def test_twenty_broken_files_are_named_and_the_others_counted():
    broken = {f"train/{number}.JPEG": "empty" for number in range(123)}
    lines = str(write._broken(Path("tree"), broken, 1000)).split("\n")
    assert len(lines) == 22 and "123 of 1000" in lines[0] and "and 103 more" in lines[-1]


def test_broken_files_can_be_left_out(own, tmp_path, capfd):
    whole = written(own, tmp_path / "whole")
    broken, out = damage(own), tmp_path / "out"
    assert run(own, out, "--skip-broken") == 0
    assert "without 5 broken images" in capfd.readouterr().out
    names = [str(path.relative_to(own)) for path in broken]
    assert description(out)["skipped"] == names and "skipped" not in description(whole)
    for part, images in (("train", 8), ("val", 5)):
        kept = [path not in broken for path in files(own, part)]
        expected = itertools.compress(stored(whole / f"{part}.beton"), kept)
        assert stored(out / f"{part}.beton") == list(expected)
        assert description(out)["files"][f"{part}.beton"]["images"] == images
    [_] = train_data(out, total_batch=8).epoch(0)

    assert run(own, out, "--skip-broken") == 0
    assert "nothing to do, without 5 broken" in capfd.readouterr().out
    assert run(own, out) == 2
    assert "--force" in one_line(capfd.readouterr().err)


def test_at_least_one_image_has_to_be_left(own, tmp_path, capfd):
    for path in files(own, "val"):
        path.write_bytes(b"")
    assert run(own, tmp_path / "out", "--skip-broken") == 2
    assert "no image is left" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def flat_val(tree):
    for path in files(tree, "val"):
        path.rename(tree / "val" / path.name)
        if not list(path.parent.iterdir()):
            path.parent.rmdir()
    return "val has images outside of class folders, like ILSVRC2012_val_00000013.JPEG; expected"


def half_sorted_val(tree):
    path = files(tree, "val")[3]
    path.rename(tree / "val" / path.name)
    return f"val has images outside of class folders, like {path.name}; expected"


def unknown_class(tree):
    (tree / "val" / CLASSES[1]).rename(tree / "val" / "n99999999")
    return "val has classes that aren't in train: n99999999"


def empty_class(tree):
    (tree / "train" / "n00000001").mkdir()
    return "n00000001 holds no image"


def class_without_images(tree):
    for path in (tree / "val" / CLASSES[2]).iterdir():
        path.rename(path.with_suffix(".txt"))
    return f"{CLASSES[2]} holds no image"


def archives(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    (tree / "train" / "n01440764.tar").touch()
    return "train has no class folders; expected"


def no_val(tree):
    shutil.rmtree(tree / "val")
    return "val: No such file or directory; expected"


def no_tree(tree):
    shutil.rmtree(tree)
    return "train: No such file or directory; expected"


def a_file(tree):
    shutil.rmtree(tree)
    tree.touch()
    return "train: Not a directory; expected"


def a_circle(tree):
    (tree / "train" / CLASSES[0] / "again").symlink_to("..")
    return "is a link to a folder that is listed already"


LAYOUTS = [
    flat_val, half_sorted_val, unknown_class, empty_class, class_without_images, archives, no_val,
    no_tree, a_file, a_circle,
]  # fmt: skip


@pytest.mark.parametrize("change", LAYOUTS)
def test_a_tree_of_another_layout_is_one_line(own, tmp_path, capfd, change):
    expected = change(own)
    assert run(own, tmp_path / "out") == 2
    message = one_line(capfd.readouterr().err)
    assert str(own) in message and expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-size", 0), ("--max-size", 4097), ("--quality", 0), ("--quality", 101),
        ("--jpeg-share", 1.5), ("--jpeg-share", -0.1), ("--jpeg-share", "nan"), ("--workers", 0),
        ("--jpeg-share", 0.5, "--mode", "raw"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_one_line(tree, tmp_path, capfd, flags):
    assert run(tree, tmp_path / "out", *flags) == 2
    one_line(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_writing_again_does_nothing_wherever_the_tree_lies(own, tmp_path, capfd):
    out = written(own, tmp_path / "out")
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    assert sorted(before) == ["dataset.json", "train.beton", "val.beton"]
    moved = own.rename(tmp_path / "moved")
    capfd.readouterr()
    assert run(moved, out, "--workers", 1) == 0
    assert "nothing to do" in capfd.readouterr().out
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before
    assert str(tmp_path) not in (out / "dataset.json").read_text()


def test_other_settings_or_another_tree_are_not_written_over(own, tmp_path, capfd):
    out = written(own, tmp_path / "out", "--mode", "raw", "--max-size", 64)
    capfd.readouterr()
    for flags in ((), ("--mode", "raw"), ("--mode", "jpg", "--max-size", 64)):
        assert run(own, out, *flags) == 2
        assert "--force" in one_line(capfd.readouterr().err)
    files(own, "val")[0].write_bytes(jpegs((100, 130))[30])
    assert run(own, out, "--mode", "raw", "--max-size", 64) == 2
    assert "--force" in one_line(capfd.readouterr().err)
    assert run(own, out, "--force") == 0


def test_a_worker_that_dies_is_one_line(tree, tmp_path, capfd, monkeypatch):
    out = written(tree, tmp_path, "--max-size", 64)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(imagefolder, "decoded", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    capfd.readouterr()
    assert run(tree, out, "--force") == 2
    assert "a worker process died" in capfd.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_full_disk_is_one_line(tree, tmp_path, capfd):
    """A file that may not grow is as near as a test gets to a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 * 2**20, limits[1]))
    try:
        assert run(tree, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write to {tmp_path / 'out'}: File too large" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def slow(arguments, errors):
    """The command in a process group of its own, at fifty images per second."""
    os.setsid()
    sys.stderr = errors.open("w")
    quick = imagefolder.decoded
    imagefolder.decoded = lambda content: time.sleep(0.04) or quick(content)
    sys.exit(write.main(arguments))


@pytest.fixture
def started(own, tmp_path):
    """A run that takes seconds, in the middle of writing, and its workers."""
    for number in range(200):
        add(own, jpegs((100, 130))[number % 40], f"more{number}.JPEG")
    arguments = ["imagefolder", "--folder", own, "--out", tmp_path / "out", "--workers", 2]
    command = ([str(argument) for argument in arguments], tmp_path / "errors")
    process = get_context("fork").Process(target=slow, args=command)
    process.start()
    while len(workers := workers_of(process.pid)) < 2:
        time.sleep(0.02)
    time.sleep(0.5)
    yield process, workers
    process.kill()
    process.join()


def workers_of(pid):
    """Its child processes, without the one that multiprocessing cleans up with."""
    children = psutil.Process(pid).children()
    return [child for child in children if "resource_tracker" not in str(child.cmdline())]


def test_an_interrupted_run_leaves_nothing(started, tmp_path):
    process, workers = started
    assert [path.name[:13] for path in (tmp_path / "out").iterdir()] == [".train.beton."]
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.join(timeout=20)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "python -m data.write: interrupted"
    assert not list((tmp_path / "out").iterdir())
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_workers_end_with_a_run_that_is_killed(started):
    process, workers = started
    process.kill()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_source_that_fails_leaves_no_worker(tree):
    before = workers_of(os.getpid())
    storage = imagefolder.Storage(64, 90, 0.5)
    images = iter(imagefolder.Images(imagefolder.find(tree).train, storage, workers=2))
    next(images)
    assert len(workers_of(os.getpid())) == len(before) + 2
    images.close()
    assert workers_of(os.getpid()) == before


def test_a_link_to_the_folder_itself_is_told(own):
    (own / "train" / CLASSES[0] / "again").symlink_to(own / "train" / CLASSES[0])
    with pytest.raises(DataError, match="listed already"):
        imagefolder.find(own)


def test_a_tree_may_have_many_classes(tmp_path):
    names = make_tree(tmp_path, classes=1000, train=1, val=1, size=(40, 50))
    tree = imagefolder.find(tmp_path)
    assert tree.classes == names == sorted(names)
    assert tree.train.labels.tolist() == tree.val.labels.tolist() == list(range(1000))
