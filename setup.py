"""What pyproject.toml cannot say: nothing of a build stays in this folder.

Of an older one in ``build/`` setuptools would install what has been removed since.
"""

import tempfile

from setuptools import setup

with tempfile.TemporaryDirectory() as folder:
    setup(options={"build": {"build_base": folder}})
