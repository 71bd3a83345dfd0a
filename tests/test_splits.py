import pytest

from datasets.splits import split_indices
from errors import InputError


@pytest.mark.parametrize(
    ("options", "test"),
    [
        ({"test_every": 8, "test_after": -1}, [0, 8, 16]),
        ({"test_every": 83, "test_after": -1}, [0]),
        ({"test_every": -1, "test_after": 15}, [16, 17, 18, 19]),
        ({"test_every": -1, "test_after": 0}, list(range(1, 20))),
    ],
)
def test_rule(options, test):
    train_ids, test_ids = split_indices(20, **options)
    assert test_ids.tolist() == test
    assert train_ids.tolist() == [i for i in range(20) if i not in test]


@pytest.mark.parametrize(
    ("test_every", "test_after", "message"),
    [
        (-1, -1, "exactly one"),
        (8, 10, "exactly one"),
        (1, -1, "no train image"),
        (-1, 19, "no test image"),
        (-1, 100, "no test image"),
        (0, -1, "at least 1"),
        (-1, -2, "at least 0"),
    ],
)
def test_bad_options_are_one_sentence(test_every, test_after, message):
    with pytest.raises(InputError, match=message):
        split_indices(20, test_every=test_every, test_after=test_after)


def test_single_image_leaves_nothing_to_train_on():
    with pytest.raises(InputError, match="no train image"):
        split_indices(1, test_every=8, test_after=-1)
