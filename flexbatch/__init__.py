"""flexbatch: run language models bigger than the machine over whole datasets."""

__version__ = "0.1.0"
