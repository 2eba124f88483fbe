"""Search on a quadratic model of the output distance: measure it, anneal on it, check it.

What others use is offered here; the modules of this folder are its own.
"""

from flexiq_jax.search.gram.flips import Flips
from flexiq_jax.search.gram.influence import Influence
from flexiq_jax.search.gram.loop import run
from flexiq_jax.search.gram.ties import Ties

__all__ = ["Flips", "Influence", "Ties", "run"]
