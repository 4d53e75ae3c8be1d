"""rdpo: a Ray-distributed trainer for refined Direct Preference Optimization (arXiv 2402.08005).

Importing this package loads neither torch, ray, vllm nor deepspeed; the rooms that need them
import them when they are used.
"""

__version__ = "0.1.0"
