"""Checks an exercise that start.py has started, and says in words what is not right yet.

    python tests/exercises/check.py cartpole rewards_to_go        the function that you wrote
    python tests/exercises/check.py cartpole --bug 1              whether the bug is gone; --reveal says where it was
    python tests/exercises/check.py cartpole discount b           notes your guess; --reveal tells the answer after your run
    python tests/exercises/check.py cartpole spread 144           a number that you measured
    python tests/exercises/check.py cartpole rewards_to_go --hint
    python tests/exercises/check.py --all [--json FILE]           everything that you have started: for you and for your teacher

Exit status: 0 right or noted, 1 not yet, 2 the command is wrong. With --json FILE the summary has one entry for each exercise, "lesson/name", with
kind, minutes, state ("solved", "not yet", "not started"), and for guesses and numbers: first, last, tries, first_right.
"""
import _thread
import argparse
import ast
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):       # small tensors: one thread is fastest
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import common
from common import LESSONS, REPO, Bug, Measure, Predict, shown
from start import wrap

SECONDS = 100                                             # longer, and it hangs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = common.fail
    parser.add_argument("lesson", nargs="?", choices=LESSONS, help="one of " + ", ".join(LESSONS), metavar="lesson")
    parser.add_argument("exercise", nargs="?", help="its name")
    parser.add_argument("answer", nargs="?", help="a letter or a number, where the exercise asks for one")
    parser.add_argument("--bug", type=int, help="a silent bug by its number")
    parser.add_argument("--hint", action="store_true", help="a hint")
    parser.add_argument("--reveal", action="store_true", help="the answer")
    parser.add_argument("--all", action="store_true", help="checks all exercises that were started")
    parser.add_argument("--json", type=Path, help="with --all: writes the summary into this file")
    parser.add_argument("--dir", type=Path, default=REPO / "runs" / "exercises", help="where start.py wrote (default: runs/exercises)")
    args = parser.parse_args()
    if args.all:
        return check_all(args)
    name = f"bug_{args.bug}" if args.bug is not None else args.exercise
    if not args.lesson or not name:
        parser.error("which exercise? `start.py` lists them; --all checks those that you have started")
    exercise = common.find(args.lesson, name)
    if args.hint:
        print(wrap(exercise.hint))
        return 0
    if isinstance(exercise, Predict):
        return check_guess(args, exercise, parser)
    if isinstance(exercise, Measure):
        return check_number(args, exercise, parser)
    if args.answer:
        parser.error(f"{exercise.name} is checked in its file and takes no answer")
    # A loop without end: an interrupt, as from the keyboard, after a while
    watch = threading.Timer(SECONDS, _thread.interrupt_main)
    watch.daemon = True
    watch.start()
    solved, words = common.check(args.lesson, exercise, args.dir / args.lesson / f"{exercise.name}.py")
    watch.cancel()
    print(words)
    if args.reveal:
        reveal(args.lesson, exercise)
    return 0 if solved else 1


def reveal(lesson, exercise):
    """Where a bug was; for the other kinds, where a solution stands."""
    trainer = common.trainer_of(lesson, exercise)
    if isinstance(exercise, Bug):
        line = trainer.read_text(encoding="utf-8").split(exercise.old)[0].count("\n") + 1
        right, wrong = (textwrap.indent(textwrap.dedent(text).strip("\n"), "    ") for text in (exercise.old, exercise.new))
        print(f"\nLine {line} of {shown(trainer)} is\n\n{right}\n\nand became\n\n{wrong}\n\n{wrap(exercise.reveal)}")
    elif isinstance(exercise, common.Blank):
        print(f"\nThe function {exercise.name} of {shown(trainer)} is a solution.")
    else:
        solution = common.HERE / "solutions" / f"{lesson}_{exercise.name}.py"
        words = (ast.get_docstring(ast.parse(solution.read_text(encoding="utf-8"))) or "") if solution.exists() else "Your teacher has not left it here."
        print(f"\nA solution: {shown(solution)}\n\n{wrap(words)}")


def check_guess(args, exercise, parser):
    noted = common.read_answers(args.dir, args.lesson).get(exercise.name)
    if args.answer:
        args.answer = args.answer.lower()
        if args.answer not in exercise.choices:
            parser.error(f"the choices are {', '.join(exercise.choices)}")
        common.note_answer(args.dir, args.lesson, exercise.name, args.answer)
        print(f"Noted: {args.answer}. Now look: {exercise.command}\nThe answer: the same command with --reveal instead of {args.answer}")
        return 0
    if not args.reveal or not noted:
        parser.error(f"first your guess, one of {', '.join(exercise.choices)}; then --reveal")
    right = noted["first"] == exercise.answer
    print(f"You guessed {noted['first']}. {'Right' if right else 'It is ' + exercise.answer}: {exercise.choices[exercise.answer]}\n\n{wrap(exercise.explanation)}")
    return 0


def check_number(args, exercise, parser):
    low, high = exercise.interval
    if args.reveal:
        print(f"Five seeds gave {', '.join(f'{value:g}' for value in exercise.values)}; {low:.4g} to {high:.4g} is right.\n\n{wrap(exercise.explanation)}")
        return 0
    try:
        value = float((args.answer or "").replace(",", "."))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        parser.error(f"the number that you measured is missing, such as 25.6; the run: {exercise.command}")
    common.note_answer(args.dir, args.lesson, exercise.name, value)
    if low <= value <= high:
        print(f"Right: from five seeds, {low:.4g} to {high:.4g} is expected (95 % interval for one more run).\n\n{wrap(exercise.explanation)}")
        return 0
    print(wrap(f"Not yet: {value:g} is too {'low' if value < low else 'high'}. Is it the quantity that is asked? {exercise.hint} "
               "(One honest run in twenty lies outside too. Try another seed.)"))
    return 1


def check_all(args):
    """Each exercise in a process of its own, so that one that hangs or breaks Python does not stop the others."""
    summary = {}
    for lesson in [args.lesson] if args.lesson else LESSONS:
        answers = common.read_answers(args.dir, lesson)
        for exercise in common.lesson_exercises(lesson):
            entry = dict(kind=exercise.kind, minutes=exercise.minutes, state="not started")
            if isinstance(exercise, (Predict, Measure)):
                noted = answers.get(exercise.name)
                if noted:
                    right = {word: is_right(exercise, noted[word]) for word in ("first", "last")}
                    entry |= noted | dict(first_right=right["first"], state="solved" if isinstance(exercise, Predict) or right["last"] else "not yet")
            elif (args.dir / lesson / f"{exercise.name}.py").exists():
                entry["state"] = "solved" if passes(args.dir, lesson, exercise) else "not yet"
            summary[f"{lesson}/{exercise.name}"] = entry
            if entry["state"] != "not started":
                print(f"{lesson:<14}{exercise.name:<28}{entry['state']}")
    solved = sum(entry["state"] == "solved" for entry in summary.values())
    print(f"{solved} of {len(summary)} exercises are solved; a guess counts as solved once it is made.")
    if args.json:
        args.json.write_text(json.dumps(dict(solved=solved, exercises=len(summary), entries=summary), indent=1) + "\n", encoding="utf-8")
    return 0


def is_right(exercise, answer):
    if isinstance(exercise, Predict):
        return answer == exercise.answer
    low, high = exercise.interval
    return low <= answer <= high


def passes(directory, lesson, exercise):
    command = [sys.executable, __file__, lesson, exercise.name, "--dir", directory]
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS + 20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


if __name__ == "__main__":
    sys.exit(main())
