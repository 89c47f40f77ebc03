"""Tables of our own; docs/RESULTS.md says what those that were run show: `fastmerge reproduce ours:frozen --data-root DIR`.

Runs on embedded sets use the run folders of `--small`, so the papers' tables there share them. Two columns need real
images, as folders of DIR: `caltech101`, photographs of 101 classes (up to 30 training and 10 test images each, `train/` and
`test/`), and `emoji-styles`, 200 emoji in three styles (`colour/`, `flat/`, `mono/`, with `train/` and `test/` of different
vendors in each). docs/DATA.md has the layouts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmerge.reproduce import cmm, pam
from fastmerge.reproduce.small import domains, easy, easy_linear, hard
from fastmerge.reproduce.target import Column, Target
from fastmerge.reproduce.trm import TERMS

RULES = (
    "average",
    "task-arithmetic",
    "ties",
    "dare",
    "dare-ties",
    "magmax",
    "randmix",
    "stock",
    "slerp",
    "fisher",
    "cofima",
    "coma",
    "wise-ft",
)
PROTOCOLS = ("full", "running", "strict")
FROZEN = ("l2p", "dualprompt", "coda", "hide", "inflora", "sdlora", "clip-adapter", "ranpac", "slca")
TEXT = ("proof", "rapf", "icarl", "clg-cbm", "coop", "vpt", "maple", "attriclip:bank=5,top=2", "clip-adapter")
ENDS = ("zero-shot", "nearest-mean", "finetune", "joint")
READINGS = (  # of TRM, where the paper is open
    "trm:teacher=current",
    "trm:teacher=previous",
    "trm:scale=relative",
    "trm:energy=bounded",
    "trm:space=span",
    "trm:space=span,scale=relative",
    "trm:per=block",
    "trm:replace=none",
)
CONSTANT = "trm:lambda0=0,lambda1=0,lambda2=0,replace=none,alpha="
# Task arithmetic under `strict` sums two task vectors, so this is theta_init + 2 scale (average - theta_init).
SHRUNK = {
    f"average, {2 * scale:g} of its task vector": f"task-arithmetic:scale={scale:g}" for scale in (0.45, 0.4, 0.35)
}
STARTS = ("zero-shot", "last", "average", "ema")  # TIME: where training starts, and what is deployed
DEPLOYED = ("last", "average", "ema", "ties", "magmax")
AXES = {
    f"{deploy} from {start}": (
        f"average:init_rule={start},deploy_rule=last" if deploy == "last" else f"{deploy}:init_rule={start}"
    )
    for start in STARTS
    for deploy in DEPLOYED
}
QUALITY = ("final_accuracy", "aaa", "forgetting", "plasticity")
COST = ("train_seconds", "merge_seconds", "peak_mib", "kept_mib")


def emoji(name: str, protocol: str = "strict") -> Column:
    """Domain-incremental: emoji in three styles, test images of other vendors than the training images."""
    flags = f"--model tiny --scenario dil --head prototype --epochs 2 --protocol {protocol}"
    return Column(name, f"--dataset folder {flags}", "emoji-dil", inside="emoji-styles")


def photographs(name: str) -> Column:
    """Class-incremental photographs with a linear head, at the 32 pixels of the embedded backbone."""
    flags = "--model tiny --tasks 5 --head linear --epochs 2 --protocol strict"
    return Column(name, f"--dataset folder {flags}", "photographs-5-linear", inside="caltech101")


def emoji_classes(name: str) -> Column:
    """Class-incremental: the same emoji, 40 a task in all styles at once, with a linear head."""
    flags = "--model tiny --tasks 5 --head linear --epochs 2 --protocol strict"
    return Column(name, f"--dataset folder {flags}", "emoji-5-linear", inside="emoji-styles")


def budget(name: str, epochs: int) -> Column:
    """Class-incremental characters with a budget of training; retention is measured on the harder ones."""
    flags = f"--dataset glyphs --tasks 5 --protocol full --epochs {epochs} --no-nearest-mean --retain glyphs-hard"
    return Column(name, flags, f"glyphs-5-epochs-{epochs}")


def with_flags(column: Column, name: str, more: str) -> Column:
    """`column` with flags of its own, in a folder of its own."""
    words = "-".join(word.strip("-").replace(".", "") for word in more.split())
    return replace(column, name=name, flags=f"{column.flags} {more}", folder=f"{column.folder}-{words}")


def named(*rows: str) -> dict[str, str]:
    """Rows whose name is what they run."""
    return {row: row for row in rows}


def own(
    name: str, title: str, columns: tuple[Column, ...], rows: dict[str, str] | tuple[str, ...], **more: Any
) -> Target:
    rows = rows if isinstance(rows, dict) else named(*rows)
    return Target(f"ours:{name}", title, "our own", columns, columns, rows, **{"metrics": QUALITY, **more})


TARGETS = (
    own(
        "protocols",
        "Merge rules under three storage protocols, class-incremental characters",
        tuple(easy(protocol, protocol=protocol) for protocol in PROTOCOLS),
        (*ENDS, "trm", "became", "lwf", "ewc", *RULES),
        metrics=(*QUALITY, "kept_mib"),
    ),
    own(
        "protocols-domains",
        "Merge rules under three storage protocols, emoji in three styles",
        tuple(emoji(protocol, protocol=protocol) for protocol in PROTOCOLS),
        (*ENDS, "trm", "lwf", "ewc", *RULES),
        metrics=(*QUALITY, "kept_mib"),
    ),
    own(
        "frozen",
        "Methods that train all weights and methods with a frozen backbone",
        (
            easy("characters"),
            hard("harder characters"),
            emoji("emoji in three styles, domain-incremental"),
            photographs("photographs, linear head"),
        ),
        (*ENDS, "trm", "cmm", "pam", *FROZEN, "average", "magmax"),
        metrics=(*QUALITY, *COST),
    ),
    own(
        "text",
        "Methods with the text tower and methods that keep images",
        (easy("characters"),),
        ("zero-shot", *TEXT),
        metrics=(*QUALITY, *COST),
        needs={"clg-cbm": "--clg-cbm.concepts"},
    ),
    own(
        "trm-choice",
        "Readings of TRM on held-out training images",
        tuple(
            with_flags(column, column.name, "--validation 0.2")
            for column in (
                easy("characters"),
                hard("harder characters"),
                domains("characters, three families of typefaces"),
                photographs("photographs, linear head"),
            )
        ),
        named("average", "trm", *READINGS, f"{CONSTANT}0.35", f"{CONSTANT}0.65") | SHRUNK,
        metrics=("final_accuracy", "aaa"),
        seeds=1,
        against="average",
    ),
    own(
        "trm",
        "Readings of TRM and averaging on images on which none was chosen",
        (
            emoji("emoji in three styles, domain-incremental"),
            emoji_classes("emoji, class-incremental, linear head"),
        ),
        named(
            "average",
            "trm",
            "trm:teacher=current",
            "trm:scale=relative",
            "trm:energy=bounded",
            "trm:space=span,scale=relative",
            f"{CONSTANT}0.65",
        )
        | SHRUNK,
        metrics=("final_accuracy", "aaa"),
        seeds=8,
        against="average",
    ),
    own(
        "trm-terms",
        "Table 3 of TRM under its readings, beside the published numbers",
        (
            hard("as published"),
            *(
                with_flags(hard(name), name, more)
                for name, more in (
                    ("teacher current", "--trm.teacher current"),
                    ("teacher previous", "--trm.teacher previous"),
                    ("scale relative", "--trm.scale relative"),
                    ("energy bounded", "--trm.energy bounded"),
                    ("space span", "--trm.space span"),
                )
            ),
        ),
        {"a": "randmix"} | TERMS,
        metrics=("final_accuracy",),
        seeds=1,
        beside=("trm:table3", "ImageNet-R, 10 tasks"),
    ),
    own(
        "time",
        "Where training starts and what is deployed (TIME), at two budgets",
        (budget("one epoch a task", 1), budget("four epochs a task", 4)),
        AXES,
        metrics=("final_accuracy", "aaa", "forgetting", "forward_transfer", "retention"),
    ),
    own(
        "lora",
        "P&M and other merges of LoRA at the paper's learning rate and at ten times it",
        (
            with_flags(easy_linear(""), "characters, rate 1e-3", "--lr 1e-3 --pam.lr 1e-3"),
            with_flags(easy_linear(""), "characters, rate 1e-2", "--lr 1e-2 --pam.lr 1e-2"),
            with_flags(photographs(""), "photographs, rate 1e-2", "--lr 1e-2 --pam.lr 1e-2"),
        ),
        pam.MERGES | pam.PARTS,
    ),
    own(
        "stages",
        "What each part of CMM adds, characters in three families of typefaces",
        (domains("characters", protocol="full"),),
        cmm.PARTS,
        metrics=(*QUALITY, "kept_mib"),
        against="FT",
    ),
)
