"""Benchmarks: every file of a folder is a script, named after its folder of results/.

* training: does training get better, in which situation?
* flatness: does flatness tell who generalises?
* speed: what does a method cost, in time and memory?
* faults: does it break?

The modules beside the folders are what the scripts share. Scripts are started from the
root of the repository:

    python -m benchmarks.speed.step_time --smoke
"""
