"""fastmerge: continual learning by model merging, in one process, to one model. See `python -m fastmerge --help`."""

__version__ = "0.1.0"
