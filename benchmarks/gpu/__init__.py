"""`python -m benchmarks gpu`: checks and measures everything on a GPU that is available for minutes.

| file | holds |
|---|---|
| `command.py` | the options, and the loop over the steps |
| `steps.py` | the table of steps: what each runs, its share of the time, the number that matters |
| `answers.py` | those numbers, from the rows that a step wrote |
| `process.py` | a step as a separate process with a time limit |
| `report.py`, `files.py` | the table at the end and its file; files on a disk that may be full |
| `recorder.py` | a plugin of pytest: a row for each test, on disk when the test ends |
| `shares.py` | expected shares of a copy's bandwidth, beside the measured ones |
| `library.py` | builds the compiled library where it is missing |
| `stand_in.py` | without a GPU: a stand-in for its driver, which counts compilations or launches |
| `compilations.py` | without a GPU: the number of kernels that Triton compiles for each step |
"""
