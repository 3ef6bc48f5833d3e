"""Every exercise: what is left blank or planted fails, the solution passes, and each typical wrong answer is recognised."""
import contextlib
import io
import json
import sys

import pytest
import torch

from conftest import REPO, load, run

EXERCISES = REPO / "tests" / "exercises"
sys.path.insert(0, str(EXERCISES))
import common
from common import Blank, Bug, Extend, Measure, Predict

ALL = [(lesson, exercise) for lesson in common.LESSONS for exercise in common.lesson_exercises(lesson)]


def of_kind(kind):
    return pytest.mark.parametrize("lesson, exercise", [pair for pair in ALL if isinstance(pair[1], kind)],
                                   ids=lambda value: value if isinstance(value, str) else value.name)


def module_of(text, path):
    path.write_text(text, encoding="utf-8")
    return common.load(path)


def original(lesson, exercise):
    return common.load(common.trainer_of(lesson, exercise))


@pytest.mark.parametrize("lesson", common.LESSONS)
def test_each_lesson_has_all_five_kinds_and_at_least_six_exercises(lesson):
    exercises = common.lesson_exercises(lesson)
    assert {type(exercise) for exercise in exercises} == {Blank, Bug, Predict, Measure, Extend}
    assert len(exercises) >= 6
    assert len({exercise.name for exercise in exercises}) == len(exercises)
    assert [e.number for e in exercises if isinstance(e, Bug)] == list(range(1, 1 + sum(isinstance(e, Bug) for e in exercises)))


@of_kind(Blank)
def test_a_blank_fails_and_the_trainers_function_passes(lesson, exercise, tmp_path):
    text = common.starting_file(lesson, exercise)
    module = module_of(text, tmp_path / "blank.py")
    solved, words = common.judge_blank(exercise, getattr(module, exercise.name), exercise.cases(module))
    assert not solved and "still blank" in words
    module = original(lesson, exercise)
    solved, words = common.judge_blank(exercise, getattr(module, exercise.name), exercise.cases(module))
    assert solved, words


@of_kind(Blank)
def test_each_typical_wrong_answer_is_recognised(lesson, exercise):
    assert len(exercise.wrong) >= 3
    module = original(lesson, exercise)
    for hint, mistake in exercise.wrong.items():
        solved, words = common.judge_blank(exercise, mistake, exercise.cases(module))
        assert not solved, hint
        assert words.endswith(hint), (hint, words)


@of_kind(Blank)
def test_the_blank_does_not_hold_its_answer(lesson, exercise):
    """No line of the function's body stands in the docstring of the blank."""
    source = common.trainer_of(lesson, exercise).read_text(encoding="utf-8")
    node = common.definitions(source)[exercise.name]
    body = [line.split("#")[0].strip() for line in source.split("\n")[node.body[0].end_lineno:node.end_lineno]]
    assert not [line for line in body if len(line) > 12 and line in exercise.asks]


@of_kind(Bug)
def test_a_planted_bug_is_noticed_by_its_own_check_and_only_there(lesson, exercise, tmp_path):
    module = module_of(common.starting_file(lesson, exercise), tmp_path / "bug.py")
    solved, words = common.check_bug(lesson, exercise, module)
    assert not solved and words.startswith("The bug is still there") and "it stopped" not in words and "test stopped" not in words, words
    solved, words = common.check_bug(lesson, exercise, original(lesson, exercise))
    assert solved, words


@pytest.mark.parametrize("lesson, exercise", [pytest.param(lesson, exercise, id=f"{lesson}-{exercise.name}") for lesson, exercise in ALL
                                              if isinstance(exercise, Extend)])
def test_an_extension_is_refused_before_it_is_made_and_its_solution_passes(lesson, exercise, tmp_path):
    solution = EXERCISES / "solutions" / f"{lesson}_{exercise.name}.py"
    if not solution.exists():
        pytest.skip("the folder of solutions was left out")
    path = common.start(lesson, exercise, tmp_path)
    solved, words = common.check(lesson, exercise, path)
    assert not solved, words
    path.write_text(common.weave(path.read_text(encoding="utf-8"), solution.read_text(encoding="utf-8")), encoding="utf-8")
    solved, words = common.check(lesson, exercise, path)
    assert solved, words


@of_kind((Predict, Measure))
def test_questions_are_complete(lesson, exercise):
    assert exercise.explanation and exercise.hint and exercise.command.startswith("python ")
    script = exercise.command.split()[1]
    assert (REPO / script).exists() or script == "-c", script
    if isinstance(exercise, Predict):
        assert exercise.answer in exercise.choices and len(exercise.choices) >= 3
    else:
        assert len(exercise.values) == 5


