"""What the domain models' votes make of public and written texts."""

from __future__ import annotations

import numpy as np
import pytest

from promptfed.strategies.proposal import N_CONFUSED, contrasting
from promptfed.strategies.race import Race
from tests.support import bench


def test_the_labels_that_votes_can_t_tell_apart_get_the_clear_texts_that_are_nearest_to_the_border() -> None:
    votes = np.array(
        [
            [0.90, 0.05, 0.05],  # clearly of label 0
            [0.70, 0.28, 0.02],  # of label 0, with something of 1
            [0.05, 0.90, 0.05],
            [0.30, 0.68, 0.02],  # of label 1, with something of 0
            [0.02, 0.02, 0.96],
            [0.50, 0.49, 0.01],  # not clear at all
        ]
    )

    pairs = contrasting(votes, [[0, 1], [2, 3], [4]])

    assert pairs[0] == ((1, 0), (3, 1))  # 0 and 1 are confused most
    assert len(pairs) == 3
    assert all(label in (0, 1, 2) for pair in pairs for _, label in pair)


def test_a_label_without_a_clear_text_has_no_contrast() -> None:
    votes = np.full((3, 3), 1 / 3)

    assert contrasting(votes, [[0], [], [2]]) == [((0, 0), (2, 2))]
    assert contrasting(np.zeros((0, 3)), [[], [], []]) == []


@pytest.mark.parametrize("contrasts", [False, True])
def test_race_shows_contrasts_where_it_is_asked_to(contrasts: bool) -> None:
    scene = bench(10, 10, topics=True)

    scene.drive(Race(contrasts=contrasts).run(scene.federation(max_fm_calls=1200)), 1200)

    told = [event for event in scene.events.events if event["kind"] == "contrasts"]
    assert len(told) == int(contrasts)
    if contrasts:
        assert 0 < len(told[0]["pairs"]) <= N_CONFUSED
        for pair in told[0]["pairs"]:
            assert pair[0][1] != pair[1][1]
