"""A wheel of veripo_kernels alone: `pip wheel ./kernels --no-deps --no-build-isolation` in a checkout of veripo-fast.

How csrc/ is compiled stands in ../setup.py, and the version in ../veripo_fast/__init__.py. The wheel of veripo-fast
holds veripo_kernels too: install one of the two.
"""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path("..")
if not (ROOT / "setup.py").is_file():
    raise SystemExit("veripo_kernels is built in a checkout of veripo-fast: ../setup.py says how csrc/ is compiled")
SHARED = runpy.run_path(str(ROOT / "setup.py"), run_name="kernels")
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "veripo_fast" / "__init__.py").read_text("utf-8"), re.MULTILINE)

setup(
    version=VERSION[1],
    packages=find_packages(include=["veripo_kernels", "veripo_kernels.*"]),
    package_data={"veripo_kernels": ["py.typed"]},
    include_package_data=False,
    ext_modules=SHARED["EXTENSIONS"],
    cmdclass=SHARED["COMMANDS"],
)
