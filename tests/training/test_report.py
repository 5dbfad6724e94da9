"""The report: what it says was recorded, it needs nothing else, and it is whole or absent."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.patience import PATIENCE
from tests.support.program import ROOT
from training.report import charts, draw
from training.report.command import PAGE, main
from training.report.page import page as page_of
from training.report.runs import read

VIT = {
    "model": "simplevit-digits", "data": "digits", "optimizer": "localadamw", "sync": "average",
    "period": "qsr", "alpha": 0.006, "h_base": 4, "seed": 0, "log_pth": "runs",
}  # fmt: skip
EPOCH = 40  # steps


def train(step: int, **told: Any) -> dict[str, Any]:
    own = {"loss": 2 / step, "accuracy": 1 - 1 / step, "lr": 0.003, "h": 4 if step < 60 else 20}
    return {"kind": "train", "step": step, "epoch": step / EPOCH, **own, **cost(step), **told}


def val(step: int, **told: Any) -> dict[str, Any]:
    own = {"eval_seconds": 0.5, "top1": 0.9, "top5": 1.0, "loss": 0.25, "images": 359, "h": 4}
    return {"kind": "val", "step": step, "epoch": step / EPOCH, **own, **cost(step), **told}


def cost(step: int) -> dict[str, float]:
    return {
        "syncs": step // 4, "bytes": 1_000_000 * (step // 4), "exposed_seconds": 0.01 * step,
        "hidden_seconds": 0.0, "seconds": 0.1 * step,
    }  # fmt: skip


def summary(step: int, **told: Any) -> dict[str, Any]:
    own = {
        "replicas": 2, "top1": 0.9, "top5": 1.0, "loss": 0.25, "images": 359, "share": 0.25,
        "other_bytes": 0, "wait": [0.1, 0.2], "train_seconds": 7.0, "images_per_second": 1234.5,
    }  # fmt: skip
    return {"kind": "summary", "step": step, **cost(step), **own, **told}


def whole(epochs: int = 2, **told: Any) -> list[dict[str, Any]]:
    """The records of a run that has ended."""
    records = []
    for epoch in range(1, epochs + 1):
        end = epoch * EPOCH
        records += [train(end - 20), train(end), val(end, top1=1 - 0.2 / epoch)]
    return [*records, summary(epochs * EPOCH, top1=1 - 0.2 / epochs, **told)]


def run(
    folder: Path, records: list[dict[str, Any]] | str, settings: dict[str, Any] | None = VIT
) -> Path:
    """A run's folder; without ``settings`` there is metrics.jsonl alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(records, str):
        records = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(records)
    if settings is not None:
        (folder / "config.yml").write_text(yaml.safe_dump(settings))
    return folder


def near(*points: tuple[float, float]) -> list[Any]:
    return [pytest.approx(point) for point in points]


