"""Trained memories of the field, to compare CCM with: same LoRA, same rules, same reader.

They differ in one thing, what a block of slots h(t) is made from. Each file has a compressor that says so
(:meth:`ccm.Compressor.blocks`), and the method of the same name.
"""

from .autocompressor import SoftPrompts
from .compressive import Pooled
from .gisting import Whole
from .gisting_online import Alone
from .recurrent import Baseline

#: Kind of adapter -> the compressor that it is for.
BASELINES: dict[str, type[Baseline]] = {made.kind: made for made in (Alone, Whole, Pooled, SoftPrompts)}
