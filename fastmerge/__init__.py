"""fastmerge: continual learning by model merging. One process, one model at the end. Run `python -m fastmerge --help`."""

__version__ = "0.1.0"
