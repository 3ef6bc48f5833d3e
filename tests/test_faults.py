"""The campaigns of tests/faults in a short form: a few moments, files and inputs of each trainer. In full they run by hand; see tests/README.md."""
import dataclasses
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import REPO, assert_one_line_error, call, load, run

if not hasattr(os, "fork"):
    pytest.skip("these campaigns fork processes", allow_module_level=True)
sys.path.insert(0, str(REPO / "tests" / "faults"))
import campaign
import inputs

RESUMED = [name for name, (_, _, resumes) in campaign.TRAINERS.items() if resumes]


def faults_of(cases):
    """What went wrong in a part of the campaign."""
    return [problem for _, problem in cases if problem]


@pytest.mark.long
@pytest.mark.parametrize("name", campaign.TRAINERS)
def test_a_run_survives_what_happens_while_it_writes(name, tmp_path):
    assert not faults_of(campaign.moments(name, 30, tmp_path, random.Random(os.getpid())))


@pytest.mark.long
@pytest.mark.parametrize("name", campaign.TRAINERS)
def test_nobody_else_may_use_the_directory_of_a_run(name, tmp_path):
    assert not faults_of(campaign.two_at_once(name, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", campaign.TRAINERS)
def test_same_seed_same_bytes_whatever_the_surroundings(name, tmp_path):
    script, flags, _ = campaign.TRAINERS[name]
    surroundings = (dict(PYTHONHASHSEED="1", LC_ALL="C", TZ="UTC"), dict(PYTHONHASHSEED="2", LC_ALL="C.UTF-8", TZ="Pacific/Apia", PYTHONUTF8="0"))
    for number, env in enumerate(surroundings):
        (tmp_path / f"elsewhere {number}").mkdir()
        process = run(REPO / script, *flags, "--out", tmp_path / str(number), cwd=tmp_path / f"elsewhere {number}", env=env)
        assert process.returncode == 0, process.stderr
        assert not list((tmp_path / f"elsewhere {number}").iterdir())
    assert not campaign.differences(tmp_path / "1", campaign.contents(tmp_path / "0"))


@pytest.mark.long
@pytest.mark.parametrize("name", campaign.TRAINERS)
def test_a_clock_that_goes_backwards_changes_nothing(name, tmp_path):
    assert not faults_of(campaign.clock(name, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_file_is_refused_or_does_no_harm(name, tmp_path):
    assert not faults_of(campaign.damaged(name, 12, tmp_path, random.Random(os.getpid())))


@pytest.mark.long
@pytest.mark.parametrize("name", campaign.EVALS)
def test_a_damaged_file_of_a_finished_run_is_refused_or_does_no_harm(name, tmp_path):
    assert not faults_of(campaign.judged(name, 40 if name in ("grpo", "rlhf") else 16, tmp_path, random.Random(os.getpid())))


@pytest.mark.long
@pytest.mark.parametrize("script", inputs.SCRIPTS)
def test_arguments_are_taken_or_refused_in_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not inputs.argument_lists(script, 40)
    assert not (tmp_path / "canary").exists()             # what "$(touch canary)" makes if a shell runs it


@pytest.mark.long
def test_damaged_data_settings_and_lines_are_taken_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not inputs.files(60, tmp_path)[1] and not inputs.lines_at_the_prompt(600)[1]


@pytest.mark.parametrize("script", [script for script, _, resumes in campaign.TRAINERS.values() if resumes])
def test_a_configuration_that_lacks_a_field_is_refused(script, tmp_path):
    """Its default would take its place, and the run would end with other results."""
    module = load(script)
    config = dataclasses.asdict(module.Config())
    for missing in (["seed"], list(config)):
        (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in missing}), encoding="utf8")
        assert_one_line_error(call(module, "--resume", tmp_path), "must be of type", "None")


# eval script: (settings, columns of metrics.csv, result in train.json) of a finished run
FINISHED = {"grpo_lm/grpo_eval.py": ("grpo_lm/weights/config.json", "update,reward,kl,entropy", dict(train_seconds=1.5)),
            "reinforce_rlhf/reinforce_rlhf_eval.py": ("reinforce_rlhf/weights/config.json", "update,reward,kl,distinct2", dict(train_seconds=1.5)),
            "kl_bernoulli_gsm8k/kl_bernoulli_eval.py": ("kl_bernoulli_gsm8k/weights/config.json", "update,sampled_accuracy,entropy,completion_length,loss",
                                                        dict(train_seconds=1.5, tests=[dict(update=0, greedy_accuracy=0.5)] * 2))}


@pytest.mark.parametrize("script", FINISHED)
def test_a_damaged_run_is_refused_before_minutes_of_sampling(script, tmp_path, monkeypatch):
    module, (settings, columns, result) = load(script), FINISHED[script]
    starts = "solve" if script.startswith("kl") else "start_answers"                # what samples
    monkeypatch.setattr(module, starts, lambda *ignored: sys.exit(7))
    (tmp_path / "policy").symlink_to(REPO / Path(settings).parent / "policy")
    whole = {"config.json": (REPO / settings).read_text(encoding="utf8"), "train.json": json.dumps(dict(result=result)),
             "metrics.csv": f"{columns}\n" + "".join(f"{k}{',0.5' * columns.count(',')}\n" for k in (1, 2, 3)),
             "samples/0001.jsonl": '{"prompt": "What is sleep?", "text": "It is a rest."}\n'}
    (tmp_path / "samples").mkdir()
    damages = {name: ["", "[1, 2]", "{}", "a,b\n1,2\n"] for name in ("config.json", "train.json", "metrics.csv")}
    damages["metrics.csv"] += [whole["metrics.csv"][:-2 * columns.count(",")]]
    damages["train.json"] += ['{"result": {}}', whole["train.json"].replace("1.5", "null")]
    damages["config.json"] += [whole["config.json"].replace("broken", "brokeo")]
    damages |= {"samples/0001.jsonl": ["", "{", "[]", "{}"]} if starts == "start_answers" else {}
    for name in [*damages, None]:                         # None: the run is whole
        for damage in damages.get(name, [None]):
            for file, text in whole.items():
                (tmp_path / file).write_text(text if file != name else damage, encoding="utf8")
            process = call(module, "--run", tmp_path)
            if name:
                assert_one_line_error(process, str(tmp_path))
                assert not (tmp_path / "curve.png").exists()
            else:
                assert process.returncode == 7 and (tmp_path / "curve.png").stat().st_size > 10_000


def code_of(pattern="*/*.py"):
    """{relative path: text} of the lessons' scripts."""
    return {str(path.relative_to(REPO)): path.read_text(encoding="utf8") for path in sorted(REPO.glob(pattern)) if path.parent.name != "tests"}


# Each would work here and fail, or do something else, on Windows or macOS, or open a door
FORBIDDEN = {r"os\.(fork|getuid|geteuid|mkfifo|killpg|setsid|getloadavg|sched_\w+)\b|\bfcntl\b|\bimport (resource|pwd|grp)\b": "only Linux has it",
             r"shell=True|os\.system|os\.popen|\beval\(|\bexec\(": "runs text as a program",
             r"trust_remote_code|weights_only=False|\bpickle\.load|np\.load\([^)]*allow_pickle=True": "runs code from a file",
             r"[\"'](/tmp|/home|/dev|/proc|~)/": "a path of one system"}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_script_has_what_other_systems_lack_or_what_runs_foreign_code(pattern):
    found = [f"{name}: {line.strip()}" for name, text in code_of().items() for line in text.split("\n")
             if re.search(pattern, line) and not re.search(r"\.eval\(\)|and eval\(\)", line)]
    assert not found, (FORBIDDEN[pattern], found)


def test_every_text_file_is_opened_with_its_encoding():
    for name, text in code_of().items():
        for line in text.split("\n"):
            if re.search(r"\b(open|read_text|write_text)\(", line) and not re.search(r"utf-?8|urlopen|devnull|Image\.open|\"[rw]b\"|def ", line):
                raise AssertionError(f"{name}: {line.strip()}")


def test_every_torch_load_reads_weights_only():
    for name, text in code_of().items():
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, (name, call)


def test_no_two_files_have_names_that_differ_by_case_only():
    for folder in [REPO, *[path for path in REPO.iterdir() if path.is_dir() and path.name != ".git"]]:
        names = [path.name.lower() for path in folder.iterdir()]
        assert len(names) == len(set(names)), folder
