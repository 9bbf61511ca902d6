"""One page about a repository: its servers, their images, and what speaks against each."""
