"""Makes the lanes: `python -m tests.lanes.install [FORM[=VERSION] ...]`, all of them without a name.

A lane that is whole is left alone. Compiled kernels are dropped: a config class needs none, and they are most of it.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.lanes.places import LANES, Lane


def wanted(names: list[str]) -> list[Lane]:
    """The lanes a name stands for: `vllm`, or one release as `vllm=0.32.0`."""
    return [lane for lane in LANES if not names or {lane.form, f"{lane.form}={lane.version}"} & set(names)]


def install(lane: Lane) -> float:
    """Seconds it took; a lane is made beside its place and moved there when whole."""
    began = time.perf_counter()
    making = lane.folder.with_name(f"{lane.folder.name}.making")
    for folder in (making, lane.folder):
        shutil.rmtree(folder, ignore_errors=True)
    making.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    binary = ["--no-deps", "--only-binary", ":all:", "--target", str(making)]
    subprocess.run([*pip, *binary, *lane.packages], check=True)
    if lane.form == "vllm":
        for kernel in (making / "vllm").rglob("*.so"):
            kernel.unlink()
        call_it_for_cpus(making, lane.version)
    making.rename(lane.folder)
    lane.mark()
    return time.perf_counter() - began


def call_it_for_cpus(folder: Path, version: str) -> None:
    """Names the CPU build in a folder of packages as vLLM looks for it.

    vLLM asks its package `vllm` for the version, and takes the CPU as its device where that says so.
    """
    for metadata in folder.glob(f"vllm-{version}*.dist-info"):
        shutil.rmtree(metadata)
    named = folder / f"vllm-{version}+cpu.dist-info"
    named.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (named / "METADATA").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FORM[=VERSION]", help="vllm, sglang, llamacpp; or one release")
    lanes = wanted(parser.parse_args().names)
    if not lanes:
        parser.error(f"no such lane; there are {', '.join(f'{lane.form}={lane.version}' for lane in LANES)}")
    for lane in lanes:
        done = "there already" if lane.is_whole else f"{install(lane):.0f} s"
        sys.stdout.write(f"{lane.form} {lane.version}: {done}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
