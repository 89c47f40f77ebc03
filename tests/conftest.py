"""Shared by all tests: no test may reach the network, and none writes outside its temporary folder."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
