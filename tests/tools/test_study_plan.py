"""Which runs are chosen, and their order."""

import re
from dataclasses import replace

import pytest
from study_cases import cell, preset

from engine.errors import UserError
from tools.study_plan import check_preset, needs, plan_runs, select_cells, with_teachers

STUDENT = cell("student", teacher="teacher", baseline="alone")
TEACHER = cell("teacher", teacher="grand")
GRAND, ALONE = cell("grand"), cell("alone")
FAMILY = preset(STUDENT, ALONE, TEACHER, GRAND, seeds=(0, 1))


def planned(cells, finished=(), weights=(), seeds=(0, 1)):
    runs = plan_runs(FAMILY, cells, seeds, finished, lambda c, seed: (c.name, seed) in weights)
    return [f"{run.cell.name}{run.seed}" + ("again" if run.again else "") for run in runs]


def test_seed_by_seed_and_teachers_first():
    assert planned(FAMILY.cells) == [
        *("grand0", "teacher0", "student0", "alone0"),
        *("grand1", "teacher1", "student1", "alone1"),
    ]


def test_teachers_are_added():
    assert planned([STUDENT], seeds=(3,)) == ["grand3", "teacher3", "student3"]
    assert [c.name for c in with_teachers(FAMILY, [ALONE, STUDENT])] == [
        *("grand", "teacher", "alone", "student")
    ]


def test_finished_runs_are_left_out():
    done = {("grand", 0), ("teacher", 0), ("alone", 0)}
    assert planned(FAMILY.cells, done, weights={("teacher", 0)}, seeds=(0,)) == ["student0"]
    assert planned([ALONE], done, seeds=(0,)) == []


def test_a_finished_teacher_without_weights_is_trained_again_if_needed():
    done = {("grand", 0), ("teacher", 0)}
    assert planned([STUDENT], done, weights={("grand", 0)}, seeds=(0,)) == [
        *("teacher0again", "student0")
    ]
    assert planned([STUDENT], done, seeds=(0,)) == ["grand0again", "teacher0again", "student0"]
    assert planned([STUDENT], {*done, ("student", 0)}, seeds=(0,)) == []
    assert planned([TEACHER], done, seeds=(0,)) == []


def test_a_backbone_is_trained_first_and_once():
    body = cell("body")
    matrix = replace(FAMILY, backbone=body)

    def planned(finished, weights, seeds=(4, 5)):
        runs = plan_runs(matrix, [ALONE], seeds, finished, lambda c, s: (c.name, s) in weights)
        return [(run.cell.name, run.seed, run.again) for run in runs]

    rest = [("alone", 4, False), ("alone", 5, False)]
    assert planned(set(), set()) == [("body", 0, False), *rest]
    assert planned({("body", 0)}, {("body", 0)}) == rest
    assert planned({("body", 0)}, set()) == [("body", 0, True), *rest]
    assert planned({("alone", 4), ("alone", 5)}, set()) == []
    assert needs(matrix, body) == []
    assert needs(matrix, STUDENT) == [body, TEACHER]
    assert needs(FAMILY, ALONE) == []
    with pytest.raises(UserError, match="two cells are named 'alone'"):
        check_preset(replace(FAMILY, backbone=ALONE))


def test_cells_are_chosen_by_name_or_pattern():
    assert select_cells(FAMILY, []) == FAMILY.cells
    assert select_cells(FAMILY, ["*a*", "student"]) == (STUDENT, ALONE, TEACHER, GRAND)
    assert select_cells(FAMILY, ["al*"]) == (ALONE,)
    with pytest.raises(UserError, match=re.escape("'studnt' (did you mean 'student'?)")):
        select_cells(FAMILY, ["alone", "studnt"])


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([cell("a"), cell("a")], "two cells are named 'a'"),
        ([cell("long"), cell("b", teacher="lang")], "the teacher of 'b' is 'lang'"),
        ([cell("b", baseline="c")], "the baseline of 'b' is 'c', which is no cell"),
        ([cell("a", teacher="b"), cell("b", teacher="a")], "'a' is a teacher of itself"),
        ([cell("x", teacher="a"), cell("a", teacher="a")], "teacher of itself"),
    ],
)
def test_a_wrong_matrix_is_refused(cells, said):
    with pytest.raises(UserError, match=re.escape(said)):
        check_preset(preset(*cells))


def test_a_right_matrix_passes():
    check_preset(FAMILY)
