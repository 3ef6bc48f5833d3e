"""Helpers of the tests: scripts are loaded from their files, as a reader would run them; nothing is a package."""
import contextlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

# One thread per process, before anything loads torch, and for every process that a test starts: pytest runs two workers, and threads of
# several processes that fight for two cores make a test ten times as slow.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without this, every model name that is no directory waits half a minute for a hub that a test may not ask anyway
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell starts a background command deaf to Ctrl-C, and every process that a test starts would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ["cartpole_reinforce", "lunarlander_ppo", "tictactoe_actorcritic", "spo_dummy", "grpo_lm", "kl_bernoulli_gsm8k",
           "reinforce_rlhf"]


def load(relative):
    """The module in a script's file."""
    path = REPO / relative
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module               # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script, *arguments, cwd=None, env=None, timeout=300):
    """Runs a script in a process of its own, without a display. Returns the completed process, output as text."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], cwd=cwd, env=environment | (env or {}),
                          capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


def call(module, *arguments, cwd=None):
    """Like run(), but inside this process, which saves importing torch: for errors that end a script early."""
    out, err, argv, here = io.StringIO(), io.StringIO(), sys.argv, os.getcwd()
    sys.argv = [module.__file__, *map(str, arguments)]
    os.chdir(cwd or here)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except Exception as problem:                          # as the last lines of every script do it
        refused = isinstance(problem, (OSError, MemoryError, UnicodeError, FloatingPointError))
        if not refused and not re.search("enforce|I/O error|of memory|Parent dir", str(problem)):
            raise
        with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            module.fail(str(problem) or "out of memory")
        status = 2
    finally:
        sys.argv = argv
        os.chdir(here)
    return subprocess.CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())


def assert_one_line_error(process, *words):
    """Exit status 2, one line on stderr, no traceback, and the words in it."""
    assert process.returncode == 2, (process.returncode, process.stdout, process.stderr)
    assert process.stderr.count("\n") == 1, process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


@pytest.fixture(scope="session")
def repo():
    return REPO


def without_device(flags):
    """Flags without --device cpu: how a user without a GPU starts several processes."""
    return [flag for flag in flags if flag not in ("--device", "cpu")]
