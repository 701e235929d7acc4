"""Step times of common model shapes, measured with random weights: files named by device, and the script behind them.

Weights do not change how long a step takes; acceptance is not in these files and cannot be.
"""

FILE_VERSION = 1  # 1: the first form
