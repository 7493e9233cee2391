"""Memory operations: linear layers and small MLPs that learn while they read a sequence.

`delta_scan` runs one linear layer as a Delta-Gradient-Descent memory, `self_modifying_scan` the five memories of a
self-modifying Titans layer, `titans_scan` the long-term memory of Titans. All are exact for every backend: `reference`
is the equations token by token, `chunked` the same result from batched matrix products. Only torch is needed.
"""

from nestling.memory.delta import delta_scan
from nestling.memory.self_modifying import memory_gates, self_modifying_scan
from nestling.memory.state import MEMORIES, MemoryState
from nestling.memory.titans import TitansState, titans_scan

__all__ = [
    "MEMORIES",
    "MemoryState",
    "TitansState",
    "delta_scan",
    "memory_gates",
    "self_modifying_scan",
    "titans_scan",
]
