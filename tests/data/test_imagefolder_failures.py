"""data.imagefolder: broken images are named, files are not written over, and all ends in order."""

import itertools
import os
import resource
import signal
import sys
import time
from multiprocessing import get_context

import psutil
import pytest
from PIL import Image

from data import imagefolder, write
from tests.support.patience import PATIENCE
from tests.support.photographs import jpegs

from .trees import add, description, encoded, files, one_line, run, stored, train_data, written

pytestmark = pytest.mark.slow  # its workers are processes


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


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_named_and_not_read(own, tmp_path, capfd):
    """Reading one would wait for ever, or until memory is gone."""
    train = files(own, "train")
    for path in train[:4]:
        path.unlink()
    os.mkfifo(train[0])
    train[1].symlink_to("/dev/zero")
    train[2].symlink_to(train[0])
    with train[3].open("wb") as file:
        file.truncate(2**40)
    reasons = ["a FIFO", "a device", "a FIFO", "larger than"]
    assert run(own, tmp_path / "out") == 2
    first, *lines = capfd.readouterr().err.rpartition("data.write: ")[2].splitlines()
    assert first.startswith("4 of 18 images are broken")
    for path, reason, line in zip(train[:4], reasons, lines, strict=True):
        assert str(path) in line and reason in line
    assert not list((tmp_path / "out").iterdir())


def test_links_to_images_are_followed(own, tmp_path):
    whole = written(own, tmp_path / "whole")
    path = files(own, "train")[0]
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    out = written(own, tmp_path / "out")
    assert (out / "train.beton").read_bytes() == (whole / "train.beton").read_bytes()


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
        assert process.is_alive(), (tmp_path / "errors").read_text()
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
    drafts = sorted(path.name[:13] for path in (tmp_path / "out").iterdir())
    assert drafts == [".dataset.json", ".train.beton."]
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    process.join(PATIENCE)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 130 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "python -m data.write: interrupted"
    assert not list((tmp_path / "out").iterdir())
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]


def test_workers_end_with_a_run_that_is_killed(started):
    process, workers = started
    process.kill()
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]


def test_a_source_that_fails_leaves_no_worker(tree):
    before = set(workers_of(os.getpid()))
    storage = imagefolder.Storage(64, 90, 0.5)
    images = iter(imagefolder.Images(imagefolder.find(tree).train, storage, workers=2))
    next(images)
    assert len(set(workers_of(os.getpid())) - before) == 2
    images.close()
    assert not set(workers_of(os.getpid())) - before
