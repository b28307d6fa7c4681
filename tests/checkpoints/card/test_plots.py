"""The plot of ratios is drawn where matplotlib is, and not missed where it is not."""

import struct

import pytest

from optimum_otprune.checkpoints.card import plots
from optimum_otprune.errors import MissingExtraError
from optimum_otprune.pruning.tuning.sweep_results import SweepPoint, SweepResult
from tests.reports import layer_report, make_report

needs_matplotlib = pytest.mark.skipif(not plots.can_plot(), reason="matplotlib is an extra")


@needs_matplotlib
@pytest.mark.parametrize(
    "layers",
    [
        (layer_report(),),
        (layer_report(0, -30.0), layer_report(1, -0.5), layer_report(2, 0.9)),
        tuple(layer_report(index, float("nan")) for index in range(2)),
        (layer_report(0, after=4), layer_report(1, after=6)),
        tuple(layer_report(index, -2.0) for index in range(60)),
    ],
    ids=["one", "harmed", "not finite", "widths", "many"],
)
def test_any_report_gives_a_png_of_a_sensible_size(layers, tmp_path):
    plots.save_rescue_plot(make_report(layers=layers), tmp_path / "rescue.png")
    content = (tmp_path / "rescue.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 800 < width < 1600
    assert 400 < height < 700
    assert len(content) < 100_000
    assert str(tmp_path).encode() not in content


@needs_matplotlib
def test_the_same_report_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        plots.save_rescue_plot(make_report(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def curve(factor=1.1, names=("test.txt", "_$x$")) -> SweepResult:
    def point(ratio):
        return SweepPoint(ratio, (8,), 100 - int(90 * ratio), dict.fromkeys(names, 20 * factor**ratio), None, 1.0)

    failed = SweepPoint(0.9, (), 0, {}, "No.", 1.0)
    return SweepResult(point(0.0), (point(0.1), point(0.5), failed), {name: {} for name in names})


@needs_matplotlib
@pytest.mark.parametrize("factor", [1.1, 1e6])
def test_any_curve_gives_the_same_png_of_a_sensible_size_each_time(factor, tmp_path):
    for name in ("a", "b"):
        plots.save_sweep_plot(curve(factor), tmp_path / name)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (884, 546)
    assert len(content) < 100_000


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    for save, what in ((plots.save_rescue_plot, make_report()), (plots.save_sweep_plot, curve())):
        with pytest.raises(MissingExtraError, match=r"pip install 'optimum_otprune\[plots\]'"):
            save(what, tmp_path / "plot.png")