class Page(HTMLParser):
    """What is on a page.

    Attributes:
        cells: the table's, a row each.
        tags: how often each occurs, those of the charts included.
        ids, links: what is named, and what is asked for.
        alt: the charts in words.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[list[str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.alt: list[str] = []
        self.opened: list[str] = []
        self._cell = False
        self.feed(text)
        assert self.opened == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        if tag not in ("meta", "br"):
            self.opened.append(tag)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]
        self.alt += [told["aria-label"] or ""] if told.get("role") == "img" else []
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self._cell = True
        elif tag in ("span", "br") and self._cell:
            self.cells[-1][-1] += "|" if tag == "span" else ", "

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "br"):
            assert self.opened.pop() == tag
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1][-1] += data.replace("\u00a0", " ")

    @property
    def rows(self) -> list[dict[str, str]]:
        head, *rows = self.cells
        return [dict(zip(head, row, strict=True)) for row in rows]


def reported(out: Path, *runs: Path) -> Page:
    assert main([*map(str, runs), "--out", str(out)]) == 0
    return Page((out / PAGE).read_text())


def rows(*runs: Path) -> list[dict[str, str]]:
    """The table alone, which takes no time to draw."""
    return Page(page_of(read(runs), [])).rows


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert told.out == ""
    return line


def test_the_table_says_what_was_recorded(tmp_path: Path) -> None:
    assert rows(run(tmp_path / "first", whole())) == [
        {
            "run": "LocalAdamW, QSR|simplevit-digits on digits, 2 replicas|first",
            "rule": "average", "period": "QSR, α 0.006, H ≥ 4", "H": "4–20",
            "accuracy, %": "90.00", "steps": "80", "syncs": "20", "share, %": "25.0",
            "sent, MB": "20.0", "exposed, s": "0.8", "images/s": "1,234", "training, s": "7.0",
        }
    ]  # fmt: skip


def test_a_run_of_before_is_read(tmp_path: Path) -> None:
    """Exposed seconds were called blocked seconds."""
    folder = run(tmp_path / "first", whole())
    for file in folder.iterdir():
        if file.suffix in (".json", ".jsonl"):
            file.write_text(file.read_text().replace("exposed_seconds", "blocked_seconds"))
    assert rows(folder)[0]["exposed, s"] == "0.8"


def test_the_curves_are_what_was_recorded(tmp_path: Path) -> None:
    """In the units of their axes; seconds leave evaluation out, as the summary does."""
    runs = read([run(tmp_path / "first", whole())])
    drawn = {chart.name: chart for s in charts.sections(runs) for chart in s.charts}
    assert drawn["accuracy-epochs"].curves[-1].points == near((1, 80), (2, 90))
    assert drawn["accuracy-bytes"].curves[0].points == near((10, 80), (20, 90))
    assert drawn["loss-seconds"].curves[0].points == near((3.5, 0.25), (7, 0.25))
    assert drawn["accuracy-seconds"].x.label == "training time, s"
    assert drawn["h"].curves[0].points[0] == (20, 4)
    assert drawn["sent"].curves[0].points[-1:] == near((80, 20))
    assert drawn["exposed"].y.label == "time, s"
    assert not drawn["drift"].curves and "--track-replicas" in drawn["drift"].note
    assert not drawn["hidden"].curves
    words = charts.described(drawn["accuracy-epochs"], runs)
    assert words.endswith("LocalAdamW, QSR: 80 % at epoch 1, 90 % at 2.")


def test_large_runs_have_large_units(tmp_path: Path) -> None:
    records = [val(40, bytes=4e10, seconds=4e4), val(80, bytes=8e10, seconds=9e4)]
    drawn = charts.sections(read([run(tmp_path / "first", records)]))[0].charts
    told = ["epoch", "sent per replica, GB", "training time, h"]
    assert [chart.x.label for chart in drawn] == 2 * told
    assert drawn[1].curves[0].points[-1][0] == pytest.approx(80)


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    """No address, no script, no file; what its charts refer to is in them, under one name."""
    out = tmp_path / "out"
    page = reported(out, run(tmp_path / "a", whole()), run(tmp_path / "b", whole(), None))
    text = (out / PAGE).read_text()
    assert "//" not in text and "@import" not in text and "<script" not in text
    assert len(page.ids) == len(set(page.ids)) and page.links
    for link in [*page.links, *re.findall(r"url\((.*?)\)", text)]:
        assert link.startswith("#") and link[1:] in page.ids
    assert "#0001" not in text and "#0002" not in text, "colours are the page's"
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", text))
    drawn = sorted(path.name for path in out.iterdir())
    assert len(drawn) == len(page.alt) + 1
    for name in drawn:
        if name != PAGE:
            assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", whole()), run(tmp_path / "b", whole(3))]
    first, again = tmp_path / "first", tmp_path / "again"
    reported(first, *runs)
    reported(again, *runs)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }


def test_runs_side_by_side(tmp_path: Path) -> None:
    """A data-parallel twin; drift and hidden time where they were recorded; a run's own colour."""
    met = [
        {"kind": "sync", "step": s, "begun_at": s - 4, "epoch": 1, "h": 4, "drift": 0.1 * s}
        for s in (8, 12)
    ]
    overlapped = [train(4), *met, train(20, drift=9.0), summary(80, hidden_seconds=3.25)]
    twin = {**VIT, "optimizer": "adamw"}
    over = {**VIT, "sync": "overlap", "period": "constant", "sync_settings": {"alpha": 0.6}}
    runs = [
        run(tmp_path / "local", whole()),
        run(tmp_path / "twin", [train(20, h=1), val(40, h=1), summary(40, share=1.0)], twin),
        run(tmp_path / "over", overlapped, over),
    ]
    table = rows(*runs)
    told = [{key: row[key] for key in ("rule", "period", "H", "hidden, s")} for row in table]
    assert told[1:] == [
        {"rule": "data-parallel", "period": "every step", "H": "1", "hidden, s": "0.0"},
        {"rule": "overlap, alpha 0.6", "period": "H = 4", "H": "4", "hidden, s": "3.2"},
    ]
    labels = [row["run"].split("|")[0] for row in table]
    assert labels == ["LocalAdamW, QSR", "data-parallel AdamW", "LocalAdamW, overlap, H = 4"]
    drawn = {c.name: c for s in charts.sections(read(runs)) for c in s.charts}
    assert [(c.run, c.points) for c in drawn["drift"].curves] == [
        (2, [(4, pytest.approx(0.8)), (8, pytest.approx(1.2))])
    ]
    assert [curve.run for curve in drawn["h"].curves] == [0, 1, 2]
    assert "var(--run-2)" in draw.svg(drawn["drift"])
    assert "var(--run-0)" not in draw.svg(drawn["drift"])


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    (row,) = rows(run(tmp_path / "digits-1", whole(), None))
    assert row["run"] == "digits-1|2 replicas"
    assert row["rule"] == row["period"] == "–" and row["H"] == "4–20"
    (tmp_path / "digits-1" / "config.yml").write_text("optimizer: [unclosed")
    (broken,) = rows(tmp_path / "digits-1")
    assert broken["run"].startswith(f"{row['run']}|config.yml left out: not valid YAML in line 1")
    assert broken | {"run": row["run"]} == row


