"""What surrounds a run: its workdir, checkpoints, progress, processes, tables, pictures, report."""
