"""One prepared run on an accelerator: ceilings, tests, main job, search, products, models, tiles.

    make device                       # or: python -m benchmarks.device --out build/device

`steps.py` says what runs and in which time; `driver.py` runs each step in a process of its own, so
that none can take the others with it; `records.py` is what is written. No step needs a network.
"""
