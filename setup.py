"""Which folders are packages; everything else is in pyproject.toml.

`kernels/` is a source root, not a package: `kernels` is the import name of a Hugging Face package that transformers
imports, and a package of that name would shadow it.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["veripo_fast", "veripo_fast.*"])
    + find_packages("kernels", include=["veripo_kernels", "veripo_kernels.*"]),
    package_dir={"veripo_kernels": "kernels/veripo_kernels"},
    package_data={"veripo_fast": ["tiny_policy/*", "report_assets/*"]},
    include_package_data=False,
)
