"""The plan against published and measured runs, and the page that is made with it."""

from __future__ import annotations

import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import rules
from tests.support.patience import PATIENCE
from training.config import fields
from training.plan.cost import Message, Scenario
from training.plan.options import Options, help_text
from training.plan.plan import Plan, plan
from training.plan.report import report
from training.values import ROOT, ConfigError

PAGE = (ROOT / "docs" / "choosing-alpha.md").read_text()
VIT = (
    "--data imagenet --resolution 224 --epochs 300 --total-batch-size 4096 "
    "--physical-batch-size 128 --max-lr 0.008 "
    "--warmup-steps 10000 --alpha 0.0175 --plan-nodes 2 --plan-gpus 8"
)
RESNET = (
    "--data imagenet --resolution 224 --optimizer localsgd --epochs 200 --total-batch-size 4096 "
    "--physical-batch-size 32 --max-lr 0.8 --warmup-epochs 5 --plan-nodes 2 --plan-gpus 8"
)


def planned(flags: str) -> Plan:
    return plan(["--plan", *shlex.split(flags)])


def complaint(flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(shlex.split(flags))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("flags", "syncs", "share", "first", "last"),
    [
        (f"{VIT} --h-base 4", 9711, "10.38 %", (17876, 5),
         [(81077, 1612), (82689, 2769), (85458, 8142)]),
        (f"{VIT} --h-base 8", 6461, "6.90 %", (39136, 9),
         [(82347, 2453), (84800, 6461), (91261, 2339)]),
        (f"{RESNET} --alpha 0.2 --h-base 2", 24792, "39.73 %", (47306, 3),
         [(58736, 784), (59520, 2051), (61571, 829)]),
        (f"{RESNET} --alpha 0.25 --h-base 4", 12539, "20.09 %", (47564, 5),
         [(57963, 571), (58534, 990), (59524, 2876)]),
    ],
    ids=["ViT-B base 4", "ViT-B base 8", "ResNet-152 base 2", "ResNet-152 base 4"],
)  # fmt: skip
def test_the_rounds_of_the_paper(
    flags: str, syncs: int, share: str, first: tuple[int, int], last: list[tuple[int, int]]
) -> None:
    """Gu et al.'s (arXiv 2310.14423) runs on ImageNet."""
    made = planned(flags)
    own = made.scenarios[made.chosen]
    assert len(own.rounds) == syncs
    assert own.first_longer == first
    assert own.rounds[-3:] == last
    told = report(made)
    assert f"{syncs:,} of {made.schedule.total_steps:,} steps ({share})" in told
    assert f"({first[0]:,}, {first[1]})" in told
    assert "  ".join(f"({step:,}, {h:,})" for step, h in last) in told
    assert re.search(
        rf"constant H = {made.config.h_base} .* {100 / made.config.h_base:.2f} % ", told
    )
    assert re.search(rf"data-parallel +{made.schedule.total_steps:,} +100.00 % ", told)


@pytest.mark.parametrize("flags", [VIT, RESNET])
def test_its_page_is_a_hundred_columns_wide(flags: str) -> None:
    """And says of the rate where it starts, its peak, and where it ends."""
    made = planned(flags)
    told = report(made)
    assert max(map(len, told.splitlines())) <= 100
    rate = made.schedule
    warm = f"after {rate.warmup_steps:,} steps of warm-up from {rate.min_lr:g}"
    assert f"{rate.kind}, peak {rate.max_lr:g} {warm}" in " ".join(told.split())
    cold = report(planned(f"{flags} --warmup-steps 0 --warmup-epochs 0"))
    assert "warm-up" not in cold


COUNTS = r"([\d,]+)\s+synchronisations in ([\d,]+)\s+steps"
COUNTED = {
    path.stem: found.groups()
    for path in sorted((ROOT / "recipe").glob("*.yml"))
    if (found := re.search(COUNTS, path.read_text().replace("\n#", "")))
}


@pytest.mark.parametrize("recipe", COUNTED)
def test_the_rounds_that_a_recipe_promises(recipe: str) -> None:
    """Those for the digits have been counted in runs."""
    made = planned(f"--recipe-pth recipe/{recipe}.yml --plan-nodes 1 --plan-gpus 2")
    syncs, steps = (int(number.replace(",", "")) for number in COUNTED[recipe])
    assert len(made.scenarios[made.chosen].rounds) == syncs
    assert made.schedule.total_steps == steps


