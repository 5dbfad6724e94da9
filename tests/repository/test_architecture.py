"""Who may know whom, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
OURS = {"localopt", "training", "data", "from_scratch"}
COLLECTIVES = {
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_gather_single",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "allreduce",
    "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather_object",
    "irecv", "isend", "monitored_barrier", "recv", "reduce_scatter", "reduce_scatter_tensor",
    "scatter_object_list", "send",
}  # fmt: skip


def files(folder: str) -> list[Path]:
    """The Python files of a package; none where it does not exist yet."""
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, package: str | None = None) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as an absolute dotted name.

    ``from a import b`` gives ``a.b``, for b may be a module; so do conditional imports and
    ``importlib.import_module("a")``.
    """
    package = package or ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            argument = node.args[0] if node.args else None
            yield argument.value if isinstance(argument, ast.Constant) else "unknown"


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def offences(paths: list[Path], *modules: str) -> list[str]:
    """The imports of ``modules`` in files."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imports(path)
        if within(name, *modules)
    ]


def test_the_reader_reads(tmp_path: Path) -> None:
    """Each form of import is seen: otherwise this file's other tests could not fail."""
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b\nfrom . import c\nfrom ..d import e\nfrom .f.g import h\n"
        "def late():\n    import i\n    importlib.import_module('j.k')\n"
        "if TYPE_CHECKING:\n    from l import m\n"
    )
    assert set(imports(source, package="pack.sub")) == {
        "a.b", "pack.sub.c", "pack.d.e", "pack.sub.f.g.h", "i", "j.k", "l.m",
    }  # fmt: skip
    assert files("localopt") and files("data"), "packages that exist are found"


FRAMEWORKS = {"lightning", "transformers"}  # each known to the integration of its name


def test_localopt_imports_only_torch() -> None:
    """The library needs torch alone; an integration also what it is named after."""
    allowed = {"torch", "localopt", *sys.stdlib_module_names}
    for path in files("localopt"):
        own = {path.stem} & FRAMEWORKS if path.parent.name == "integrations" else set()
        foreign = [name for name in imports(path) if name.split(".")[0] not in allowed | own]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


KNOWN_BY = {
    "localopt": {"localopt"},
    "data": {"data"},
    "from_scratch": {"from_scratch", "data"},
    "training": {"training", "localopt", "data"},
}


@pytest.mark.parametrize("package", KNOWN_BY)
def test_who_knows_whom(package: str) -> None:
    """Who may import whom; nobody imports main or tests."""
    if not files(package):
        pytest.skip(f"{package} does not exist yet")
    strangers = (OURS - KNOWN_BY[package]) | {"main", "tests", "benchmarks", "experiments"}
    assert offences(files(package), *strangers) == []


def test_nobody_imports_the_integrations() -> None:
    """Who imports the library does not import what it works with."""
    folder = ROOT / "localopt/integrations"
    inside, outside = files("localopt/integrations"), files("localopt")
    outside = [path for path in outside if folder not in path.parents]
    assert len(inside) > 1 and outside
    assert offences(outside, "localopt.integrations", "torch.distributed.checkpoint") == []


def test_from_scratch_is_from_scratch() -> None:
    """Processes and pipes alone, but for the two that are there for comparison."""
    paths = files("from_scratch")
    assert offences(paths, "localopt", "training", "deepspeed") == []
    built_in = ROOT / "from_scratch/ddp.py", ROOT / "from_scratch/data_parallel.py"
    by_hand = [path for path in paths if path not in built_in]
    assert len(by_hand) == len(paths) - 2
    assert offences(by_hand, "torch.distributed", "torch.nn.parallel") == []
    assert not any({"DataParallel", "DistributedDataParallel"} & set(named(p)) for p in by_hand)


def test_main_is_the_training_program() -> None:
    strangers = ("from_scratch", "tests", "benchmarks", "experiments")
    assert offences(list(ROOT.glob("main.py")), *strangers) == []


def test_period_and_sync_are_strangers() -> None:
    """Any period goes with any rule: neither knows of the other."""
    assert offences([ROOT / "localopt/period.py"], "localopt.sync", "localopt.optimizer") == []
    assert offences(files("localopt/sync"), "localopt.period", "localopt.optimizer") == []


