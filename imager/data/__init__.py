"""Data backups beside the image: run by another tool, named in the manifest, brought back later."""