def test_a_student_goes_through_one_exercise_of_each_kind(tmp_path, monkeypatch):
    scripts = {name: load(f"tests/exercises/{name}") for name in ("start.py", "check.py")}

    def script(name, *words):
        """(exit status, what was printed), inside this process, which saves importing torch."""
        monkeypatch.setattr(sys, "argv", [name, "cartpole", *words, "--dir", str(tmp_path)])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                status = scripts[name].main()
            except SystemExit as stop:
                status = stop.code
        return status or 0, printed.getvalue()

    assert "rewards_to_go.py" in script("start.py", "rewards_to_go")[1]
    status, words = script("check.py", "rewards_to_go")
    assert status == 1 and "still blank" in words
    path = tmp_path / "cartpole" / "rewards_to_go.py"
    path.write_text(path.read_text(encoding="utf-8").replace('raise NotImplementedError("rewards_to_go is still blank")', "return rewards"), encoding="utf-8")
    status, words = script("check.py", "rewards_to_go")
    assert status == 1 and "is expected" in words
    assert "there already" in script("start.py", "rewards_to_go")[1] and "return rewards" in path.read_text(encoding="utf-8")
    path.write_text("def rewards_to_go(:\n", encoding="utf-8")
    assert "cannot be read" in script("check.py", "rewards_to_go")[1]

    assert script("start.py", "--bug", "1")[0] == 0
    status, words = script("check.py", "--bug", "1", "--reveal")
    assert status == 1 and "The bug is still there" in words and "alive &=" in words

    assert script("check.py", "discount", "--reveal")[0] == 2                 # no answer before a guess
    assert script("check.py", "discount", "a")[0] == 0
    assert "You guessed a. It is b" in script("check.py", "discount", "--reveal")[1]
    assert script("check.py", "spread", "12")[0] == 1 and script("check.py", "spread", "140")[0] == 0
    assert script("check.py", "spread", "many")[0] == 2 and script("start.py", "no-such")[0] == 2

    summary = tmp_path / "summary.json"
    process = run(EXERCISES / "check.py", "--all", "--json", summary, "--dir", tmp_path)
    assert process.returncode == 0, process.stderr
    entries = json.loads(summary.read_text())["entries"]
    assert entries["cartpole/rewards_to_go"]["state"] == entries["cartpole/bug_1"]["state"] == "not yet"
    assert entries["cartpole/spread"] == dict(kind="measure", minutes=10, state="solved", first=12.0, last=140.0, tries=2, first_right=False)
    assert entries["cartpole/discount"]["first_right"] is False and entries["cartpole/critic"]["state"] == "not started"


@pytest.mark.parametrize("lesson", common.LESSONS)
def test_the_readme_lists_the_exercises(lesson):
    """Section 8 has one row for each, in the same order, with the same minutes and the kind."""
    text = (REPO / common.LESSONS[lesson][0] / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## 8 ·")[1].split("\n## 9 ·")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == [exercise.name for exercise in common.lesson_exercises(lesson)]
    for row, exercise in zip(rows, common.lesson_exercises(lesson)):
        assert row[1].lower().startswith("**" + exercise.kind.split(",")[0]), row
        assert row[2] == str(exercise.minutes), row


@pytest.mark.parametrize("new", ["    loss.backward()\n    optimizer.zero_grad()\n", "    optimizer.zero_grad()\n    (0 * loss).backward()\n"])
def test_a_repair_that_breaks_something_else_is_refused(new, tmp_path):
    path = common.start("cartpole", common.find("cartpole", "bug_2"), tmp_path)
    assert common.check("cartpole", common.find("cartpole", "bug_2"), path) == (False, "The bug is still there: the file is as it was in the beginning.")
    path.write_text(path.read_text(encoding="utf-8").replace("    loss.backward()\n", new), encoding="utf-8")
    solved, words = common.check("cartpole", common.find("cartpole", "bug_2"), path)
    assert not solved and ("table of a short run" in words or "still there" in words), words
    path.write_text(common.trainer_of("cartpole").read_text(encoding="utf-8"), encoding="utf-8")
    assert common.check("cartpole", common.find("cartpole", "bug_2"), path)[0]


def test_what_a_function_can_do_instead_of_returning():
    cases = [common.Case("ones", (torch.ones(2, 3), 0.5), torch.ones(2, 3))]
    exercise = common.find("cartpole", "rewards_to_go")

    def judged(function):
        solved, words = common.judge_blank(exercise, function, cases)
        assert not solved
        return words

    def changes(rewards, gamma):
        rewards += 1
        return rewards - 1

    def ends(rewards, gamma):
        raise SystemExit("bye")

    def interrupted(rewards, gamma):
        raise KeyboardInterrupt

    assert "is `return` missing?" in judged(lambda rewards, gamma: None)
    assert "changes its argument `rewards`" in judged(changes)
    assert "SystemExit: bye (line" in judged(ends) and "had not come to an end (line" in judged(interrupted)
    assert "the shape [2, 3] is expected, [3, 2] came" in judged(lambda rewards, gamma: rewards.T)
    assert "6 of 6 numbers are wrong; the first stands in row 0, column 0: 1 is expected, 2 came" in judged(lambda rewards, gamma: rewards + 1)
    assert "NotImplementedError" in judged(lambda rewards, gamma: torch.ones(2).bool() | torch.ones(2))
