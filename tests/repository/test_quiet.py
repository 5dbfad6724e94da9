"""tests/conftest.py: who is alone is alone, and what is made once is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import json, os, time
from pathlib import Path
import pytest

def spend(name, seconds):
    begun = time.monotonic()
    time.sleep(seconds)
    Path(os.environ["SEEN"], name).write_text(json.dumps([begun, time.monotonic()]))

@pytest.mark.alone
@pytest.mark.parametrize("number", range(3))
def test_alone(number):
    spend(f"alone-{number}", 0.1)

@pytest.mark.parametrize("number", range(12))
def test_beside(number, once):
    folder = once("thing", lambda folder: (folder / str(os.getpid())).touch())
    assert len(list(folder.iterdir())) == 1
    spend(f"beside-{number}", 0.1)
"""


def test_who_needs_quiet_has_it(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEN", str(tmp_path))
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = alone: quiet")
    ran = pytester.runpytest_subprocess("-n", "3", "--dist", "worksteal", "-p", "no:randomly")
    ran.assert_outcomes(passed=15)
    times = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*-*")}
    alone = {name for name in times if name.startswith("alone")}
    beside = times.keys() - alone
    assert len(alone) == 3 and len(beside) == 12
    for name in alone:
        others = times.keys() - {name}
        assert [o for o in others if meet(times[name], times[o])] == []
    assert any(meet(times[a], times[b]) for a in beside for b in beside - {a}), "nobody ran beside"


def meet(one: list[float], other: list[float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
