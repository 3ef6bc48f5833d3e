"""Starts an exercise: prints what is asked, and writes the file to work on.

    python tests/exercises/start.py                            all lessons, all exercises
    python tests/exercises/start.py cartpole                   the exercises of one lesson
    python tests/exercises/start.py cartpole rewards_to_go     writes runs/exercises/cartpole/rewards_to_go.py
    python tests/exercises/start.py cartpole --bug 1           the same as cartpole bug_1

Then `python tests/exercises/check.py`, with the same words after it, says whether it is right. A file that exists is kept; --again writes it anew.
"""
import argparse
import shlex
import sys
import textwrap
from pathlib import Path

import common
from common import LESSONS, REPO, Measure, Predict, shown


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = common.fail
    parser.add_argument("lesson", nargs="?", choices=LESSONS, help="one of " + ", ".join(LESSONS), metavar="lesson")
    parser.add_argument("exercise", nargs="?", help="its name, as the list prints it")
    parser.add_argument("--bug", type=int, help="a silent bug by its number")
    parser.add_argument("--again", action="store_true", help="writes the file anew; what was in it is lost")
    parser.add_argument("--dir", type=Path, default=REPO / "runs" / "exercises", help="where the files go (default: runs/exercises)")
    args = parser.parse_args()
    name = f"bug_{args.bug}" if args.bug is not None else args.exercise
    if not name:
        for lesson in [args.lesson] if args.lesson else LESSONS:
            show_list(lesson)
        return
    if not args.lesson:
        parser.error("which lesson? one of " + ", ".join(LESSONS))
    exercise = common.find(args.lesson, name)
    show(args, exercise)


def show_list(lesson):
    print(lesson)
    for exercise in common.lesson_exercises(lesson):
        print(f"  {exercise.name:<28}{exercise.minutes:>4} min   {exercise.kind}")


def show(args, exercise):
    """What is asked, and how to have it checked."""
    command = f"python {shown(common.HERE)}/check.py {args.lesson} {exercise.name}".replace("\\", "/")
    if args.dir.resolve() != REPO / "runs" / "exercises":
        command += f" --dir {shlex.quote(str(args.dir))}"
    print(f"{args.lesson} · {exercise.name} · {exercise.kind} · {exercise.minutes} minutes\n")
    if isinstance(exercise, (Predict, Measure)):
        print(wrap(exercise.question))
        if isinstance(exercise, Predict):
            for letter, words in exercise.choices.items():
                print(textwrap.fill(f"{letter}) {words}", 100, initial_indent="  ", subsequent_indent="     "))
            print(f"\nFirst your guess:  {command} {'|'.join(exercise.choices)}\nThen look:         {exercise.command}")
            print(f"Then the answer:   {command} --reveal")
        else:
            print(f"\nRun:    {exercise.command}\nCheck:  {command} NUMBER")
        return
    path = args.dir / args.lesson / f"{exercise.name}.py"
    if path.exists() and not args.again:
        print(f"{shown(path)} is there already; --again writes it anew.\n")
    else:
        path = common.start(args.lesson, exercise, args.dir)
    print(wrap(getattr(exercise, "symptom", "") or exercise.asks).replace("runs/exercises", str(shown(args.dir))))
    print(f"\nFile:   {shown(path)}\nCheck:  {command}\nHint:   {command} --hint")


def wrap(text):
    """Paragraphs of at most 100 columns; lines that begin with a blank stay as they are."""
    lines, paragraph = [], []
    for line in [*text.strip().split("\n"), ""]:
        if line and not line.startswith(" "):
            paragraph.append(line)
            continue
        lines += [*textwrap.wrap(" ".join(paragraph), 100, break_on_hyphens=False), line]
        paragraph = []
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
