"""CLADO (arXiv 2307.05657): bits by what pairs of layers lose together."""

from flexiq_jax.methods.clado.method import Clado, CladoBlock, CladoDiagonal

__all__ = ["Clado", "CladoBlock", "CladoDiagonal"]