def test_rules_are_strangers() -> None:
    """A rule is its own file and nothing else."""
    folder = ROOT / "localopt/sync"
    base = ("__init__", "rule", "parts")
    rules = [path for path in files("localopt/sync") if path.stem not in base]
    assert rules
    for path in rules:
        others = {f"localopt.sync.{other.stem}" for other in rules if other != path}
        assert offences([path], *others) == []
        through_package = [
            name for name in imports(path)
            if within(name, "localopt.sync") and not within(name, "localopt.sync.rule")
        ]  # fmt: skip
        assert not through_package, f"{path.relative_to(folder)} imports {through_package}"
    assert offences([folder / "rule.py"], *(f"localopt.sync.{path.stem}" for path in rules)) == []


def named(path: Path) -> Iterator[str]:
    """Every name and attribute that occurs in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.name.split(".")[-1]


def test_collectives_appear_in_one_module() -> None:
    """What travels can be counted in one place."""
    home = ROOT / "localopt/collective.py"
    assert COLLECTIVES & set(named(home)), "the names are still torch's"
    for path in files("localopt"):
        if path != home:
            found = COLLECTIVES & set(named(path))
            assert not found, f"{path.relative_to(ROOT)} uses {sorted(found)}"
            functional = "torch.distributed._functional_collectives"
            assert offences([path], functional, "torch.distributed.nn") == []


def test_deepspeed_appears_in_files_of_that_name() -> None:
    """DeepSpeed can be replaced in one place."""
    paths = [path for package in OURS for path in files(package)] + [ROOT / "main.py"]
    knowing = [path for path in paths if path.match("training/deepspeed_*.py")]
    assert len(knowing) == 2
    assert offences([path for path in paths if path not in knowing], "deepspeed") == []


def modules(package: str) -> dict[str, Path]:
    """The files of a package by the names of their modules."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files(package)
    }


def imported(package: str) -> dict[str, set[str]]:
    """By module of a package, the others that it imports: at once, late or for types only."""
    known = modules(package)

    def home(name: str) -> str:
        """The module that an imported name is, or is in."""
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {home(name) for name in imports(path)} - {module, ""}
        for module, path in known.items()
    }


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The nodes that a way leads back to, or that such ways lead to alone."""
    left = dict(graph)
    while ends := [node for node, others in left.items() if not others & left.keys()]:
        for node in ends:
            del left[node]
    return set(left)


def test_circles_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == {"a", "b", "c"}
    assert circles(graph | {"c": {"d"}}) == set()
    assert "training.named" in imported("training")["training.config"], "a late import"
    assert "training.plan.cost" in imported("training")["training.plan.plan"], "one for types"


def test_no_files_of_training_import_each_other_in_a_circle() -> None:
    """Each can be read after those that it imports."""
    assert circles(imported("training")) == set()


def test_who_reads_the_environment_in_training() -> None:
    """What a launcher says is read where launchers are known."""
    reading = {
        path.name
        for path in files("training")
        if {"environ", "environb", "getenv", "putenv"} & set(named(path))
    }
    assert reading == {"distributed.py", "launchers.py"}


def test_matplotlib_appears_in_one_module() -> None:
    """Training does not need it: whoever draws is asked for by nobody else."""
    home = ROOT / "training/report"
    paths = [path for package in OURS for path in files(package)] + [ROOT / "main.py"]
    assert offences([p for p in paths if p != home / "draw.py"], "matplotlib") == []
    assert offences([p for p in paths if home not in p.parents], "training.report") == []


def test_one_file_of_localopt_reads_the_environment() -> None:
    reading = {
        path.name
        for path in files("localopt")
        if {"environ", "environb", "getenv"} & set(named(path))
    }
    assert reading == {"environment.py"}


BLOCKER = """
import importlib.abc, sys
import torch, torch.distributed, torch._dynamo
before = set(sys.modules)

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.split(".")[0]
        known = top in ("torch", "localopt", *sys.stdlib_module_names)
        if not known and not top.startswith("_sysconfigdata"):
            raise ImportError(f"localopt asked for {name}")

sys.meta_path.insert(0, Blocker())
for name in ("numpy", "yaml", "deepspeed"):
    sys.modules[name] = None
import localopt
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert new <= {"localopt", "torch", "yaml", "deepspeed", *sys.stdlib_module_names}, new
optimizer = localopt.LocalSGD([torch.nn.Parameter(torch.ones(3))], period=localopt.Constant(1))
optimizer.step()
optimizer.finish()
"""


@pytest.mark.slow
def test_import_hygiene() -> None:
    """Importing and using the library asks for no third-party module beyond torch."""
    command = [sys.executable, "-c", BLOCKER]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
