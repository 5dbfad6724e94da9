"""The kept list of faults, and the tool that puts them in."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import draw as draw_
from tests.faults.anchor import Source, applied, broken, locate, reanchored
from tests.faults.listing import ROOT, Fault, FaultError, caught, dump, load
from tests.faults.pytest_run import TIME_OUT, verdict
from tests.faults.run import Results, digest
from tests.faults.sites import OPERATORS, sites
from tests.faults.stages import named_after, stages
from tests.faults.table import table

SAMPLE = '''
"""Not a number: 1 < 2."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Counter:
    def __init__(self, limit: int = 3) -> None:
        self.limit = limit

    def __repr__(self) -> str:
        return f"{1 + 1}"

    def add(self, values: list[int], *, twice: bool = False) -> int:
        """One more."""
        if not values and self.limit > 0 or twice:
            raise ValueError("no " + str(3 * 7))
        values.append(
            pow(len(values), self.limit),
        )
        self.limit += 1
        kept = sorted(values[1:-1], reverse=True)
        return max(kept) if twice else sum(kept) + self.limit


def nothing(counter: Counter) -> None:
    counter.add([1, 2], twice=True)
    return None
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small checkout."""
    for package in ("localopt", "training", "data"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("LIMIT = 3\n")
        (tmp_path / package / f"{package}_sample.py").write_text(SAMPLE)
    return tmp_path


def fault(**changed: str) -> Fault:
    """A fault of the sample in localopt."""
    standard = {
        "id": "a-fault",
        "origin": "chosen",
        "file": "localopt/localopt_sample.py",
        "function": "Counter.add",
        "old": "self.limit += 1",
        "new": "self.limit -= 1",
        "what": "counts down",
    }
    return Fault(**{**standard, **changed})


def test_each_fault_of_the_list_can_be_put_in() -> None:
    """Found once, in the place that the list names, and the code is another then."""
    faults = load()
    for each in faults:
        place, _ = broken(ROOT, each)
        told = f"{each.id} is now in {place.file}: python -m tests.faults check --reanchor"
        assert not place.moved, told
    origins = [each.origin for each in faults]
    assert origins.count("drawn") >= 40 and origins.count("chosen") >= 20
    assert len({each.id for each in faults}) == len(faults)


def test_layout_does_not_matter(root: Path) -> None:
    """A call that a formatter has broken over lines is found, and so is what is indented."""
    broken(root, fault(function="Counter", old="@dataclass(eq=False)", new="@dataclass"))
    place = locate(root, fault(old="values.append(pow(len(values), self.limit))"))
    text = applied(place, "if twice:\n    values.clear()\nelse:\n    pass")
    assert "\n        if twice:\n            values.clear()\n        else:\n" in text
    ast.parse(text)


def test_what_was_moved_is_found(root: Path, tmp_path: Path) -> None:
    for package in ("localopt", "training", "data"):
        (root / package / f"{package}_sample.py").unlink()
    (root / "data/deep").mkdir()
    moved = SAMPLE.replace("class Counter", "class Adder").replace("def add", "def plus")
    (root / "data/deep/other.py").write_text(moved)
    place, text = broken(root, fault())
    assert place.moved and "self.limit -= 1" in text
    path = tmp_path / "list.yml"
    dump(reanchored(root, [fault()]), path)
    assert load(path) == [fault(file="data/deep/other.py", function="Adder.plus")]
    assert not locate(root, load(path)[0]).moved


def test_what_is_nowhere_is_an_error(root: Path) -> None:
    (root / "localopt/twice.py").write_text(SAMPLE.replace("max(kept)", "sum(kept)"))
    with pytest.raises(FaultError, match=r"a-fault.*'self\.size = 7' is found nowhere\. Correct"):
        locate(root, fault(old="self.size = 7"))
    with pytest.raises(FaultError, match="2 times in localopt"):
        locate(root, fault(old="sum(kept)", file="localopt/twice.py"))
    with pytest.raises(FaultError, match="4 times elsewhere"):
        locate(root, fault(function="Counter.gone", old="pow(len(values), self.limit)"))
    with pytest.raises(FaultError, match="changes nothing"):
        broken(root, fault(new="self.limit  +=  1  # one"))
    with pytest.raises(FaultError, match="is no Python"):
        broken(root, fault(new="self.limit +="))


@pytest.mark.parametrize("piece", ["values.append(", "x)", ""])
def test_half_a_bracket_is_no_anchor(root: Path, piece: str) -> None:
    with pytest.raises(FaultError, match=r"bracket|no code"):
        locate(root, fault(old=piece))


def test_the_same_seed_draws_the_same(root: Path) -> None:
    first = draw_.draw(root, 0, 40, [])
    assert first == draw_.draw(root, 0, 40, [])
    assert draw_.draw(root, 0, 40, first) == []
    assert draw_.draw(root, 0, 10, []) != draw_.draw(root, 1, 10, [])
    assert len({each.id for each in first}) == len(first) > 20
    assert all(locate(root, each).function == each.function for each in first)


def test_of_forty_each_package_has_its_share() -> None:
    assert draw_.quotas(40) == {"localopt": 18, "training": 14, "data": 8}
    assert sum(draw_.quotas(7).values()) == 7


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_makes_another_program(operator: str) -> None:
    source = Source(SAMPLE)
    before = ast.dump(source.tree)
    made = [site for site in sites(source) if site.operator == operator]
    assert made
    for site in made:
        text = SAMPLE[: site.start] + site.new + SAMPLE[site.end :]
        compile(text, "sample", "exec", dont_inherit=True)
        assert ast.dump(ast.parse(text)) != before, site


def test_words_and_types_stay() -> None:
    """Docstrings, errors' texts, annotations and what is printed of an object."""
    spans = {SAMPLE[site.start : site.end] for site in sites(Source(SAMPLE))}
    assert not spans & {"3 * 7", "7", "1 + 1", "__future__", "int"}
    assert "return None" not in {site.new for site in sites(Source("def f() -> None:\n return x"))}


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (0, "1 passed", None),
        (5, "no tests ran", None),
        (4, "ERROR: not found: /code/tests/test_a.py::test_b\n", None),
        (4, "ERROR: found no collectors for /code/tests/test_a.py::test_b[x\n", None),
        (4, "ImportError while loading conftest '/code/tests/conftest.py'.", "collection"),
        (None, "", TIME_OUT),
        (1, "+++ Timeout +++", TIME_OUT),
        (-11, "", "crash (SIGSEGV)"),
        (3, "INTERNALERROR", "exit status 3"),
        (
            1,
            "ERROR in a log\nshort test summary info\nFAILED tests/t.py::test[a - b] - x[0] - y\n",
            "tests/t.py::test[a - b]",
        ),
        (1, "short test summary info\nERROR tests/t.py::test_a - E\n", "tests/t.py::test_a"),
        (2, "short test summary info\nERROR tests/t.py - E\n", "collection of tests/t.py"),
        (2, "short test summary info\nERROR tests/t.py\n", "collection of tests/t.py"),
    ],
)
def test_what_pytest_says(code: int | None, text: str, expected: str | None) -> None:
    assert verdict(code, text) == expected


