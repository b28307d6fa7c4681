"""Packaging; metadata that is no code lives in pyproject.toml."""

from setuptools import find_packages, setup

DEMO_MODEL = "optimum_otprune.commands.demo_model"  # a folder of files without code

setup(
    packages=[
        *find_packages(include=["optimum_otprune", "optimum_otprune.*"]),
        DEMO_MODEL,
        "optimum.commands.register",
    ],
    # optimum-cli finds subcommands in the namespace package `optimum.commands.register`.
    package_dir={"optimum.commands.register": "optimum_otprune/commands/_optimum_register"},
    package_data={
        "optimum_otprune": ["py.typed"],
        "optimum_otprune.checkpoints.card": ["*.md"],
        "optimum_otprune.checkpoints.comparison": ["*.html"],
        "optimum_otprune.models": ["*.txt"],
        DEMO_MODEL: ["*"],
    },
    zip_safe=False,
)
