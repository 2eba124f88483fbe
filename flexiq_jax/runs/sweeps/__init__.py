"""Sweeps: many runs, each an ordinary command in a workdir of its own, and one table of their rows.

| module | what it is |
|---|---|
| `cells` | a run of a sweep: name, workdir, command, estimates, what is missing |
| `locks` | who runs a cell, so that two sweeps never run one twice |
| `work` | one attempt at a cell: process, log, how it ended |
| `states` | how far a cell is, read from its workdir |
| `executors` | where cells run: on this machine, under SLURM, or by hand |
| `board` | the live table |
| `collect` | the rows of all cells in one CSV, with their provenance |
| `layouts` | tables of collected rows in Markdown and LaTeX |
"""
