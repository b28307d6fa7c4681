"""`python -m optimum_otprune`."""

from optimum_otprune.commands.main import main

main()
