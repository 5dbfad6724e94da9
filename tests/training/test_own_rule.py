"""A rule and a period of one's own, named by their import paths; and who else may not name one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from localopt.period import PERIODS
from localopt.sync import RULES
from tests.conftest import Once
from tests.support.patience import PATIENCE
from tests.support.program import ROOT, start
from tests.support.refusals import check, told
from training import export, named
from training.checkpoint import files as checkpoint
from training.config import Config
from training.optimizers import period, rule
from training.plan.plan import plan
from training.plan.report import report
from training.report.command import main as report_main
from training.settings import load

from .runs import SHORT, one_line, weights

# The parameters' halves in turn: half of the bytes, and H goes to and fro.
MINE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from localopt import EASGD, Average, Constant, Period, Rule, Sending
from localopt.flat import pull_


@dataclass(eq=False)
class Halves(Rule):
    """x_i ← x_i + pull (x̄ - x_i), of one half of the parameters a round."""

    agrees = False
    pull: float
    towards: Literal["mean"] = "mean"

    def sends(self, parameters: int, extra: int, itemsize: int) -> list[Sending]:
        return [Sending("all_reduce", parameters // 2 * itemsize)]

    def attach(self, replica: Any) -> None:
        super().attach(replica)
        self.mean = self.mean_of_copies(fragments=2)

    @torch.no_grad()
    def end_round(self) -> None:
        half = self.replica.round.number % 2
        self.mean.launch(fragment=half)
        mean = self.mean.land()
        pull_(self.mean.of(self.replica.flat.params, half), mean, self.pull)
        self.replicas_agree = False


@dataclass(eq=False)
class Hidden(Halves):
    overlaps = True


@dataclass(frozen=True)
class ToAndFro(Period):
    """H = h, and `high` at every odd step."""

    h: int
    high: int
    alpha: float = 0.5

    @property
    def base_h(self) -> int:
        return self.h

    def rounds(self, step: int, lr: float) -> int:
        return self.high if step % 2 else self.h


def gentle(strength: float = 0.1) -> EASGD:
    return EASGD(strength)


def threes(**common: int | None) -> Period:
    return Constant(3, **common)


def wrong() -> Rule:
    return 7


@dataclass(eq=False)
class Derived(Average):
    twice: "tuple[int, int]" = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.twice[0] > 5:
            raise TypeError("one\\nline")


class Unfinished(Rule):
    pass


class NoRounds(Period):
    base_h = 1


class Deaf(Period):
    def __init__(self, h: int) -> None:
        pass


class Endless(Constant):
    def __call__(self, step: int, lr: float) -> int:
        return 0


@dataclass(eq=False)
class Lost(Rule):
    what: Nowhere = 1

    def end_round(self) -> None: ...


@dataclass(eq=False)
class Odd(Halves):
    how: Any = "gather"

    def sends(self, parameters: int, beside: int, itemsize: int) -> list[Sending]:
        return [Sending(**self.how)] if isinstance(self.how, dict) else [Sending(self.how, 1)]


def unsaid():
    raise AssertionError("nobody may call it")


number = 3
'''
# Each run of it leaves a file beside it.
HOSTILE = """
from pathlib import Path

from localopt import Average, Constant

Path(__file__).with_name("imported").touch()


class Rule(Average):
    pass


class Period(Constant):
    pass
