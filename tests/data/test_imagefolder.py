"""data.imagefolder: a tree of photographs becomes .beton files, as FFCV would write them."""

import hashlib
import shutil
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from data import imagefolder
from data.ffcv_parts import JPEG, RAW, RGBImageField, ctypes_imdecode
from data.loaders import ValData
from tests.support.photographs import jpegs

from .trees import (
    CLASSES,
    add,
    description,
    encoded,
    files,
    pixels,
    stored,
    train_data,
    written,
)

pytestmark = pytest.mark.slow  # its workers are processes


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
