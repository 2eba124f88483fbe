"""The server: the Open Inference Protocol over HTTP, images, metrics, and a live page.

What is here needs the extra `serve`; the engine behind it does not.
"""

from flexiq_jax.serving.server.app import create_app
from flexiq_jax.serving.server.limits import Limits
from flexiq_jax.serving.server.listening import Listening, bind
from flexiq_jax.serving.server.live import Shown
from flexiq_jax.serving.server.model import Model

__all__ = ["Limits", "Listening", "Model", "Shown", "bind", "create_app"]
