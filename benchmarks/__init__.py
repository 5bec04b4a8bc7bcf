"""Benchmarks: every file of a folder is a script, and its rows are in results/NAME.

* training: does training get better, and in which situation?
* flatness: does flatness tell who generalises?
* speed: what does a method cost, in time and memory?
* faults: does it break?

The modules beside the folders are what the scripts share. A script is started from the
root of the checkout:

    python -m benchmarks.speed.step_time --smoke
"""
