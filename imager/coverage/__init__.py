"""The coverage proof: a filesystem's own tools must not miss a byte that its map calls unused.

``view`` serves a volume without its unused bytes, ``files`` reads a mounted one, ``inside`` opens
containers, ``proof`` runs them and the checkers, and judges.
"""

from __future__ import annotations

from imager.coverage.inside import Holding
from imager.coverage.proof import prove, prove_layouts

__all__ = ["Holding", "prove", "prove_layouts"]
