"""Makes the environment that runs vLLM on the processor: `python -m tests.lanes.vllm_env`.

A virtual environment beside the other lanes: the CPU build asks for packages for sound and pictures, which
text needs none of, so its needs are installed from its own list without these.
"""

import shutil
import subprocess
import sys
import time
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

from tests.lanes.install import call_it_for_cpus
from tests.lanes.places import RUNNING, Lane

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def needs_of(wheel: Path) -> list[str]:
    """What the wheel's own list asks for on this machine, without what text needs not."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        asked = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    needs = [Requirement(one) for one in asked]
    wanted = [one for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in wanted:
        one.marker = None
    return [str(one) for one in wanted if one.name.lower() not in LEFT_OUT]


def make(lane: Lane) -> float:
    """Seconds it took; a place without its mark is made anew."""
    began = time.perf_counter()
    shutil.rmtree(lane.folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(lane.folder)], check=True)
    pip = [str(lane.python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *lane.needs], check=True)
    wheels = lane.folder / "wheels"
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(wheels), lane.package], check=True)
    wheel = next(wheels.glob("*.whl"))
    subprocess.run([*pip, "install", "--quiet", *lane.needs, *needs_of(wheel)], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "triton"], check=True)  # a need of a need; has no CPU part
    shutil.rmtree(wheels)
    call_it_for_cpus(next(lane.folder.glob("lib/python*/site-packages")), lane.version)
    lane.mark()
    return time.perf_counter() - began


def main() -> None:
    done = "there already" if RUNNING.is_whole else f"{make(RUNNING):.0f} s"
    sys.stdout.write(f"vLLM {RUNNING.version}: {done}; python: {RUNNING.python}\n")


if __name__ == "__main__":
    main()
