"""The settings of the methods, a dataclass each, in files by family; `config.py` has those of a run."""
