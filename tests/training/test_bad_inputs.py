"""Of each kind of input that a user hands over, many bad ones are tried.

`test_bad_inputs_of_main.py` looks at some of each kind from outside the process.
"""

from __future__ import annotations

from tests.data.test_bad_data import DAMAGES, ENTRIES, WRITES
from tests.support.refusals import SETTINGS
from training.config import HOST_KEYS

from .test_bad_deepspeed_json import JSONS, SCALARS
from .test_bad_flags import FLAGS, NUMBERS
from .test_bad_plans import HOSTFILES, PLANS
from .test_bad_recipes import NO_YAML, RECIPES


def test_there_are_enough_of_them() -> None:
    counted = {
        "flags": len(FLAGS) + len(SETTINGS) + len(NUMBERS),
        "recipes": len(NO_YAML) + len(RECIPES) + len(SETTINGS) + 2,
        "host files": len(NO_YAML) + len(SETTINGS) - len(HOST_KEYS) + 1,
        "hostfiles": len(HOSTFILES),
        "plans": len(PLANS),
        "data": 2 * len(DAMAGES) + len(ENTRIES) + 6 + 8 + 4,
        "data.write": len(WRITES),
        "DeepSpeed's JSON": len(JSONS) + 3 + len(SCALARS),
    }
    assert sum(counted.values()) >= 200, counted
    by_hand = (FLAGS, NO_YAML, RECIPES, HOSTFILES, PLANS, ENTRIES, WRITES, JSONS)
    assert sum(map(len, by_hand)) >= 200
    assert min(counted.values()) >= 15, counted