"""
BROKEN = {
    "raises": "x = 1\n1 / 0\n",
    "leaves": "raise SystemExit(3)\n",
    "misspelt": "def f(:\n",
    "needs": "import no_such_module_at_all\n",
    "shouts": "raise ValueError('a\\x1b\\n' + 'b' * 10_000)\n",
}
FLAGS = (
    "--sync", "own.mine:Halves", "--sync-settings", "pull=5e-1",
    "--period", "own.mine:ToAndFro", "--h-base", "1", "--period-settings", "high=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of modules that is on the path of this process and of those it starts."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "own").mkdir()
    (folder / "own/__init__.py").touch()
    (folder / "own/mine.py").write_text(MINE)
    (folder / "hostile.py").write_text(HOSTILE)
    for name, text in BROKEN.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield folder
        for name in ("own", "own.mine", "hostile"):
            sys.modules.pop(name, None)


def test_names_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--help"])
    shown = "".join(capsys.readouterr().out.split())
    for setting, names in {"sync": RULES, "period": PERIODS}.items():
        assert f"--{setting}{{{','.join(names)},module:Class}}" in shown
        line = told(load, [f"--{setting}", "avrage"])
        check([f"{setting} is 'avrage'", *names, "import path module:Class"], line)
        assert named.names(setting) == list(names)
        assert all(named.maker(setting, name) is names[name] for name in names)
    assert "did you mean 'average'" in told(load, ["--sync", "avrage"])


def test_an_unknown_name_is_an_error_without_a_use_for_it() -> None:
    parallel = ["--recipe-pth", "recipe/digits-vit-adamw.yml"]
    for flags in (["--sync", "avrage"], ["--period", "qsrr"], ["--sync", "a b:c"]):
        check([flags[0][2:], repr(flags[1])], told(load, [*parallel, *flags]))


SYNC = [
    ("own.mine:Halvs", ["own.mine has no Halvs", "Halves", "gentle"]),
    ("own.mine:number", ["no subclass of localopt.Rule"]),
    ("own.mine:unsaid", ["no subclass of localopt.Rule", "annotated"]),
    ("own.mine:ToAndFro", ["no subclass of localopt.Rule"]),
    ("os:system", ["no subclass of localopt.Rule"]),
    ("own.yours:Mine", ["no module own.yours", "PYTHONPATH"]),
    ("no_such_module:Mine", ["no module no_such_module"]),
    ("no_such_module.inside:Mine", ["no module no_such_module"]),
    ("own.mine.inside:Mine", ["no module own.mine.inside"]),
    ("raises:Mine", ["importing raises raised ZeroDivisionError", "raises.py, line 2"]),
    ("leaves:Mine", ["importing leaves raised SystemExit: 3", "leaves.py, line 1"]),
    ("misspelt:Mine", ["SyntaxError", "misspelt.py, line 1"]),
    ("needs:Mine", ["importing needs raised", "no_such_module_at_all", "needs.py, line 1"]),
    ("shouts:Mine", ["ValueError: 'a\\x1b b", "…"]),
    (":Mine", ["module:Class"]),
    ("own.mine:", ["module:Class"]),
    ("own/mine.py:Halves", ["module:Class"]),
    (".mine:Halves", ["module:Class"]),
    ("own.mine:Halves:x", ["module:Class"]),
    ("own.mine.Halves", ["must be one of average", "module:Class"]),
]


@pytest.mark.parametrize(("name", "parts"), SYNC, ids=[name for name, _ in SYNC])
def test_what_is_no_rule(modules: Path, name: str, parts: list[str]) -> None:
    check([f"sync is '{name}'", *parts], told(load, ["--sync", name]))


def test_what_is_no_period(modules: Path) -> None:
    check(
        ["period is", "no subclass of localopt.Period"], told(load, ["--period", "own.mine:gentle"])
    )


def wanted(**settings: Any) -> Config:
    return Config(**{"alpha": 1.0, **settings})


@pytest.mark.parametrize(
    ("make", "settings", "parts"),
    [
        (rule, {"sync": "own.mine:Halves"}, ["own.mine:Halves needs pull"]),
        (rule, {"sync": "own.mine:Halves", "sync_settings": {"pul": 1}}, ["has pull, towards"]),
        (rule, {"sync": "own.mine:Halves", "sync_settings": {"pull": "x"}}, ["a number"]),
        (
            rule,
            {"sync": "own.mine:Halves", "sync_settings": {"pull": 1, "towards": "men"}},
            ["it must be one of mean", "did you mean 'mean'"],
        ),
        (rule, {"sync": "own.mine:Derived", "sync_settings": {"twice": [1]}}, ["a list of 2"]),
        (rule, {"sync": "own.mine:Derived", "sync_settings": {"twice": [6, 1]}}, ["one line"]),
        (rule, {"sync": "own.mine:Unfinished"}, ["own.mine:Unfinished", "end_round"]),
        (rule, {"sync": "own.mine:Lost"}, ["own.mine:Lost", "'Nowhere' is not defined"]),
        (rule, {"sync": "own.mine:wrong"}, ["it made 7", "no Rule"]),
        (period, {"period": "own.mine:ToAndFro"}, ["needs high"]),
        (period, {"period": "own.mine:NoRounds"}, ["does not define rounds"]),
        (period, {"period": "own.mine:Deaf"}, ["total_steps and h_max and warmup_steps"]),
        (period, {"period": "constant", "period_settings": {"h": 3}}, ["set h_base instead"]),
        (period, {"period": "qsr", "period_settings": {"x": 3}}, ["period qsr has warmup_h"]),
        (period, {"period": "qsr", "period_settings": {"warmup_h": 0}}, ["warmup_h", "least 1"]),
        (period, {"period": "qsr", "period_settings": {"warmup_h": "x"}}, ["an integer"]),
    ],
)
def test_an_impossible_setting_is_named(
    modules: Path, make: Any, settings: dict[str, Any], parts: list[str]
) -> None:
    check(parts, told(lambda: make(wanted(**settings))))


def test_settings_are_those_of_the_thing(modules: Path) -> None:
    """Types too; what the program has a flag for comes from there, if it is given."""
    mine = period(wanted(period="own.mine:ToAndFro", h_base=7, period_settings={"high": 9}))
    assert (mine.h, mine.high, mine.alpha, str(mine)) == (
        7, 9, 1.0, "ToAndFro h = 7, high = 9, alpha = 1.0",
    )  # fmt: skip
    mine = period(wanted(period="own.mine:ToAndFro", alpha=0.0, period_settings={"high": 9}))
    assert mine.alpha == 0.5, "its own default"
    check(
        ["alpha is -1.0: period own.mine:ToAndFro needs a positive one"],
        told(lambda: wanted(period="own.mine:ToAndFro", alpha=-1.0)),
    )
    assert period(wanted(period="own.mine:threes")).h == 3
    assert period(wanted(period="qsr", period_settings={"warmup_h": "2"})).warmup_h == 2
    assert rule(wanted(sync="own.mine:gentle", sync_settings={"strength": "2e-1"})).alpha == 0.2
    derived = rule(wanted(sync="own.mine:Derived", sync_settings={"twice": ["1", 5]}))
    assert derived.twice == (1, 5) and derived.compress is None


def test_the_plan_asks_the_rule_and_the_period(modules: Path) -> None:
    flags = ["--plan", *FLAGS, "--warmup-epochs", "0", "--plan-nodes", "2", "--plan-gpus", "1"]
    made = plan(flags)
    own = made.scenarios[made.chosen]
    assert made.chosen.startswith("ToAndFro h = 1, high = 2")
    assert [h for _, h in own.rounds[:4]] == [1, 2, 2, 2] and own.first_longer == (1, 2)
    half = 4 * (made.parameters // 2)
    assert own.each.sent == own.each.link == half and not own.hides
    text = report(made)
    for part in ("own.mine:Halves pull=5e-1", f"{half / 1e6:.1f} MB each", f"> {made.chosen}"):
        assert part in text, text
    assert "behind the next round" not in text
    hidden = plan([*flags, "--sync", "own.mine:Hidden"])
    assert hidden.scenarios[hidden.chosen].hides
    assert "behind the next round" in report(hidden)


def test_a_plan_of_what_cannot_be(modules: Path) -> None:
    flags = ["--plan", *FLAGS, "--plan-nodes", "2", "--plan-gpus", "2", "--sync", "own.mine:Odd"]
    for how, part in {
        "gather": "how is 'gather': it must be one of all_reduce, broadcast, shards",
        "{how: shards, bytes: -1}": "bytes is -1",
        "{how: shards, bytes: 1, every: 0}": "every is 0",
        "{how: broadcast, bytes: 1, across: true}": "needs group_size",
        "{how: broadcast, bytes: 1, group_size: 3}": "group_size is 3: it does not divide the 4",
    }.items():
        line = told(plan, [*flags, "--sync-settings", "pull=1", f"how={how}"])
        check(["sync own.mine:Odd", part], line)
    line = told(plan, ["--plan", "--period", "own.mine:Endless"])
    check(["H is 0 at step 0"], line)


def test_bytes_of_several_sendings(modules: Path) -> None:
    """In groups that lie across nodes, shards of all pairs pass a node's link."""
    flags = ["--plan", *FLAGS, "--plan-nodes", "2", "--plan-gpus", "2", "--sync", "own.mine:Odd"]
    in_pairs = "how={how: shards, bytes: 4000, group_size: 2, every: 3}"
    whole = "how={how: shards, bytes: 4000, every: 3}"
    inside = plan([*flags, "--sync-settings", "pull=1", in_pairs])
    own = inside.scenarios[inside.chosen]
    assert own.each.sent == 0
    assert (own.seldom[3].sent, own.seldom[3].link) == (4000, 0)
    assert own.sent == len(own.rounds) // 3 * 4000
    everywhere = plan([*flags, "--sync-settings", "pull=1", whole])
    message = everywhere.scenarios[everywhere.chosen].seldom[3]
    assert (message.sent, message.link) == (2 * 3 / 4 * 4000, 2 * 4 / 4 * 4000)


