"""Continual-learning methods, one file each; `method.py` is their contract.

A merge rule of `fastmerge.merging` is a method too: `posthoc.py` applies it after every task.
"""

from __future__ import annotations

from fastmerge.merging import RULES
from fastmerge.methods.attriclip import AttriCLIP
from fastmerge.methods.became import BECAME
from fastmerge.methods.clg_cbm import CLGCBM
from fastmerge.methods.clip_adapter import CLIPAdapter
from fastmerge.methods.cmm import CMM
from fastmerge.methods.coda import CODA
from fastmerge.methods.coop import CoOp
from fastmerge.methods.dualprompt import DualPrompt
from fastmerge.methods.ewc import EWC
from fastmerge.methods.finetune import Finetune, Joint
from fastmerge.methods.hide import HiDe
from fastmerge.methods.icarl import ICaRL
from fastmerge.methods.inflora import InfLoRA
from fastmerge.methods.l2p import L2P
from fastmerge.methods.lwf import LwF
from fastmerge.methods.maple import MaPLe
from fastmerge.methods.method import Method
from fastmerge.methods.nearest_mean import NearestMean
from fastmerge.methods.pam import PAM
from fastmerge.methods.posthoc import method_of
from fastmerge.methods.proof import Proof
from fastmerge.methods.ranpac import RanPAC
from fastmerge.methods.rapf import RAPF
from fastmerge.methods.sdlora import SDLoRA
from fastmerge.methods.slca import SLCA
from fastmerge.methods.trm import TRM
from fastmerge.methods.vpt import VPT

METHODS: dict[str, type[Method]] = {
    "trm": TRM,
    "cmm": CMM,
    "pam": PAM,
    "became": BECAME,
    "finetune": Finetune,
    "joint": Joint,
    "lwf": LwF,
    "ewc": EWC,
    "clip-adapter": CLIPAdapter,
    "coop": CoOp,
    "vpt": VPT,
    "icarl": ICaRL,
    "proof": Proof,
    "clg-cbm": CLGCBM,
    "attriclip": AttriCLIP,
    "maple": MaPLe,
    "inflora": InfLoRA,
    "l2p": L2P,
    "dualprompt": DualPrompt,
    "coda": CODA,
    "hide": HiDe,
    "sdlora": SDLoRA,
    "nearest-mean": NearestMean,
    "ranpac": RanPAC,
    "rapf": RAPF,
    "slca": SLCA,
    **{rule: method_of(rule) for rule in RULES},
}
