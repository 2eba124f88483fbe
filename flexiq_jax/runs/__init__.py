"""What surrounds a run: its workdir, checkpoints, progress, processes, tables, pictures, report.

Its modules are for use from outside, one by one: each loads libraries that the others do not.
"""
