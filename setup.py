"""Packaging; metadata that is no code lives in pyproject.toml."""

from setuptools import find_packages, setup

DATA = ["optimum_otprune.demo_model", "optimum_otprune.templates"]  # folders of files without code

setup(
    packages=[
        *find_packages(include=["optimum_otprune", "optimum_otprune.*"]),
        *DATA,
        "optimum.commands.register",
    ],
    # optimum-cli finds subcommands in the namespace package `optimum.commands.register`.
    package_dir={"optimum.commands.register": "optimum_otprune/_optimum_register"},
    package_data={"optimum_otprune": ["py.typed"], **dict.fromkeys(DATA, ["*"])},
    zip_safe=False,
)
