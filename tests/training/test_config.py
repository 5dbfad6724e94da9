"""Flags override the recipe, which overrides the host's file; what is wrong is named."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

import pytest
import yaml

from localopt.period import PERIODS
from localopt.sync import RULES
from training import config, named, settings
from training.settings import load
from training.values import ROOT, ConfigError

RECIPES = sorted((ROOT / "recipe").glob("*.yml"))
DATA_PARALLEL = {"localadamw": "adamw", "localsgd": "sgd"}


@pytest.fixture
def recipe(tmp_path: Path):
    def write(**settings: object) -> str:
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump({"alpha": 0.1} | settings))
        return str(path)

    return write


def complaint(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_arguments_give_the_quick_start() -> None:
    loaded = load([])
    assert (loaded.model, loaded.optimizer, loaded.period) == (
        "simplevit-digits",
        "localadamw",
        "qsr",
    )


def test_flags_override_recipe_overrides_host_overrides_defaults(recipe, tmp_path: Path) -> None:
    host = tmp_path / "host.yml"
    host.write_text("nw: 3\nlog_pth: /from/host\n")
    path = recipe(nw=4, epochs=7, seed=1)
    loaded = load(["--config-pth", str(host), "--recipe-pth", path, "--epochs", "9"])
    assert (loaded.epochs, loaded.nw, loaded.log_pth, loaded.seed) == (9, 4, "/from/host", 1)
    assert loaded.beta1 == 0.9


def test_this_hosts_file_is_found_by_name(recipe, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    monkeypatch.setattr(settings.socket, "gethostname", lambda: "node7")
    (tmp_path / ".config_node7.yml").write_text("data_pth: /scratch\n")
    assert load(["--recipe-pth", recipe()]).data_pth == "/scratch"


def test_flags_have_dashes_or_underscores_and_booleans_are_forgiving(recipe) -> None:
    path = recipe(bn="yes", flip=False)
    given = ["--recipe_pth", path, "--total_batch_size", "8", "--nesterov", "--no-bn"]
    loaded = load([*given, "--track-replicas", "1", "--wandb-tags", "a", "b", "--local_rank=1"])
    assert (loaded.total_batch_size, loaded.nesterov, loaded.bn) == (8, True, False)
    assert (loaded.track_replicas, loaded.wandb_tags, loaded.local_rank) == (True, ("a", "b"), 1)
    assert load(["--recipe-pth", path]).bn is True


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text("alpha: 0.1\nmin_lr: 1e-7\nmax_lr: 1\n")
    loaded = load(["--recipe-pth", str(path)])
    assert (loaded.min_lr, loaded.max_lr) == (1e-7, 1.0)
    assert isinstance(loaded.max_lr, float)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"max_lrr": 1}, ["max_lrr", "'max_lr'", "recipe.yml"]),
        ({"epochs": "many"}, ["epochs", "'many'", "an integer"]),
        ({"epochs": 1.5}, ["epochs", "1.5", "an integer"]),
        ({"epochs": True}, ["epochs", "True", "an integer"]),
        ({"max_lr": None}, ["max_lr", "None", "a number"]),
        ({"flip": "perhaps"}, ["flip", "'perhaps'", "true or false"]),
        ({"crop_scale": [0.5]}, ["crop_scale", "list of 2"]),
        ({"crop_scale": 0.5}, ["crop_scale", "a list"]),
        ({"optimizer": "locladamw"}, ["optimizer", "'locladamw'", "'localadamw'"]),
        ({"data": 3}, ["data", "3", "text"]),
        ({"sync": "esgd"}, ["sync", "'esgd'", "'easgd'"]),
        ({"sync_settings": [0.5]}, ["sync_settings", "mapping"]),
        ({"base": 4}, ["base", "4", "text"]),
    ],
)
def test_a_wrong_key_or_type_in_a_recipe_is_named(recipe, settings, parts) -> None:
    message = complaint("--recipe-pth", recipe(**settings))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--max-lrr", "1"], ["--max-lrr", "--max-lr"]),
        (["--epochs", "1e3"], ["--epochs", "'1e3'", "an integer"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["--scheduler", "cosin"], ["--scheduler", "'cosin'", "'cosine'"]),
        (["--bn", "maybe"], ["--bn", "'maybe'"]),
        (["stray"], ["stray"]),
        (["--sync-settings", "alpha"], ["--sync-settings", "'alpha'", "NAME=VALUE"]),
        (["--sync-settings", "alpha=[1"], ["--sync-settings", "alpha=[1", "not valid YAML"]),
        (["--recipe-pth", "/no/such.yml"], ["/no/such.yml", "No such file"]),
        (["--config-pth", "/no/host.yml"], ["/no/host.yml", "No such file"]),
        (["--epoch", "3"], ["--epoch", "--epochs"]),
    ],
)
def test_a_wrong_flag_is_named(argv, parts) -> None:
    message = complaint(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"alpha": 0}, ["alpha", "0"]),
        ({"max_lr": -1.0}, ["max_lr", "-1.0"]),
        ({"max_lr": float("nan")}, ["max_lr"]),
        ({"max_lr": float("inf")}, ["max_lr", "inf"]),
        ({"min_lr": 2.0, "max_lr": 1.0}, ["min_lr", "2.0"]),
        ({"h_max": 0}, ["h_max", "0"]),
        ({"steps_per_epoch": 0}, ["steps_per_epoch", "0"]),
        ({"crop_scale": [0.9, 0.1]}, ["crop_scale", "0.9"]),
        ({"scheduler": "step"}, ["decay_points"]),
        ({"scheduler": "step", "decay_points": [30, 10]}, ["decay_points", "30"]),
        ({"period": "swap"}, ["switch_step", "swap"]),
        ({"period": "post-local"}, ["switch_step", "post-local"]),
        ({"init_model_by_seed": -1}, ["init_model_by_seed", "--resume-pth"]),
        ({"nesterov": True, "momentum": 0.0}, ["nesterov"]),
        ({"label_smoothing": 1.5}, ["label_smoothing", "1.5"]),
        ({"epochs": -1}, ["epochs", "-1"]),
        ({"total_batch_size": 0}, ["total_batch_size", "0"]),
        ({"period": "power", "power": 0}, ["power", "0"]),
        ({"beta1": 1}, ["beta1", "1"]),
        ({"seed": 2**64}, ["seed", str(2**64)]),
        ({"seed": 2**32}, ["seed", str(2**32)]),
        ({"init_model_by_seed": 2**32}, ["init_model_by_seed", str(2**32)]),
        ({"max_lr": 10**400}, ["max_lr", "a number"]),
        ({"scheduler": "cosine-step", "min_lr": 0}, ["min_lr", "cosine-step"]),
        ({"optimizer": "sgd", "track_replicas": True}, ["track_replicas", "sgd"]),
        ({"log_pth": ""}, ["log_pth", "empty"]),
        ({"crop_padding": -1}, ["crop_padding", "-1"]),
        ({"crop_padding": 4, "crop_scale": [0.5, 1.0]}, ["crop_scale", "0.5", "crop_padding 4"]),
        ({"label_skew": -0.1}, ["label_skew", "-0.1"]),
        ({"label_skew": 1e-9}, ["label_skew", "1e-09"]),
    ],
)
def test_an_impossible_value_is_named(recipe, settings, parts) -> None:
    message = complaint("--recipe-pth", recipe(**settings))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("alpha: 1\nalpha: 2\n", "'alpha' is given twice"),
        ("alpha: 2024-02-30\n", "not valid YAML"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "key: value"),
        ("", "key: value"),
    ],
)
def test_a_recipe_that_is_no_recipe_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    assert part in complaint("--recipe-pth", str(path))


def test_a_recipe_builds_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(
        "epochs: 5\nmax_lr: 0.25\nalpha: 1\nsync_settings: {alpha: 0.1}\n"
    )
    (tmp_path / "b.yml").write_text("base: a.yml\nepochs: 6\nsync_settings: {beta: 0.2}\n")
    (tmp_path / "c.yml").write_text("base: b.yml\nseed: 3\n")
    loaded = load(["--recipe-pth", str(tmp_path / "c.yml")])
    assert (loaded.epochs, loaded.max_lr, loaded.seed) == (6, 0.25, 3)
    assert loaded.sync_settings == {"beta": 0.2}, "settings of a rule are replaced as a whole"
    (tmp_path / "a.yml").write_text("base: c.yml\n")
    assert "leads back" in complaint("--recipe-pth", str(tmp_path / "c.yml"))
    (tmp_path / "a.yml").unlink()
    assert "a.yml: No such file" in complaint("--recipe-pth", str(tmp_path / "c.yml"))


def test_settings_of_a_rule_are_yaml_on_the_command_line() -> None:
    words = ["alpha=0.5", "overlap=false", "beta=null", "state_fields=[exp_avg]", "pull=1e-1"]
    settings = load(["--sync-settings", *words]).sync_settings
    assert settings == {
        "alpha": 0.5, "overlap": False, "beta": None, "state_fields": ["exp_avg"], "pull": "1e-1",
    }  # fmt: skip
    assert load(["--sync-settings"]).sync_settings == {}


def test_a_host_file_sets_paths_and_nothing_of_the_experiment(tmp_path: Path) -> None:
    host = tmp_path / "host.yml"
    host.write_text("epochs: 3\n")
    message = complaint("--config-pth", str(host))
    assert "'epochs'" in message
    assert "data_pth" in message


def test_the_example_of_a_host_file_works() -> None:
    assert load(["--config-pth", str(ROOT / ".config_example.yml")]).data_pth == ".localopt/data"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_opens_with_its_source_and_command(path: Path) -> None:
    load(["--recipe-pth", str(path)])
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for heading in ("Paper:", "Hardware:", "Command:", "Expected:"):
        assert any(heading in line for line in comment), heading


@pytest.mark.parametrize("path", [p for p in RECIPES if "local" in p.stem], ids=lambda p: p.stem)
def test_the_data_parallel_twin_differs_in_the_optimizer_alone(path: Path) -> None:
    mine = load(["--recipe-pth", str(path)])
    # What only a local run has ends its name: digits-vit-localadamw-qsr's twin is digits-vit-adamw.
    name = re.sub(r"-(qsr|constant|h\d)$", "", path.stem).replace("-local", "-")
    twin = load(["--recipe-pth", str(path.with_name(f"{name}.yml"))])
    groups = {f.name: f.metadata["group"] for f in config.fields(mine)}
    different = {k for k, v in twin.as_dict().items() if v != mine.as_dict()[k]}
    # The paper decays and clips its data-parallel ViT in another way.
    papers = {"wd", "clip_norm"} if path.stem.startswith("vit-b-") else set()
    outside = {k for k in different if groups[k] != "synchronisation"}
    assert outside == {"optimizer"} | papers
    assert DATA_PARALLEL[mine.optimizer] == twin.optimizer


def test_help_lists_every_setting(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        load(["--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert all(f"--{f.name.replace('_', '-')}" in told for f in config.fields(config.Config))
    unbroken = "".join(told.split())
    for f in config.fields(config.Config):
        explained = "".join(f.metadata["help"].replace("%%", "%").split())
        assert explained in unbroken, f.name
    for words in ("base settings (default", "this host's paths (default", "accepted, always on"):
        assert "".join(words.split()) in unbroken, words


def test_help_lists_the_settings_of_every_rule_and_period(capsys) -> None:
    """By name, type and default, of what `--sync-settings` and `--period-settings` take."""
    with pytest.raises(SystemExit):
        load(["--help"])
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 100
    blocks = dict(re.findall(r"^  (\w[\w-]*) {2,}(.*(?:\n {16}.*)*)", told, re.MULTILINE))
    for name, make in RULES.items():
        mine = [name for name in named.parameters(make) if name != "outer"]  # no text can be one
        assert re.findall(r"(\w+) \(", blocks[name]) == mine
    assert all(re.findall(r"(\w+) \(", blocks[name]) == ["warmup_h"] for name in PERIODS)
    for part in (
        "beta (float, needed)", "group_size (int, needed)", "lr (float, 0.7)",
        "state_fields (Sequence[str], ())", "compress (str, None)", "warmup_h (int, None)",
        "cocod         none",
    ):  # fmt: skip
        assert part in told, part


def test_deepspeeds_own_flags_are_taken() -> None:
    """What deepspeed.add_config_arguments adds to a user's parser, this one has too."""
    import deepspeed

    theirs = deepspeed.add_config_arguments(argparse.ArgumentParser(add_help=False))
    for action in theirs._actions:
        (flag,) = action.option_strings
        given = [] if action.nargs == 0 else ["file.json"]
        loaded = load([flag, *given])
        assert loaded.deepspeed_config == ("file.json" if given else "")


