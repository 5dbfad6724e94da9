"""Which tests are tried on a fault, in which order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .listing import Fault

SELF = "tests/repository/test_faults.py"  # fails with any fault, as its text is no longer there


@dataclass(frozen=True)
class Stage:
    """A name, and what pytest is given."""

    name: str
    arguments: tuple[str, ...]


def stages(
    root: Path, fault: Fault, tests: list[str] | None = None, *, subject_only: bool = False
) -> list[Stage]:
    """What is tried, from the likeliest to fail to the whole suite; or only ``tests``."""
    if tests:
        return [Stage("asked for", tuple(tests))]
    found = []
    if fault.caught_by and (node := there(root, fault.caught_by)):
        found.append(Stage("recorded", (node,)))
    if named := named_after(root, fault.file):
        found.append(Stage("named", tuple(named)))
    subject = subject_of(root, fault.file)
    found.append(Stage("fast", (subject, "-m", "not slow")))
    found.append(Stage("slow", (subject, "-m", "slow")))
    if subject != "tests" and not subject_only:
        found.append(Stage("rest", ("tests", f"--ignore={subject}")))
    return found


def subject_of(root: Path, file: str) -> str:
    """The folder of the tests of a file's package; all tests where it has none."""
    folder = f"tests/{PurePosixPath(file).parts[0]}"
    return folder if any((root / folder).rglob("test_*.py")) else "tests"


def named_after(root: Path, file: str) -> list[str]:
    """The test files that have the name of a file, or, in its subject, of its inner folder."""
    path, tests, subject = PurePosixPath(file), root / "tests", root / subject_of(root, file)
    package, *folders = path.parent.parts
    places = [(tests, path.stem), (tests, f"{package}_{path.stem}")]
    places += [(subject, folder) for folder in folders]
    found = {
        test.relative_to(root).as_posix()
        for place, name in places
        for test in place.rglob(f"test_{name}*.py")
    }
    return sorted(found - {SELF})


def there(root: Path, node: str) -> str | None:
    """A test's id, also where its file has been moved to another folder; None if it is gone."""
    file, _, name = node.partition("::")
    if (root / file).is_file():
        return node
    others = list((root / "tests").rglob(PurePosixPath(file).name))
    return f"{others[0].relative_to(root)}::{name}" if len(others) == 1 else None
