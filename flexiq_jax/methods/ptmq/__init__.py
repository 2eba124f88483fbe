"""PTMQ: several widths from one post-training reconstruction (Xu et al., AAAI 2024)."""

from flexiq_jax.methods.ptmq.method import Ptmq
from flexiq_jax.methods.ptmq.settings import PtmqSettings

__all__ = ["Ptmq", "PtmqSettings"]
