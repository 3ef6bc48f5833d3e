"""Fetches the official GSM8K problems (MIT licence), and checks that they are the right ones.

    python get_gsm8k.py                      into gsm8k/ beside this script
    python get_gsm8k.py --data-dir DIR       into DIR; give it to train_kl_bernoulli.py too

7,473 problems to train on and 1,319 to test, from github.com/openai/grade-school-math
(Cobbe et al., arXiv 2110.14168). Files that are there already are kept.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = []
# ///
import argparse
import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
# File and SHA-256
GSM8K = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
         "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}


def fetch(name, checksum):
    """The content of an official file; an error if it cannot be fetched or is another one."""
    try:
        with urllib.request.urlopen(URL + name, timeout=30) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException):
        fail(f"{URL}{name} cannot be fetched; put the official file into --data-dir yourself")
    if hashlib.sha256(content).hexdigest() != checksum:
        fail(f"the file fetched is not the official {name} (its SHA-256 differs); it was not kept")
    return content


def fail(message):
    """One line that says what is wrong and what to do; exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}".replace("\n", " "), file=sys.stderr)
    raise SystemExit(2)


def write(path, content):
    """Writes a file beside its target and moves it into place: nobody ever sees half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("--data-dir", type=Path, default=HERE / "gsm8k", metavar="DIR",
                        help="where the files go (default: gsm8k beside the script)")
    parser.add_argument("--smoke", action="store_true", help="only say what would be fetched")
    args = parser.parse_args()
    for name, checksum in GSM8K.items():
        path = args.data_dir / name
        if args.smoke or path.exists():
            print(f"{path}: " + ("is there" if path.exists() else f"would come from {URL}{name}"))
            continue
        content = fetch(name, checksum)
        try:
            args.data_dir.mkdir(parents=True, exist_ok=True)
            write(path, content)
        except OSError as problem:
            fail(f"--data-dir {args.data_dir} cannot be written ({problem.strerror}); choose "
                 "another directory")
        print(f"{path}: fetched")


if __name__ == "__main__":
    main()