@pytest.mark.slow
def test_the_plan_finds_it_as_python_does(modules: Path, tmp_path: Path) -> None:
    """In PYTHONPATH, from any folder."""
    command = [sys.executable, str(ROOT / "main.py"), "--plan", *FLAGS]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "own.mine:Halves" in done.stdout
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "there is no module own" in line


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT)


@pytest.mark.slow
def test_a_run_with_both(modules: Path, flags: tuple[str, ...], tmp_path: Path) -> None:
    """It trains, records what it was told, and goes on where the flags are given again."""
    whole = start(*flags, *FLAGS, "--save-freq", "1")
    assert whole.codes == [0, 0], whole.errors
    settings = yaml.safe_load((whole.folder / "config.yml").read_text())
    assert (settings["sync"], settings["period"]) == ("own.mine:Halves", "own.mine:ToAndFro")
    assert settings["sync_settings"] == {"pull": "5e-1"}
    assert settings["period_settings"] == {"high": 2}
    environment = json.loads((whole.folder / "environment.json").read_text())
    assert environment["own_code"].keys() == {"own.mine"}
    assert [r["h"] for r in whole.records if r["kind"] == "train"][:3] == [1, 2, 2]
    made = plan(["--plan", *flags, *FLAGS, "--plan-nodes", "1", "--plan-gpus", "2"])
    own, last = made.scenarios[made.chosen], whole.records[-1]
    assert last["syncs"] == len(own.rounds)
    assert last["bytes"] == pytest.approx(own.sent, rel=0.01)

    saved = ("--resume-pth", str(whole.folder / "checkpoints/step-00000006"))
    resumed = start(*flags, *FLAGS, *saved)
    assert resumed.codes == [0, 0], resumed.errors
    for rank in (0, 1):
        assert weights(resumed.folder, rank) == weights(whole.folder, rank)
    refused = start(*flags, *saved, world_size=1)
    assert "saved with sync 'own.mine:Halves', this run has 'average'" in one_line(refused)
    assert report_main([str(whole.folder), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report/report.html").read_text()
    assert "own.mine:Halves, pull 5e-1" in page and "own.mine:ToAndFro, high 2" in page
    assert export.main([str(whole.folder), "--out", str(tmp_path / "weights.pt")]) == 0


@pytest.mark.slow
def test_hosts_with_other_code_of_ones_own_do_not_train_together(
    modules: Path, flags: tuple[str, ...], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(modules / "own", other / "own", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "own/mine.py").open("a") as file:
        file.write("\n")
    places = [{"PYTHONPATH": str(folder)} for folder in (modules, other)]
    line = one_line(start(*flags, *FLAGS, places=places), rank=1)
    assert "version of own.mine" in line


@pytest.fixture(scope="module")
def plain(once: Once, data: str) -> Path:
    """The folder of a run that has not finished, with a checkpoint of each kind."""

    def run(folder: Path) -> None:
        flags = ("--data-pth", data, "--log-pth", str(folder), *SHORT)
        for more in (("--save-freq", "1"), ("--no-save-opt",)):
            outcome = start(*flags, *more)
            assert outcome.codes == [0, 0], outcome.errors
            (outcome.folder / "summary.json").unlink()

    return once("a plain run to be tampered with", run)


def tampered(run: Path) -> None:
    """All that the run's files say of its rule and its period is a hostile import path."""
    names = {"sync": "hostile:Rule", "period": "hostile:Period"}
    file = run / "config.yml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | names))
    for folder in (run / "checkpoints").glob("step-*"):
        manifest = checkpoint.manifest(folder)
        manifest["config"] |= names
        manifest["sha256"] = checkpoint._digest(manifest)
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        assert checkpoint.manifest(folder)["config"]["sync"] == "hostile:Rule"
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) | names for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.slow
def test_what_a_runs_files_name_is_never_imported(
    modules: Path, plain: Path, data: str, tmp_path: Path
) -> None:
    """But it would be, were it named by a flag."""
    mark = modules / "imported"
    runs = tmp_path / "runs"
    shutil.copytree(plain, runs)
    folders = sorted(runs.glob("*/"))
    for folder in folders:
        tampered(folder)
    flags = ("--data-pth", data, "--log-pth", str(runs), *SHORT)
    whole = folders[0] / "checkpoints/step-00000006"

    fresh = start(*flags, "--save-freq", "1", "--resume", "auto")
    assert fresh.codes == [0, 0] and fresh.folder not in folders, "a run with other settings"
    refused = start(*flags, "--resume-pth", str(whole), world_size=1)
    assert "saved with sync 'hostile:Rule'" in one_line(refused)
    from_weights = ("--resume-pth", str(whole / "rank-0000.pt"), "--resume-from-step", "6")
    states = ("--optimizer-resume-pth", str(whole))
    assert start(*flags, *from_weights, *states).codes == [0, 0]
    assert report_main([*map(str, folders), "--out", str(tmp_path / "report")]) == 0
    assert "hostile:Rule" in (tmp_path / "report/report.html").read_text()
    for folder in folders:
        assert export.main([str(folder), "--out", str(tmp_path / f"{folder.name}.pt")]) == 0
    assert not mark.exists() and "hostile" not in sys.modules

    assert load(["--sync", "hostile:Rule"]).sync == "hostile:Rule"
    assert mark.exists()
    mark.unlink()


def test_a_setting_that_a_flag_replaces_is_not_imported(modules: Path, tmp_path: Path) -> None:
    """Nor is the rule of a recipe that is trained data-parallel."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("alpha: 1\nsync: hostile:Rule\nperiod: hostile:Period\n")
    sys.modules.pop("hostile", None)
    load(["--recipe-pth", str(recipe), "--sync", "average", "--period", "constant"])
    load(["--recipe-pth", str(recipe), "--optimizer", "adamw"])
    assert not (modules / "imported").exists()
    assert load(["--recipe-pth", str(recipe)]).period == "hostile:Period"
    assert (modules / "imported").exists()
    (modules / "imported").unlink()
