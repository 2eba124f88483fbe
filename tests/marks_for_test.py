"""Parameters with a mark."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