PAPERS_FLAGS = """
    recipe-pth config-pth nw seed local-rank physical-batch-size device epochs epochs-for-sche
    steps-per-epoch total-batch-size init-model-by-seed model optimizer max-lr min-lr momentum
    nesterov wd beta1 beta2 eps scheduler decay-points gamma warmup-epochs warmup-steps log-pth
    resume-from-epoch resume-from-step resume-pth optimizer-resume-pth multiple-optimizers wandb
    wandb-tags bn bn-batches eval-on-start save-freq save-opt local_rank
"""


def test_the_flags_of_the_papers_program_are_taken(capsys) -> None:
    with pytest.raises(SystemExit):
        load(["--help"])
    told = capsys.readouterr().out
    missing = [flag for flag in PAPERS_FLAGS.split() if f"--{flag.replace('_', '-')}" not in told]
    assert not missing
    assert load(["--local_rank", "1"]).local_rank == 1


def test_every_setting_is_used_by_a_recipe_or_a_test() -> None:
    texts = [p.read_text() for p in RECIPES]
    texts += [p.read_text() for p in (ROOT / "tests").rglob("*.py")]
    used = "\n".join(texts)
    for f in config.fields(config.Config):
        flag = f"--(no-)?{f.name.replace('_', '[-_]')}"
        told = rf"(^|[\s\"'(]){f.name}(:|=|\"|')|{flag}[\s\"'=]|{flag}$"
        assert re.search(told, used, re.MULTILINE), f.name


def test_what_help_says_of_rules_is_what_they_take() -> None:
    """It is read from their sources, for their import would take seconds."""
    for name, make in RULES.items():
        said = {setting: (kind, default) for setting, kind, default in named._rules()[name]}
        assert said == {
            p.name: (str(p.annotation), None if p.default is p.empty else repr(p.default))
            for p in inspect.signature(make).parameters.values()
        }
