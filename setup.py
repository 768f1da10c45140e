"""Maps the repository's top-level folders to import names; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["featkd", "featkd.*"]), "featkd.recipes", "featkd.kernels"],
    package_dir={"featkd.recipes": "recipes", "featkd.kernels": "kernels"},
    package_data={
        "featkd": ["py.typed", "*/templates/*", "ptx/runtime/*.h"],
        "featkd.recipes": ["*.yaml"],
    },
)
