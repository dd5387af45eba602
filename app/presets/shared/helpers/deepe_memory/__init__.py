"""Forecast the memory of a training before the weights of its base model are loaded.

Only the standard library is needed: the service forecasts with the same figures as the scripts.
"""

from .base import Base as Base
from .base import Unforeseeable as Unforeseeable
from .base import base_of as base_of
from .base import read_base as read_base
from .fitting import LARGE as LARGE
from .fitting import cure as cure
from .fitting import free_main_memory as free_main_memory
from .fitting import longest_allowed as longest_allowed
from .fitting import recomputes as recomputes
from .fitting import refusal as refusal
from .fitting import step_of as step_of
from .forecast import CONTEXT as CONTEXT
from .forecast import MIB as MIB
from .forecast import Head as Head
from .forecast import Memory as Memory
from .forecast import Step as Step
from .forecast import forecast as forecast
from .forecast import in_words as in_words
