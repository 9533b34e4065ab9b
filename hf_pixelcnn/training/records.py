"""Facts about a run that belong next to its results."""

import ctypes
import functools
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from ..version import __version__

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


def git_commit() -> str | None:
    """Commit of this package, with `+changes` if files differ from it; `None` where it is not what git tracks."""
    here = Path(__file__).resolve()

    def git(*words):
        done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails if only a folder further up is somebody's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def keep_freed_memory():
    """
    Let glibc keep the memory that tensors free for the next ones, instead of returning it to the system after each
    step: on a CPU, fresh memory costs a page fault for every 4 KiB, a quarter of the time of a training step. Without
    glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of mallopt(3)
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 * 2**20)  # the largest value it accepts
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 * 2**20)


@functools.cache
def seconds_of_product(dtype: torch.dtype) -> float:
    """The least time that the CPU takes for a matrix product, of a few."""
    a, seconds = torch.ones(512, 512, dtype=dtype), []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """
    Whether bfloat16 products are worth using. A CPU without instructions for them takes some 100 times as long as in
    float32, and there are virtual ones that have such instructions and take twice as long.
    """
    if torch.device(device).type != "cpu":
        return True
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return seconds_of_product(torch.bfloat16) < 1.3 * seconds_of_product(torch.float32)


def public_words(words: list[str]) -> list[str]:
    """Words of a command line without options that are secrets."""
    public, is_value = [], False
    for word in words:
        is_secret = word.startswith("--") and word.split("=")[0].endswith(("_token", "_key", "_password"))
        if not is_secret and not is_value:
            public.append(word)
        is_value = is_secret and "=" not in word
    return public


def run_facts(device: torch.device | str) -> dict:
    """Command line without secrets, commit, versions and hardware of this process."""
    is_cuda, threads = torch.device(device).type == "cuda", torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if is_cuda else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *public_words(sys.argv[1:])]),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "hf_pixelcnn": __version__}
        | {name: metadata.version(name) for name in PACKAGES},
        "device": name,
    }