DEEP = "[" * 5_000 + "]" * 5_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in itertools.pairwise("abcdefghi")
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"{BOMB}model: *i\n", "alias *a"),
        (f"model: {DEEP}\n", "not valid YAML"),
        (f"model: {'[' * 90}{']' * 90}\ndata: digits\noptimizer: {{a: [1]}}\n", ""),
        ("model: !!bool x\n", "not valid YAML"),
        ("model: 2020-13-45\n", "not valid YAML"),
        (f"alpha: {'1' * 5_000}\n", "not valid YAML"),
        (f"alpha: {'1' * 400}\nh_base: 1e999\noptimizer: localsgd\nperiod: qsr\n", ""),
        ("model: 1\nmodel: 2\n", "twice"),
        ("text\n", "no `key: value` lines"),
        ('model: "\\ud800"\ndata: "a\\0b\\nc"\noptimizer: "\\udfff"\n', ""),
        (f"model: {'x' * 9_999}\ndata: y\noptimizer: {'z' * 9_999}\n", ""),
    ],
    ids=[
        "bomb", "deep", "nested", "tag", "date", "integer", "large", "twice", "text", "surrogates",
        "long",
    ],
)  # fmt: skip
def test_a_hostile_config(tmp_path: Path, content: str, told: str) -> None:
    """It is shown as far as it can be, and otherwise left out with a note."""
    folder = run(tmp_path / "first", whole())
    (folder / "config.yml").write_text(content)
    (row,) = rows(folder)
    note = row["run"].split("|")[-1]
    assert note.startswith("config.yml left out: ") == bool(told) and told in note
    assert row["accuracy, %"] == "90.00" and all(len(cell) < 1300 for cell in row.values())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", ["1e308", "1e39", "-1e39", "1e-308", "9" * 400])