MEASURED = rules.read(rules.RESULTS)


@pytest.mark.parametrize(
    ("rule", "m"), sorted({(row["rule"], int(row["replicas"])) for row in MEASURED})
)
def test_bytes_are_those_that_were_measured(rule: str, m: int) -> None:
    """A run's padding and headers add a little."""
    measured = [row for row in MEASURED if (row["rule"], int(row["replicas"])) == (rule, m)]
    recipe, flags = rules.RULES[rule]
    made = planned(
        f"--recipe-pth recipe/digits-resnet-{recipe}.yml {shlex.join(flags)} --epochs 20 "
        f"--physical-batch-size {32 // m} --plan-nodes 1 --plan-gpus {m}"
    )
    own = made.scenarios[made.chosen]
    assert len(own.rounds) == statistics.mode(int(row["syncs"]) for row in measured)
    sent = statistics.mean(int(row["bytes"]) for row in measured)
    assert own.sent == pytest.approx(sent, rel=0.01)


def scenario(flags: str) -> tuple[Plan, Scenario]:
    made = planned(flags)
    return made, made.scenarios[made.chosen]


def test_a_ring_passes_each_nodes_link_once_and_groups_share_it() -> None:
    p = 4 * 78_042
    small = "--recipe-pth recipe/digits-resnet-localsgd-qsr.yml --plan-nodes 2 --plan-gpus 4"
    _, ring = scenario(small)
    assert ring.each.sent == ring.each.link == pytest.approx(2 * 7 / 8 * p)
    pairs = "--sync hierarchical --sync-settings global_every=3 group_size="
    _, inside = scenario(f"{small} {pairs}2")
    assert (inside.each.sent, inside.each.link) == (pytest.approx(p), 0)
    # Two rings of four peers, each with half of the parameters, then a broadcast in each pair.
    across = inside.seldom[3]
    assert across.sent == pytest.approx(2 * 3 / 4 * p / 2 + p / 2)
    assert across.link == pytest.approx(2 * (2 * 3 / 4 * p / 2))
    assert len(inside.rounds) == 148
    assert inside.sent == pytest.approx(148 * inside.each.sent + 49 * across.sent)
    _, leader = scenario(f"{small} --sync lsgd --sync-settings group_size=4 global_every=2")
    assert (leader.each.sent, leader.each.link) == (pytest.approx(3 / 4 * p), 0)
    assert leader.seldom == {2: Message(pytest.approx(7 / 8 * p), p)}
    one_group = scenario(f"{small} {pairs}8")[1]
    assert one_group.seldom == {}


def test_what_travels_beside_the_parameters_counts() -> None:
    vit = "--plan-nodes 2 --plan-gpus 1 --plan-step-seconds 1"
    _, plain = scenario(vit)
    _, moments = scenario(f"{vit} --sync average --sync-settings state_fields=[exp_avg,exp_avg_sq]")
    assert moments.each.sent == 3 * plain.each.sent == pytest.approx(3 * 4 * 137_002)
    small = "--recipe-pth recipe/digits-resnet-localsgd-qsr.yml --plan-nodes 2 --plan-gpus 1"
    statistics_ = scenario(f"{small} --buffers average")[1].each.sent - 4 * 78_042
    channels = 16 + 2 * 16 + 2 * 32 + 32 + 2 * 64 + 64
    assert statistics_ == 4 * 2 * channels


