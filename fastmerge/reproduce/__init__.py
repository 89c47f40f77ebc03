"""The tables and figures of the three papers by command: `fastmerge reproduce trm:table1`.

`trm.py`, `cmm.py` and `pam.py` say what each table or figure runs; `published.csv` has the papers' numbers; `compare.py`
sets ours beside them. `ours.py` has tables of our own.
"""

from __future__ import annotations

from fastmerge.reproduce import cmm, ours, pam, trm
from fastmerge.reproduce.target import Target

TARGETS: dict[str, Target] = {
    name: target for paper in (trm, cmm, pam, ours) for target in paper.TARGETS for name in (target.name, *target.also)
}
