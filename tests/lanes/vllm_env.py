"""Makes the environments that run vLLM on the processor: `python -m tests.lanes.vllm_env [vllm] [triton]`, or both.

A virtual environment beside the other lanes: the CPU build asks for packages for sound and pictures, which
text needs none of, so its needs are installed from its own list without these. In a folder of its own Triton, with the
backend `cpu` of `triton_cpu/`: its interpreter then runs the kernels of Model Runner V2, which GPUs use.
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
from tests.lanes.places import HERE, RUNNING, TRITON, Lane

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
    subprocess.run([*pip, "install", "--quiet", "--no-compile", *lane.needs], check=True)
    wheels = lane.folder / "wheels"
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(wheels), lane.package], check=True)
    wheel = next(wheels.glob("*.whl"))
    subprocess.run([*pip, "install", "--quiet", "--no-compile", *lane.needs, *needs_of(wheel)], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-compile", "--no-deps", str(wheel)], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "triton"], check=True)  # a need of a need; has no CPU part
    shutil.rmtree(wheels)
    call_it_for_cpus(next(lane.folder.glob("lib/python*/site-packages")), lane.version)
    lane.mark()
    return time.perf_counter() - began


def make_triton(lane: Lane) -> float:
    """As `make`, for Triton."""
    began = time.perf_counter()
    shutil.rmtree(lane.folder, ignore_errors=True)
    pip = [str(RUNNING.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    pip += ["--no-compile", "--no-deps"]
    subprocess.run([*pip, "--target", str(lane.folder), lane.package], check=True)
    shutil.copytree(HERE / "triton_cpu", lane.folder / "triton/backends/cpu", ignore=shutil.ignore_patterns("__pyc*"))
    interpreter = lane.folder / "triton/runtime/interpreter.py"
    source = interpreter.read_text(encoding="utf-8")  # np.nanargmax raises on a row of NaN, which vLLM's dummy run has
    interpreter.write_text(source.replace("np.nanarg", "np.arg"), encoding="utf-8")
    lane.mark()
    return time.perf_counter() - began


def main() -> None:
    lanes = {"vllm": (RUNNING, make), "triton": (TRITON, make_triton)}
    for name in sys.argv[1:] or lanes:
        lane, make_lane = lanes[name]
        try:
            done = "there already" if lane.is_whole else f"{make_lane(lane):.0f} s"
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{name} {lane.version}: it cannot be installed here: {' '.join(str(error).split())[:160]}")
        sys.stdout.write(f"{name} {lane.version}: {done}; {lane.folder}\n")


if __name__ == "__main__":
    main()