def test_stages_go_from_near_to_far(tmp_path: Path) -> None:
    for name in ("localopt/test_period.py", "dist/test_period_long.py", "dist/test_other.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    known = fault(file="localopt/period.py", caught_by="tests/unit/test_other.py::test_a[b]")
    assert [(stage.name, *stage.arguments) for stage in stages(tmp_path, known)] == [
        ("recorded", "tests/dist/test_other.py::test_a[b]"),
        ("named", "tests/dist/test_period_long.py", "tests/localopt/test_period.py"),
        ("fast", "tests/localopt", "-m", "not slow"),
        ("slow", "tests/localopt", "-m", "slow"),
        ("rest", "tests", "--ignore=tests/localopt"),
    ]
    assert stages(tmp_path, known, subject_only=True)[-1].name == "slow"
    assert [stage.arguments for stage in stages(tmp_path, known, ["a", "b"])] == [("a", "b")]
    alone = stages(tmp_path, fault(file="data/order.py"))
    assert [stage.arguments[0] for stage in alone] == ["tests", "tests"]
    assert named_after(tmp_path, "data/sub/order.py") == []


def test_results_are_kept_told_and_recorded(tmp_path: Path) -> None:
    results = Results.at(tmp_path / "results.json")
    told = {"file": "f.py", "what": "a | b", "seconds": 2.0, "doubts": []}
    first = {**told, "origin": "drawn", "caught_by": "t.py::t", "stage": "fast"}
    results.add("a-fault", {**first, "digest": digest(fault())})
    results.add("b", {**told, "origin": "chosen", "caught_by": None, "stage": None})
    known = Results.at(tmp_path / "results.json")
    assert known.has(fault()) and not known.has(fault(new="pass"))
    text = table(known.known, {})
    assert "| `a-fault` | drawn | f.py | a \\| b | - | `t.py::t` | 2 |" in text
    assert "Now: 1 of 1 drawn, 0 of 1 chosen caught (fast 1); 4 s." in text
    assert caught([fault()], known.known) == [replace(fault(), caught_by="t.py::t")]
