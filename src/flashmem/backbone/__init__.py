"""The only code that touches DeepSeek-V4's modeling code: adapter, per-session state, prefill and decode forwards.

Pages are read and written through the protocols of `types`; this folder does not know the store.
"""

from .adapter import Backbone, LSAAttention
from .load import load_model
from .state import SessionState, StatePool
from .twin import random_model, skeleton_model

__all__ = ["Backbone", "LSAAttention", "SessionState", "StatePool", "load_model", "random_model", "skeleton_model"]
