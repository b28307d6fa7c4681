"""Packaging; metadata that is no code lives in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["optimum_otprune", "optimum_otprune.*"]), "optimum.commands.register"],
    # optimum-cli finds subcommands in the namespace package `optimum.commands.register`.
    package_dir={"optimum.commands.register": "optimum_otprune/_optimum_register"},
    package_data={"optimum_otprune": ["py.typed", "templates/*", "demo_model/*"]},
    zip_safe=False,
)
