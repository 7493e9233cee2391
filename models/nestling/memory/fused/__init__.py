"""The memory operations as Triton kernels: backend "triton" of `nestling.memory`.

Importing this package does not import Triton; `nestling.memory.backends` says when it can be used.
"""