def test_overlap_hides_what_a_rounds_computing_covers() -> None:
    """H = 4, m = 2: the link carries 4 P bytes a round; 220 rounds, the last one uncovered."""
    flags = (
        "--recipe-pth recipe/digits-resnet-cocod.yml --epochs 20 --plan-nodes 2 --plan-gpus 1 "
        "--plan-link-efficiency 1 --plan-link-gbits 0.01 "
    )
    seconds = 4 * 78_042 / 1.25e6
    for step_seconds, shown in ((seconds / 4, 0), (seconds / 8, 219 / 2)):
        made, own = scenario(f"{flags} --plan-step-seconds {step_seconds}")
        assert made.exposed(own) == pytest.approx((shown + 1) * seconds)
        assert made.seconds(own) == pytest.approx((shown + 1) * seconds + 880 * step_seconds)
    made, own = scenario(flags)
    assert made.exposed(own) == pytest.approx(220 * seconds), "nothing is known to hide"
    assert "hides behind training" in report(made)
    _, blocking = scenario(f"{flags} --sync average --plan-step-seconds 1")
    assert made.exposed(blocking) == pytest.approx(220 * seconds)
    for settings, hides in (("", True), ("pull=0.1", False), ("overlap=false", False)):
        assert scenario(f"{flags} --sync easgd --sync-settings {settings}")[1].hides is hides
    for settings, hides in (("overlap=true", True), ("overlap=false", False)):
        _, own = scenario(f"{flags} --sync streaming --sync-settings fragments=4 {settings}")
        assert own.hides is hides
        assert own.sent == made.scenarios[made.chosen].sent, "in all, fragments are the whole"


def test_the_report_fits_the_terminal_and_names_what_matters() -> None:
    made = planned(
        f"{VIT} --plan-alphas 0.01 0.025 --plan-step-seconds 0.748 --sync slowmo "
        "--sync-settings beta=0.5 --scheduler step --decay-points 30 60 90 120 150 200 250"
    )
    told = report(made)
    assert max(map(len, told.splitlines())) <= 100
    for part in ("16 (2 nodes of 8)", "256 for each replica, in 2 micro-steps of 128",
                 "300 epochs of 312 steps: 93,600 steps", "201,352 parameters",
                 "after 10,000 steps of warm-up from 1e-06", "slowmo beta=0.5",
                 "(2.19 × peak), H ≥ 4", "> QSR α = 0.0175"):  # fmt: skip
        assert part in told
    assert list(made.scenarios) == [
        "data-parallel", "constant H = 4", "QSR α = 0.01", "QSR α = 0.0175", "QSR α = 0.025",
    ]  # fmt: skip


def test_the_sketch_is_of_the_rounds() -> None:
    lines = report(planned(VIT)).splitlines()
    rows = [line for line in lines if re.match(r" *[\d,]+ \|#* *#*$", line)]
    assert [int(row.split()[0].replace(",", "")) for row in rows] == [
        4 * 2**k for k in reversed(range(11))
    ]
    assert rows[-1].endswith("|" + 72 * "#")
    # Lines get shorter on the left only: H grows.
    assert all(len(row) == len(rows[-1]) for row in rows)
    assert next(line for line in lines if "epoch " in line).split() == [
        "epoch", "0", "75", "150", "225", "300",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--epochs 1 --period constant --h-base 7",
        "--period swap --switch-step 100",
        "--period post-local --switch-step 100",
        "--period power --power 3 --plan-alphas 0.001",
        "--scheduler const --plan-alphas 0.001",
        "--plan-nodes 1 --plan-gpus 1 --plan-step-seconds 0.1",
        "--recipe-pth recipe/digits-vit-adamw.yml --plan-alphas 0.001",
        "--max-lr 0 --min-lr 0",
    ],
)
def test_odd_runs_have_a_plan_too(flags: str) -> None:
    made = planned(flags)
    for own in made.scenarios.values():
        assert sum(h for _, h in own.rounds) == made.schedule.total_steps
    assert made.chosen in report(made)


def test_the_data_set_is_measured_or_known_or_given(tmp_path: Path) -> None:
    assert planned(f"--data-pth {tmp_path}").images == 1_438
    assert planned(f"--data-pth {tmp_path} --plan-images 500").images == 500
    flowers = f"--data-pth {tmp_path} --data flowers --resolution 32"
    given = f"{flowers} --plan-images 6149 --plan-classes 102"
    made = planned(given)
    assert (made.steps_per_epoch, made.parameters) == (192, 137_002 + 92 * 65)
    (tmp_path / "flowers").mkdir()
    description = tmp_path / "flowers" / "dataset.json"
    description.write_text(
        '{"name": "flowers", "settings": {}, "classes": ["a", "b"], "mean": [0, 0, 0], '
        '"std": [1, 1, 1], '
        '"files": {"train.beton": {"images": 99, "bytes": 1, "sha256": ""}}}'
    )
    made = planned(flowers)
    assert (made.images, made.source) == (99, "dataset.json")
    description.write_text("{")
    assert "cannot be read" in complaint(f"--plan --data-pth {tmp_path} --data flowers")


