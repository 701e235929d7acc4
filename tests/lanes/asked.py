"""Puts the lines of a question before one lane's `judge`: run by `places.ask` as the lane's own process.

The lane's module is loaded from its file, because the path is the engine's alone and nothing of this project is on it.
Question on stdin, answers as the last line of stdout.
"""

import importlib.util
import json
import sys
from pathlib import Path


def main() -> None:
    spec = importlib.util.spec_from_file_location("lane", Path(__file__).with_name(f"{sys.argv[1]}_lane.py"))
    lane = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lane)
    question = json.load(sys.stdin)
    answers = [lane.judge(question, words) for words in question["lines"]]
    sys.stdout.write(f"{json.dumps(answers)}\n")


if __name__ == "__main__":
    main()