def test_hostile_numbers(tmp_path: Path, number: str) -> None:
    """Those that no run could record are taken for none."""
    text = json.dumps(val(80, drift=1))
    for key in ("step", "epoch", "loss", "top1", "h", "syncs", "bytes", "seconds", "drift"):
        text += "\n" + re.sub(rf'"{key}": [\d.]+', f'"{key}": {number}', json.dumps(val(40)))
        text += "\n" + re.sub(rf'"{key}": [\d.]+', f'"{key}": {number}', json.dumps(train(60)))
    text += "\n" + re.sub(r'(?<!"step"): [\d.]+', f": {number}", json.dumps(summary(80)))
    folder = run(tmp_path / "first", f"{text}\n", None)
    page = Page(page_of(read([folder]), charts.sections(read([folder]))))
    assert len(page.rows) == 1 and not re.search(r"\b(nan|inf)\b", str(page.rows))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "device", "deep", "surrogates", "large"])
@pytest.mark.parametrize("name", ["config.yml", "summary.json", "preempted", "metrics.jsonl"])
def test_hostile_files(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """None is waited for, or read without an end; without metrics there is no report."""
    folder = run(tmp_path / "first", whole()[:-1])
    file, before = folder / name, (folder / "metrics.jsonl").read_text()
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "large":
        with file.open("w") as sparse:
            sparse.truncate(2**40)
    else:
        value = '"\\ud800"' if kind == "surrogates" else DEEP
        line = f'{{"kind": {value}, "step": 3, "reason": {value}, "top1": {value}}}\n'
        file.write_text(line + before if name == "metrics.jsonl" else line)
    if name == "metrics.jsonl" and kind in ("fifo", "device", "large"):
        line = refused(capsys, folder, "--out", tmp_path / "out")
        assert str(folder) in line and not (tmp_path / "out").exists()
    else:
        (row,) = rows(folder)
        assert row["steps"] == ("3" if name == "summary.json" and kind == "surrogates" else "80")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Told by a process, whose output has an encoding."""
    folder = run(tmp_path / os.fsdecode(b"run-\xff"), whole()[:2], None)
    (folder / "config.yml").write_text('model: "\\ud800"\ndata: "\\ud800"\noptimizer: "\\udfff"\n')
    (folder / "preempted").write_text('{"reason": "\\ud800"}')
    command = [sys.executable, "-m", "training.report", folder]
    ended = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"run-" in ended.stdout and (folder / "report" / PAGE).is_file()


@pytest.mark.parametrize(
    "records",
    [
        whole(1),
        [train(1)],
        [val(40)],
        [{"kind": "train", "step": 20}],
        [train(20, loss=None, h=None), val(40, top1=None, bytes=None, seconds=None)],
        [val(40, bytes=0), val(80, bytes=0)],
        [val(40, drift=0.0, h=0)],
        [train(20, lr="fast", accuracy=True)],
    ],
    ids=["epoch", "step", "evaluation", "bare", "nulls", "one replica", "zeros", "odd"],
)
def test_what_is_missing_is_left_out(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    runs = read([run(tmp_path / "first", records)])
    page = Page(page_of(runs, charts.sections(runs)))
    assert len(page.rows) == 1
    text = " ".join([*page.alt, *page.rows[0].values()])
    assert not re.search(r"\b(nan|None|inf)\b", text)


def test_a_run_without_its_end(tmp_path: Path) -> None:
    """Stopped, diverged, killed or still training: it says so, and shows what there is."""
    folder = tmp_path / "first"
    (row,) = rows(run(folder, [train(20), val(40), train(60)]))
    assert row["run"].endswith("|not finished: step 60")
    assert row["steps"] == "60" and row["accuracy, %"] == "90.00"
    assert row["training, s"] == "5.5" and row["share, %"] == "25.0" and row["images/s"] == "–"
    (folder / "preempted").write_text('{"step": 61, "reason": "SIGTERM on rank 1"}\n')
    (row,) = rows(folder)
    assert row["run"].endswith("|stopped at step 61: SIGTERM on rank 1")
    (row,) = rows(run(tmp_path / "other", [train(20), train(40, loss=None)]))
    assert row["run"].endswith("|diverged by step 40")


def test_damaged_lines(tmp_path: Path) -> None:
    """A last line that is being written is no fault; others are counted."""
    good = [json.dumps(train(20)), json.dumps(val(40))]
    text = "\n".join([*good, '{"kind": "train", "step": 60, "lo'])
    (row,) = rows(run(tmp_path / "first", text))
    assert row["steps"] == "40" and "damaged" not in row["run"]
    text = "\n".join([good[0], "", "\0\0\0", "[1]", '{"kind": "val"}', good[1], ""])
    (row,) = rows(run(tmp_path / "first", text))
    assert row["steps"] == "40" and row["run"].endswith("|3 damaged lines left out")
    text = '{"kind": "train", "step": 20, "loss": NaN, "lr": Infinity, "epoch": 1e999}\n'
    assert read([run(tmp_path / "nan", text)])[0].last("loss") is None


def test_steps_that_were_gone_back_on(tmp_path: Path) -> None:
    """What a resumed run tells once more stands."""
    records = [train(20), train(40, loss=7.0), train(60, loss=8.0), train(40), train(60), val(80)]
    (told,) = read([run(tmp_path / "first", records)])
    points = told.points(("train",), "step", "loss")
    assert points == [(20, 0.1), (40, 0.05), (60, pytest.approx(2 / 60))]
    assert not any(math.isnan(y) for _, y in points)


def test_names(tmp_path: Path) -> None:
    """Once each, however often given; apart by what differs, or by number."""
    first = run(tmp_path / "x" / "same", whole())
    same = run(tmp_path / "y" / "same", whole())
    seed = run(tmp_path / "seed", whole(), {**VIT, "seed": 1})
    table = rows(first, first, same, first.parent / ".." / "x" / "same")
    labels = [row["run"].split("|") for row in table]
    assert [label[0] for label in labels] == ["LocalAdamW, QSR (1)", "LocalAdamW, QSR (2)"]
    assert [label[2] for label in labels] == ["x/same", "y/same"]
    table = rows(first, seed)
    assert [row["run"].split("|")[0] for row in table] == [
        "LocalAdamW, QSR, seed 0", "LocalAdamW, QSR, seed 1",
    ]  # fmt: skip


def test_names_are_text(tmp_path: Path) -> None:
    """What a name or a setting holds is shown, never obeyed: by the page, or by a PNG's legend."""
    name = "_<script>alert('$\\frac$')<& \"x\""
    odd = {**VIT, "model": "<img src=x>", "optimizer": "<b>", "sync": '"><i>'}
    page = reported(
        tmp_path / "out", run(tmp_path / name, whole(), None), run(tmp_path / "odd", whole(), odd)
    )
    text = (tmp_path / "out" / PAGE).read_text()
    assert not re.search(r"<(script|img|b|i)\b", text)
    assert page.rows[0]["run"].startswith(name) and "<img src=x>" in page.rows[1]["run"]
    assert any(name in alt for alt in page.alt)


def test_many_runs(tmp_path: Path) -> None:
    """More than there are colours: the second of a colour is dashed."""
    runs = [run(tmp_path / f"run-{at}", whole(), None) for at in range(len(draw.LIGHT) + 2)]
    page = reported(tmp_path / "out", *runs)
    assert len(page.rows) == len(runs)
    strokes = [(at % len(draw.LIGHT), draw.dashes(at)) for at in range(len(runs))]
    assert len(set(strokes)) == len(runs)
    assert "stroke-dasharray" in (tmp_path / "out" / PAGE).read_text()


def test_what_cannot_be_reported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out, empty = run(tmp_path / "good", whole()), tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    for folder, told in (
        (tmp_path / "nowhere", "no such folder"),
        (good / "metrics.jsonl", "no such folder"),
        (empty, "not a run's folder: it has no metrics.jsonl"),
        (run(tmp_path / "new", []), "nothing is recorded there yet"),
        (run(tmp_path / "noise", "noise\n"), "nothing is recorded there yet"),
    ):
        line = refused(capsys, good, folder, "--out", out)
        assert str(folder) in line and told in line
    assert "--sideways" in refused(capsys, good, "--sideways")
    assert "RUN" in refused(capsys, "--out", out)
    assert not out.exists()
    out.write_text("mine")
    assert f"{out}: cannot be written" in refused(capsys, good, "--out", out)
    assert out.read_text() == "mine"


def test_it_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older report stands until a new one is whole, and leaves nothing behind then."""
    good, out = run(tmp_path / "good", whole()), tmp_path / "out"
    over = [{**record, "hidden_seconds": 1.0} for record in whole()]
    reported(out, run(tmp_path / "over", over))
    (out / "mine.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "hidden.png" in before
    capsys.readouterr()

    def full(path: Path, content: bytes) -> int:
        if path.name == PAGE:
            raise OSError(28, "No space left on device")
        return plain(path, content)

    plain = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(capsys, good, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "No space left" in refused(capsys, good, "--out", tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()
    monkeypatch.undo()
    reported(out, good)
    assert {path.name for path in out.iterdir()} == set(before) - {"hidden.png"}


def test_other_files_of_its_names_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = run(tmp_path / "good", whole()), tmp_path / "out"
    for name in ("lr.png", PAGE):
        out.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        line = refused(capsys, good, "--out", out)
        assert f"{out / name} is there already" in line and "--force" in line
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "lr.png").write_text("mine")
    assert main([str(good), "--out", str(out), "--force"]) == 0
    reported(out, good)
    assert (out / "lr.png").read_bytes().startswith(b"\x89PNG")


def test_its_place_is_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run(tmp_path / "good", whole())
    assert main([str(good)]) == 0
    assert capsys.readouterr().out == f"{good / 'report' / PAGE}: 1 run\n"
    assert (good / "report" / PAGE).exists()


def test_the_axis_shows_the_last_tenths(tmp_path: Path) -> None:
    """Accuracies of 20, 60, … up to 98.9 and 99.1 %: the axis spans the second half."""
    tops = [0.2, 0.6, 0.9, 0.97, 0.985, 0.989, 0.991, 0.99]
    records = [val(EPOCH * n, top1=top1) for n, top1 in enumerate(tops, 1)]
    runs = read([run(tmp_path / "run", records)])
    drawn = {c.name: c for s in charts.sections(runs) for c in s.charts}
    low, high = drawn["accuracy-epochs"].bounds
    assert 96.5 < low < 97 and 99.1 < high < 99.4
    assert "second half" in drawn["accuracy-epochs"].note
    assert drawn["loss-epochs"].bounds is None
    few = read([run(tmp_path / "few", records[:3])])
    assert charts.sections(few)[0].charts[0].bounds is None, "too few to leave any out"


def test_why_training_does_worse_is_said(tmp_path: Path) -> None:
    hard = {**VIT, "label_smoothing": 0.1, "crop_scale": [0.8, 1.0], "flip": False}
    runs = read([run(tmp_path / "run", whole(), hard)])
    notes = {c.name: c.note for s in charts.sections(runs) for c in s.charts}
    assert "smoothed labels and crops: so they lie above" in notes["loss-epochs"]
    plain = read([run(tmp_path / "plain", whole(), VIT)])
    assert "harder" not in charts.sections(plain)[0].charts[3].note


def test_other_data_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(tmp_path / "a", whole()), run(tmp_path / "b", whole(), {**VIT, "data": "cifar10"})]
    reported(tmp_path / "out", *runs)
    line = "These runs are on different data (digits; cifar10): do not compare their figures."
    assert line in capsys.readouterr().err
    assert line in (tmp_path / "out" / "report.html").read_text()
    reported(tmp_path / "own", *runs[:1])
    assert "different data" not in (tmp_path / "own" / "report.html").read_text()