def test_the_host_file_gives_the_replicas(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# cluster\nnode1 slots=2\n\nnode2   slots=2 # old\n")
    assert planned(f"--plan-hostfile {hosts}").nodes == [0, 0, 1, 1]
    assert planned(f"--plan-hostfile {hosts} --plan-gpus 1").nodes == [0, 1]
    assert planned(f"--plan-hostfile {hosts} --plan-nodes 1").nodes == [0, 0]
    hosts.write_text("node1 slots=1\nnode2 slots=3\n")
    assert planned(f"--plan-hostfile {hosts}").nodes == [0, 1, 1, 1]
    assert "1 node of 1 + 1 node of 3" in report(planned(f"--plan-hostfile {hosts}"))
    assert "give --plan-gpus" in complaint(f"--plan --plan-hostfile {hosts} --plan-nodes 4")
    for wrong, part in (("node1\n", "'node1'"), ("", "no host"), ("n slots=0", "slots=0")):
        hosts.write_text(wrong)
        assert part in complaint(f"--plan --plan-hostfile {hosts}")
    assert "No such file" in complaint(f"--plan --plan-hostfile {tmp_path}/none")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--plan --plan-nodes 0", ["--plan-nodes", "0", "positive"]),
        ("--plan --plan-gpus 1.5", ["--plan-gpus", "'1.5'", "an integer"]),
        ("--plan --plan-link-gbits nan", ["--plan-link-gbits", "nan"]),
        ("--plan --plan-link-efficiency 75", ["--plan-link-efficiency", "75", "at most 1"]),
        ("--plan --plan-alphas 0.1 -1", ["--plan-alphas", "-1", "positive"]),
        ("--plan --plan-alphas", ["--plan-alphas", "at least one"]),
        ("--plan --plan-node 2", ["--plan-node", "--plan-nodes"]),
        ("--plan-nodes 2", ["--plan-nodes", "--plan"]),
        ("--plan --epoch 2", ["--epoch", "--epochs"]),
        ("--plan --data flowers", ["'flowers'", "--plan-images", "--plan-classes"]),
        ("--plan --total-batch-size 33", ["total_batch_size is 33", "2 replicas"]),
        ("--plan --physical-batch-size 3", ["physical_batch_size is 3", "16"]),
        ("--plan --total-batch-size 4096 --physical-batch-size 8", ["4096", "1438 images"]),
        ("--plan --steps-per-epoch 45", ["steps_per_epoch is 45", "44 steps"]),
        ("--plan --model resnet-digits --no-bn", ["bn is false"]),
        ("--plan --model resnet-digit", ["'resnet-digit'", "'resnet-digits'"]),
        ("--plan --data imagenet --resolution -1", ["resolution is -1", "imagenet"]),
        ("--plan --sync hierarchical", ["group_size and global_every"]),
        ("--plan --sync hierarchical --sync-settings group_size=3 global_every=2",
         ["group_size is 3", "2 replicas"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(flags: str, parts: list[str]) -> None:
    message = complaint(flags)
    assert all(part in message for part in parts), message


def test_help_lists_every_flag_of_the_plan() -> None:
    told = help_text()
    assert all(f"--plan-{f.name.replace('_', '-')}" in told for f in fields(Options))
    assert "--recipe-pth" not in told


def test_a_model_that_needs_numbers_to_be_built_is_built(monkeypatch) -> None:
    def build(name: str, **_: object) -> torch.nn.Module:
        scale = float(torch.ones(1))  # a meta tensor has no number
        return torch.nn.Linear(2, int(scale))

    monkeypatch.setattr("training.models.build", build)
    assert planned("").parameters == 3


def test_rounds_of_one_step_are_walked_fast() -> None:
    started = time.process_time()  # other tests may keep the machine busy
    made = planned(f"{VIT} --period constant --h-base 1")
    assert len(made.scenarios[made.chosen].rounds) == 93_600
    assert time.process_time() - started < 5


def main(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "main.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_main_refuses_in_one_line() -> None:
    done = main("--plan", "--plan-nodes", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--plan-nodes is 0" in done.stderr


# The page: every command with its output, the tables, and what is said beside them.

COMMANDS = [
    (command.replace("\\\n", ""), output.splitlines())
    for command, output in re.findall(
        r"```sh\npython main.py --plan ([^`]*)\n```\n\n```text\n([^`]*)\n```", PAGE
    )
]


@pytest.mark.slow
def test_main_prints_what_the_page_says() -> None:
    """The whole way, without DeepSpeed; the other commands are planned in this process."""
    flags, expected = next((c, o) for c, o in COMMANDS if "--plan-step-seconds" in c)
    done = main("--plan", *shlex.split(flags))
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(expected) - set(done.stdout.splitlines())


@pytest.mark.parametrize(("flags", "expected"), COMMANDS)
def test_the_pages_commands_print_what_stands_below_them(flags: str, expected: list[str]) -> None:
    told = report(planned(flags)).splitlines()
    assert not set(expected) - set(told)


def test_every_command_of_the_page_has_its_output() -> None:
    assert len(COMMANDS) == PAGE.count("python main.py --plan ") > 9


def test_the_pages_tables_are_its_commands() -> None:
    (command,) = [c for c, _ in COMMANDS if "--scheduler cosine" in c]
    seen = 0
    for scheduler, rows in re.findall(r"`--scheduler ([^`]*)`:\n\n(\|(?:.*\n)*?)\n", PAGE):
        changed = command.replace("--scheduler cosine", f"--scheduler {scheduler}")
        made = [planned(changed.replace("--h-base 4", f"--h-base {h}")) for h in (2, 4, 8)]
        for row in rows.splitlines()[2:]:
            ratio, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            expected = []
            for p in made:
                s, total = p.scenarios[f"QSR α = {ratio}"], p.schedule.total_steps
                shares = (len(s.rounds), s.first_longer[0], s.longest)
                digits = (2, 1, 1)
                expected += [
                    f"{100 * a / total:.{d}f} %" for a, d in zip(shares, digits, strict=True)
                ]
            assert cells == expected
            seen += 1
    assert seen == 18


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_the_pages_formulas(scheduler: str, ratio: float) -> None:
    """Where H starts to grow, and how long the last round may get."""
    made, own = scenario(f"{VIT} --max-lr 1 --scheduler {scheduler} --alpha {ratio}")
    warmup, after = 10_000, 83_600
    x = ratio / math.sqrt(made.config.h_base + 1)
    at = math.acos(2 * x - 1) / math.pi if scheduler == "cosine" else 1 - x
    assert own.first_longer[0] == pytest.approx(warmup + at * after, abs=made.config.h_base + 1)
    longest = {
        "cosine": (16 * ratio**2 / (math.pi**4 * after)) ** (1 / 5),
        "linear": (ratio**2 / after) ** (1 / 3),
    }[scheduler]
    assert 0.5 * longest < own.longest / after < 1.02 * longest


def test_what_the_papers_hours_say_of_its_network() -> None:
    (command,) = [c for c, _ in COMMANDS if "--plan-step-seconds" in c]
    made = planned(command)
    parallel, own = made.scenarios["data-parallel"], made.scenarios[made.chosen]
    seconds = (26.7 - 20.2) * 3600 / (len(parallel.rounds) - len(own.rounds))
    assert f"**{seconds:.3f} s**" in PAGE
    ideal = parallel.each.link / (25e9 / 8)
    assert f"{ideal:.3f} s for" in PAGE
    assert f"**{ideal / seconds:.2f}**" in PAGE
    assert abs(ideal / seconds - Options().link_efficiency) < 0.02
    computing = 26.7 * 3600 / len(parallel.rounds) - seconds
    assert f"{computing:.3f} s of computing" in PAGE
    assert computing == pytest.approx(made.options.step_seconds, abs=0.001)
    assert made.seconds(parallel) / 3600 == pytest.approx(26.7, abs=0.1)
    assert made.seconds(own) / 3600 == pytest.approx(20.2, abs=0.05)
    (command,) = [c for c, _ in COMMANDS if "--plan-nodes 8" in c]
    wide = planned(command)
    many = wide.scenarios["data-parallel"]
    ideal = many.each.link / (25e9 / 8)
    bounds = [(8.6 - 5.5) * 3600 / (share * len(many.rounds)) for share in (1, 0.75)]
    assert "{:.2f} to {:.2f} s".format(*bounds) in PAGE
    assert f"{ideal / bounds[1]:.2f} to {ideal / bounds[0]:.2f}" in PAGE
