"""Compare the metrics and the evaluation loop with values worked out by hand."""

import pytest
import torch

from fastmerge.data.cache import TaskImages
from fastmerge.evaluate import accuracies, batches, macro, metrics, micro, zero_shot

# three tasks with 10, 30 and 60 test images
R = [
    [90.0, None, None],
    [60.0, 80.0, None],
    [70.0, 50.0, 95.0],
]
N = [10, 30, 60]


def test_averages():
    assert macro([60.0, 80.0]) == 70.0
    assert micro([60.0, 80.0], [10, 30]) == 75.0  # (6 + 24) / 40
    assert micro([60.0, 80.0], [20, 20]) == macro([60.0, 80.0])
    assert micro([None, 80.0], [10, 30]) == 80.0
    assert macro([None]) is None and micro([None], [3]) is None


def test_hand_computed_matrix():
    m = metrics(R, N)
    assert m["final_accuracy"] == pytest.approx((7 + 15 + 57) / 100 * 100)
    assert m["final_accuracy_macro"] == pytest.approx((70 + 50 + 95) / 3)
    assert m["aaa"] == pytest.approx((90 + 75 + 79) / 3)
    assert m["aaa_macro"] == pytest.approx((90 + 70 + 215 / 3) / 3)
    assert m["forgetting"] == pytest.approx(((90 - 70) + (80 - 50)) / 2)
    assert m["forgetting_before_last"] == pytest.approx(((90 - 70) + (80 - 50)) / 2)
    assert m["bwt"] == pytest.approx(((70 - 90) + (50 - 80)) / 2)
    assert m["plasticity"] == pytest.approx((90 + 80 + 95) / 3)


def test_the_two_forgettings_differ_where_the_last_row_is_the_best():
    improved = [[50.0, None], [80.0, 70.0]]
    m = metrics(improved, [1, 1])
    assert m["forgetting"] == 0.0  # the maximum includes the last row
    assert m["forgetting_before_last"] == -30.0  # Chaudhry: may be negative
    assert m["bwt"] == 30.0


def test_upper_triangle_takes_no_part():
    """A domain-incremental matrix is full, but the metrics use only the tasks seen."""
    full = [[90.0, 11.0, 12.0], [60.0, 80.0, 13.0], [70.0, 50.0, 95.0]]
    assert metrics(full, N) == metrics(R, N)


def test_one_task_has_no_forgetting():
    m = metrics([[42.0]], [7])
    assert m["final_accuracy"] == m["aaa"] == m["plasticity"] == 42.0
    assert m["forgetting"] is None and m["forgetting_before_last"] is None and m["bwt"] is None


def test_nothing_evaluated():
    assert set(metrics([], [])) == set(metrics(R, N)) and not any(metrics([], []).values())


class Toy:
    """A learner that predicts the class number that an image's first pixel holds."""

    device = torch.device("cpu")

    class config:  # noqa: N801 (stands in for a Config)
        class training:  # noqa: N801
            batch_size = 2

    @staticmethod
    def without_gradient(function, images):
        return function(images)

    @staticmethod
    def backbone(images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 6).float()

    @staticmethod
    def head(features, classes):
        return features[:, classes]


def toy_tests():
    """Return three test sets, the second one empty; `pairs` has (predicted class, true class) of every image."""
    pairs = [[(0, 0), (1, 0), (1, 1)], [], [(4, 4), (0, 4), (5, 5), (5, 5)]]
    return [
        TaskImages(
            torch.tensor([p for p, _ in test], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1),
            torch.tensor([y for _, y in test], dtype=torch.int64),
            0,
        )
        for test in pairs
    ]


def test_accuracies_and_zero_shot():
    tests = toy_tests()
    assert accuracies(Toy, tests, [5, 0, 1, 4]) == [pytest.approx(200 / 3), None, 75.0]
    # row 0 has None for the third test set, whose classes are not all candidates
    matrix = zero_shot(Toy, tests, [[0, 1], [0, 1, 4, 5]])
    assert matrix == [[pytest.approx(200 / 3), None, None], [pytest.approx(200 / 3), None, 75.0]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_batches_span_the_test_sets(size):
    tests = toy_tests()
    got = list(batches(tests, size))
    assert [len(labels) for _, labels, _ in got] == [size] * (7 // size) + [7 % size] * (7 % size > 0)
    assert torch.equal(torch.cat([labels for _, labels, _ in got]), torch.cat([t.labels for t in tests]))
    assert torch.cat([test for *_, test in got]).tolist() == [0, 0, 0, 2, 2, 2, 2]
