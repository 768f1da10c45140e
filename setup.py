"""Maps the repository's top-level folders to import names; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("benchmarks", "kernels", "recipes")

setup(
    packages=[
        *find_packages(include=["featkd", "featkd.*"]),
        *(f"featkd.{folder}" for folder in FOLDERS),
    ],
    package_dir={f"featkd.{folder}": folder for folder in FOLDERS},
    package_data={
        "featkd": ["py.typed", "*/templates/*", "ptx/runtime/*.h"],
        "featkd.recipes": ["*.yaml"],
    },
)
