"""What several tests of recovery need."""

import pytest

from optimum_otprune.models import training


@pytest.fixture
def steps(monkeypatch):
    """Count steps; the one of the number that is set stops the run."""
    add = training.Stepper.add
    found = {"taken": 0, "stop": None}

    def counting(*args):
        found["taken"] += 1
        if found["taken"] == found["stop"]:
            raise KeyboardInterrupt
        add(*args)

    monkeypatch.setattr(training.Stepper, "add", counting)
    return found
