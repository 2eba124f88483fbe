"""Jobs that a config can name, one file each.

| function | what it does |
|---|---|
| `describe(config)` | text for `--dry_run`; reads and writes nothing |
| `prepare(config)` | checks everything and opens what the job reads; writes nothing |
| `run(config, inputs, workdir, command)` | the job; returns the report's path |
"""

from experiments import ablation, compare, curve, deploy, table

EXPERIMENTS = {
  "flexiq": curve,
  "ablation": ablation,
  "compare": compare,
  "deploy": deploy,
  "table": table,
}
