"""An OpenAI-compatible proxy that keeps every group within its token quotas.

Flat, one noun a file, imports only downward; CONTRIBUTING.md has the table of contents.
Importing any of it does nothing.
"""

__version__ = "0.1.0"
