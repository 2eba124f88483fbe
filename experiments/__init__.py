"""Jobs that a config can name: one file each, `run(config, workdir, writer, command)`."""

from experiments import flexiq

EXPERIMENTS = {"flexiq": flexiq}
