"""A read-only NBD server for sources of blocks."""

from imager.serve.server import ImageServer

__all__ = ["ImageServer"]
