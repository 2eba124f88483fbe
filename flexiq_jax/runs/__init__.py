"""What surrounds a run: its workdir, checkpoints, progress, processes, tables, pictures, report.

Code elsewhere imports these modules one by one: each loads libraries that the others do not.
"""
