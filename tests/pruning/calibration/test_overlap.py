"""Windows that hold text which was seen before are counted, whatever the windows' lengths."""

import pytest
import torch

from optimum_otprune.errors import ReportError
from optimum_otprune.pruning.calibration.overlap import count_shared, count_sketched, passage_sketch, seen_windows

TEXT = torch.randint(1000, (6400,), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(1000, (6400,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("seqlen", "other"), [(64, 64), (64, 160), (160, 64), (40, 3200), (32, 50), (20, 64)])
def test_windows_of_the_same_text_are_seen_whatever_their_lengths(seqlen, other):
    windows = TEXT.view(-1, seqlen)
    assert count_shared(windows, TEXT[7 : 7 + 6392 // other * other].view(-1, other)) > len(windows) / 4
    assert count_shared(windows, OTHER.view(-1, other)) == 0


def test_a_window_is_seen_if_32_tokens_in_a_row_are():
    windows = torch.stack([OTHER[:64], OTHER[64:128]])
    for length, seen in ((31, 0), (32, 1)):
        windows[1, 10 : 10 + length] = TEXT[100 : 100 + length]
        assert count_shared(windows, TEXT.view(1, -1)) == seen


def test_padding_is_no_passage():
    padded, other = torch.full((2, 80), 5), torch.full((1, 80), 5)
    padded[:, :9], other[:, :9] = TEXT[:9], OTHER[:9]
    assert count_shared(padded, other) == 0
    assert count_shared(padded, padded[:1]) == 2


def test_a_sketch_knows_the_text_later():
    sketch = passage_sketch(TEXT.view(-1, 64))
    assert len(sketch) == 256
    assert sketch == passage_sketch(TEXT.view(-1, 64).flip(0))
    assert 40 < count_sketched(TEXT.view(-1, 64), sketch) <= 100
    assert count_sketched(TEXT.view(-1, 3200), sketch) == 2
    assert count_sketched(OTHER.view(-1, 64), sketch) == 0
    assert seen_windows(OTHER.view(-1, 64), None, sketch) == {}  # a sketch cannot tell that nothing was seen
    assert seen_windows(OTHER.view(-1, 64), TEXT.view(-1, 64), sketch) == {"seen_windows": 0}
    assert passage_sketch(TEXT.view(-1, 20)) == []
    assert seen_windows(TEXT.view(-1, 20), None, sketch) == seen_windows(TEXT.view(-1, 64), None, None) == {}


@pytest.mark.figure("R6")
@pytest.mark.parametrize("sketch", [3, "00", [1], ["zz"], ["0" * 17], {"a": 1}])
def test_a_sketch_that_is_none_is_refused(sketch):
    with pytest.raises(ReportError, match="`calibration.passages` of the report are no list of hashes of 16 digits"):
        count_sketched(TEXT.view(-1, 64), sketch)
