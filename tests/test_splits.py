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
        (-1, -1, "give --test_every 8.*or --test_after with"),
        (8, 10, "--test_every -1 with --test_after 10, or --test_after -1 with --test_every 8"),
        (1, -1, "no photo to train on among 20: give at least 2"),
        (-1, 19, "holds out no photo of 20: give at most 18"),
        (-1, 100, "holds out no photo of 20: give at most 18"),
        (0, -1, "at least 2, or -1 together with --test_after"),
        (-1, -2, "at least 0"),
    ],
)
def test_bad_options_are_one_sentence(test_every, test_after, message):
    with pytest.raises(InputError, match=message):
        split_indices(20, test_every=test_every, test_after=test_after)


def test_single_image_leaves_nothing_to_train_on():
    with pytest.raises(InputError, match="has 1 photo: give it two or more"):
        split_indices(1, test_every=8, test_after=-1)
