"""Every setting: its default, its unit, its source. `parse()` turns flags (and a config file) into a checked `Config`.

    python -m fastmerge --help
    python -m fastmerge --config runs/glyphs-cil10/config.json --seeds 0 1 2     # flags win over the file

Settings whose default depends on another one are None until `resolve()` fills them; `config.json` of a run holds the
resolved values, so it repeats the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fastmerge.errors import UserError, nearest


@dataclass
class DataSettings:
    dataset: str = "glyphs"
    """glyphs (embedded) | folder | imagenet1k | cifar100 | cifar10."""
    data_root: str | None = None
    """Folder that holds the dataset; never written to."""
    split_file: str | None = None
    """For --dataset folder without train/ and test/: file that says which image belongs to which."""
    download: bool = False
    """Allow downloads (datasets through torchvision, weights from their hub). Without it nothing is fetched."""
    skip_bad_images: bool = False
    """Go on without unreadable images and count them; otherwise the first one is an error."""
    crop_scale: float = 0.9
    """Smallest area of the random training crop; 0.9 is open_clip's train transform, 0.05 PILOT's."""
    flip: bool | None = None
    """Random horizontal flips in training. Default: only where the dataset says that a flip keeps the class."""
    cache_gb: float = 8.0
    """Decoded images (uint8, on the device) up to this many GB each for training and test; beyond it they are streamed."""


@dataclass
class ScenarioSettings:
    scenario: Literal["cil", "dil"] = "cil"
    """Class-incremental: new classes per task. Domain-incremental: all classes, a new domain per task."""
    tasks: int | None = None
    """Number of tasks. Default: 10 (cil; 5 for glyphs), one per domain (dil)."""
    class_order: str = "1993"
    """natural | 1993 (numpy's permutation of that seed, PyCIL/PILOT) | a file of class names or indices (dil: domains)."""
    validation: float = 0.0
    """Hold this part of every class's training images out and evaluate on it in place of the test images: for choosing
    settings. 0: train on all, evaluate on the test images."""
    eval_classes: Literal["seen", "all"] = "seen"
    """Candidate classes at test time: those seen so far (usual), or all of the dataset (magmax's code)."""


@dataclass
class ModelSettings:
    model: str | None = None
    """tiny (embedded) | any open_clip model | any timm ViT. Default: tiny for glyphs, else ViT-B-16-quickgelu."""
    pretrained: str | None = None
    """Tag | checkpoint file | none (random weights). Default: glyphs for tiny, openai for ViT-B-16-quickgelu."""
    head: Literal["text", "linear", "prototype"] | None = None
    """Frozen text embeddings | a linear layer that grows | class means of the starting model. Default: text if possible."""


@dataclass
class TrainingSettings:
    method: tuple[str, ...] = ("trm", "finetune")
    """One or more of: trm, cmm, pam; the merge rules average, task-arithmetic, ties, dare, dare-ties, magmax, randmix, stock,
    slerp, fisher, cofima, coma, wise-ft (each with --protocol); the baselines finetune, joint, lwf, ewc, clip-adapter,
    nearest-mean.
    NAME:SETTING=VALUE,... runs a method with settings of its own, as in cmm:lam=0.3 cmm:lam=0.5 or cmm:tangent=false."""
    protocol: tuple[Literal["full", "running", "strict"], ...] = ("strict",)
    """What a merge rule may keep. full: all models, trained without regard to merging. running: the un-merged model to train
    on, and the merged one. strict: the merged model alone, which starts the next task (TRM, Fig. 1: A, B, C)."""
    init: Literal["sequential", "independent"] = "sequential"
    """Where training starts under --protocol full: at the last task's un-merged model, or at the starting weights."""
    keep_trajectory: bool = False
    """Keep the un-merged models of every task in the run folder (one file per task) until you delete them, so that merge
    rules that are named later need no training. Otherwise they are deleted when the command is done."""
    seeds: tuple[int, ...] = (0,)
    """One run per method and seed."""
    epochs: int | None = None
    """Training epochs per task. Default: 15 (TRM, Implementation Details); 1 with the tiny model."""
    merge_epochs: int | None = None
    """Epochs of a method's merging phase. Default: 5 (TRM, Implementation Details); 1 with the tiny model."""
    batch_size: int | None = None
    """Images per step. Default: 128 (TRM); 64 with the tiny model."""
    lr: float | None = None
    """Peak learning rate of AdamW, cosine to zero. Default: 1e-5 (TRM); 6e-4 with the tiny model."""
    lora_rank: int = 0
    """Train LoRA of this rank on the key and value projections, folded into the model after every task; 0: all weights. For
    every method that trains as usual; P&M has --pam.rank."""
    warmup_steps: int = 0
    """Steps of linear warm-up in every task. 500 in the released code of MagMax and CMM, where most tasks are shorter."""
    head_lr: float = 1e-2
    """Learning rate of a linear head (P&M, Implementation Details)."""
    weight_decay: float = 0.1
    """AdamW weight decay (TRM)."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off. 1.0 as in the released code of MagMax; the TRM paper is silent."""


@dataclass
class RunSettings:
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """auto: cuda if there is one."""
    run_dir: str | None = None
    """Results go here; the same command continues a stopped run. Default: runs/<dataset>-<scenario><tasks>-<model>."""
    save_every: float = 60.0
    """Seconds between checkpoints inside a task; one is also written after every phase."""
    quiet: bool = False
    """Print only the final table and errors."""


@dataclass
class TRMSettings:
    replace: Literal["anchored", "literal", "none"] = "anchored"
    """Reading of the random replacement. `literal` (the paper's words) diverges over tasks: see methods/trm.py."""
    replace_ratio: float = 0.6
    """Fraction of replaced entries (paper, Fig. 7)."""
    lambda1: float = 0.1
    """Weight of prediction consistency (eq. 14)."""
    lambda2: float = 0.01
    """Weight of the gradient energy (eq. 14)."""
    layer_b: int | None = None
    """b of eq. 7, counted from 1. The paper leaves it open; default: half the layers."""
    alpha: float = 0.5
    """Start of the search; 0 is the previous model, 1 the new one. The paper leaves it open."""
    beta: float = 0.0
    """Start of the orthogonal coefficient, in units of theta. The paper leaves it open."""
    lr: float = 0.01
    """Adam step of alpha and beta (constant). The paper leaves it open."""
    direction: Literal["task", "epoch"] = "task"
    """One random direction P per task, or a new one per search epoch (beta then restarts). The paper leaves it open."""
    curvature: Literal["exact", "difference"] = "exact"
    """Gradient of eq. 13 by an exact Hessian-vector product, or by a symmetric difference of gradients (fused attention)."""
    merge_first: bool = False
    """Also merge after the first task (the paper's two phases are for tasks t > 0)."""


@dataclass
class TaskArithmeticSettings:
    scale: float = 0.4
    """Factor of the summed task vectors (Ilharco et al., without validation)."""


@dataclass
class TiesSettings:
    density: float = 0.2
    """Part of the entries that trimming keeps (paper)."""
    scope: Literal["global", "tensor"] = "global"
    """Trim over the whole vector (paper, released code) or every tensor for itself (mergekit, peft)."""
    keep: Literal["exactly", "at least"] = "exactly"
    """Entries at the threshold: exactly as many as the density says, or all of them (released code)."""
    zero: Literal["majority", "positive", "negative"] = "majority"
    """Sign at exactly zero mass: the majority's (released code) or positive (mergekit, peft)."""
    scale: float = 1.0
    """Factor of the merged task vector; 1 without validation (paper), 0.55 in MagMax's code."""


@dataclass
class DareSettings:
    p: float = 0.1
    """Probability of dropping an entry (released code)."""
    scale: float = 1.0
    """Factor of the averaged task vectors (released code); not read by dare-ties."""


@dataclass
class MagMaxSettings:
    scale: float = 0.5
    """Factor of the merged task vector (released code)."""
    ties: Literal["later", "earlier"] = "later"
    """Which task wins where two entries have the same magnitude; later in the released code."""


@dataclass
class FisherSettings:
    accumulate: Literal["sum", "ema", "last"] = "sum"
    """How --method fisher keeps the Fishers of the past: their sum (Matena & Raffel), their moving average, the last one."""
    lam: float = 0.5
    """Weight of the new model for ema and last."""
    labels: Literal["model", "data"] = "model"
    """For every diagonal Fisher (fisher, cofima, ewc): labels drawn from the model's prediction, which is the Fisher
    information, or those of the data, the empirical Fisher (CoFiMA)."""
    per: Literal["sample", "batch"] = "sample"
    """Mean of squared gradients of single images, or squared mean gradients of batches (released CoFiMA)."""
    images: int | None = None
    """Use this many images of a task, drawn at random. Default: all."""
    floor: float = 0.0
    """Added to every entry of a Fisher; 1e-6 in MergeLM. 0: where all Fishers are 0, models are averaged plainly."""


@dataclass
class CofimaSettings:
    accumulate: Literal["last", "ema", "sum"] = "last"
    """The last two Fishers (released code), or the accumulated Fisher (the paper's equation)."""
    lam: float = 0.5
    """Weight of the new model (released code's effective value)."""


@dataclass
class ComaSettings:
    lam: float = 0.5
    """Weight of the new model."""


@dataclass
class WiseFTSettings:
    alpha: float = 0.5
    """Weight of the fine-tuned model (paper's recommendation without validation)."""


@dataclass
class CMMSettings:
    lam: float = 0.4
    """Weight of the new model (released default; the paper sweeps 0.3 to 0.6)."""
    tangent: bool = True
    """Train in the tangent space of the starting weights ("NTK" in Table 4)."""
    merge: Literal["fisher", "average", "none"] = "fisher"
    """Weigh by AdamW's second moments (eq. 4), interpolate plainly, or do not merge."""
    fisher: Literal["adam", "adam-raw"] = "adam"
    """The second moment with bias correction, or as the optimiser holds it (released code)."""
    align_epochs: int = 1
    """Epochs of representation alignment ("Bias" in Table 4); 1 in the released code, 0 switches it off."""
    align_lr: float | None = None
    """AdamW step of the last projection. Default: 1e-7 (released script); 1e-4 with the tiny model."""
    align_loss: Literal["l1", "l2"] = "l2"
    """Mean absolute or mean squared difference of the features (l2 in the released script)."""
    inference: Literal["linearised", "plain"] = "linearised"
    """Evaluate f_lin (released code) or f at the merged weights; the table shows the other one too."""


@dataclass
class PAMSettings:
    rank: int = 10
    """Rank of LoRA on the key and value projections (paper); 0 trains and merges all weights."""
    lr: float = 1e-3
    """Peak learning rate of LoRA (paper)."""
    epsilon: float = 0.5
    """Size of the perturbation in units of the task vector (paper)."""
    p0: float = 1 / 3
    """Probability of no perturbation; the two signs share the rest (paper)."""
    perturb: Literal["task", "gauss", "none"] = "task"
    """Along the task vector, Gaussian noise of the same norm (Table 4), or none (LoRA-M)."""
    merge: bool = True
    """Merge by the closed form; otherwise alpha is 1 (LoRA)."""
    labels: Literal["data", "model"] = "data"
    """Labels of the Fisher: those of the data (eq. 9), or drawn from the model's prediction."""


@dataclass
class CLIPAdapterSettings:
    ratio: float = 0.2
    """Share of the adapter's output in the features; the rest is the frozen feature (paper)."""
    reduction: int = 4
    """The bottleneck is this many times narrower than the features (released code)."""
    lr: float | None = None
    """Peak learning rate of Adam. Default: 1e-5 (paper); 1e-2 with the tiny model."""


@dataclass
class EWCSettings:
    lam: float = 1000.0
    """Weight of the penalty lam/2 sum F (theta - theta_{t-1})^2. F is a mean over images, so 1 is the Laplace approximation
    for tasks of equal size; the default was chosen on held-out images of the default run (docs/LOG.md)."""
    decay: float = 1.0
    """Factor of the older tasks' Fisher at every task (gamma of online EWC); 1: their sum."""


@dataclass
class LwFSettings:
    lam: float = 1.0
    """Weight of the distillation loss (paper); 0.3 in MagMax's code."""
    temperature: float = 2.0
    """Temperature of both predictions (paper)."""


# OmitArgPrefixes: the flags are --dataset, not --data.dataset; the groups remain in --help
@dataclass
class Config:
    data: tyro.conf.OmitArgPrefixes[DataSettings] = field(default_factory=DataSettings)
    scenario: tyro.conf.OmitArgPrefixes[ScenarioSettings] = field(default_factory=ScenarioSettings)
    model: tyro.conf.OmitArgPrefixes[ModelSettings] = field(default_factory=ModelSettings)
    training: tyro.conf.OmitArgPrefixes[TrainingSettings] = field(default_factory=TrainingSettings)
    run: tyro.conf.OmitArgPrefixes[RunSettings] = field(default_factory=RunSettings)
    trm: TRMSettings = field(default_factory=TRMSettings)
    cmm: CMMSettings = field(default_factory=CMMSettings)
    pam: PAMSettings = field(default_factory=PAMSettings)
    task_arithmetic: TaskArithmeticSettings = field(default_factory=TaskArithmeticSettings)
    ties: TiesSettings = field(default_factory=TiesSettings)
    dare: DareSettings = field(default_factory=DareSettings)
    magmax: MagMaxSettings = field(default_factory=MagMaxSettings)
    fisher: FisherSettings = field(default_factory=FisherSettings)
    cofima: CofimaSettings = field(default_factory=CofimaSettings)
    coma: ComaSettings = field(default_factory=ComaSettings)
    wise_ft: WiseFTSettings = field(default_factory=WiseFTSettings)
    clip_adapter: CLIPAdapterSettings = field(default_factory=CLIPAdapterSettings)
    ewc: EWCSettings = field(default_factory=EWCSettings)
    lwf: LwFSettings = field(default_factory=LwFSettings)


PLAIN_GROUPS = ("data", "scenario", "model", "training", "run")  # their flags carry no prefix

# These may differ when a run goes on: they choose which results, where and how they are shown, not what the numbers are.
FREE = {
    "training.method",
    "training.seeds",
    "training.protocol",
    "training.keep_trajectory",
    "run.device",
    "run.run_dir",
    "run.save_every",
    "run.quiet",
    "data.download",
}


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def as_flags(values: dict[str, Any], source: str) -> list[str]:
    """The flags that say what a `config.json` says, so that a file passes the same checks as the command line.

    Raises:
        UserError: an unknown group or setting, with the nearest names.
    """
    flags = []
    for group, settings in values.items():
        groups = {f.name: f for f in dataclasses.fields(Config)}
        if group not in groups or not isinstance(settings, dict):
            raise UserError(
                f"{source}: unknown group {group!r}; expected {', '.join(groups)}, each an object.{nearest(group, groups)}"
            )
        known = [f.name for f in dataclasses.fields(groups[group].default_factory)]
        for name, value in settings.items():
            if name not in known:
                raise UserError(f"{source}: unknown setting {group}.{name}.{nearest(name, known)}")
            flag = name.replace("_", "-") if group in PLAIN_GROUPS else f"{group}.{name}".replace("_", "-")
            if isinstance(value, list):
                flags += [f"--{flag}", *map(str, value)]
            elif isinstance(value, bool) and name != "flip":  # flip has three values, so it is no on/off flag
                flags += [f"--{flag}" if value else "--" + re.sub(r"([^.]+)$", r"no-\1", flag)]
            elif value is not None:  # None: the default that depends on other settings
                flags += [f"--{flag}", str(value)]
    return flags


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'group.name: old -> new' for every setting that changes the numbers of a run."""
    return [
        f"{group}.{name}: {old.get(group, {}).get(name)!r} -> {value!r}"
        for group, settings in new.items()
        for name, value in settings.items()
        if f"{group}.{name}" not in FREE and old.get(group, {}).get(name) != json.loads(json.dumps(value))
    ]


def changed(config: Config, changes: dict[str, dict[str, str]], source: str) -> Config:
    """`config` with the settings of `changes[group][name]`, given as text; checked as flags are.

    Raises:
        UserError: a value that the setting does not take.
    """
    values = json.loads(json.dumps(to_dict(config)))
    for group, settings in changes.items():
        for name, text in settings.items():
            field_type = type(values[group][name])
            if field_type is bool and text.lower() not in ("true", "false"):
                raise UserError(f"{source}: {group}.{name} is true or false, not {text!r}")
            values[group][name] = text.lower() == "true" if field_type is bool else text
    try:
        return resolve(tyro.cli(Config, args=as_flags(values, source), console_outputs=False))
    except SystemExit:
        raise UserError(
            f"{source}: a value does not fit; python -m fastmerge --help lists what each setting takes"
        ) from None


def resolve(config: Config) -> Config:
    """Fill the defaults that depend on other settings, and check every value that can be checked without data.

    Raises:
        UserError: naming the flag, what was given, and what was expected.
    """
    c = dataclasses.replace(
        config, **{f.name: dataclasses.replace(getattr(config, f.name)) for f in dataclasses.fields(config)}
    )
    if c.model.model is None:
        c.model.model = "tiny" if c.data.dataset == "glyphs" else "ViT-B-16-quickgelu"
    tiny = c.model.model == "tiny"
    if c.model.pretrained is None:
        known = {"tiny": "glyphs", "ViT-B-16-quickgelu": "openai"}
        if c.model.model not in known:
            raise UserError(
                f"--pretrained is not given for --model {c.model.model}: give a tag, a checkpoint file, "
                "or none for random weights"
            )
        c.model.pretrained = known[c.model.model]
    for name, paper, small in (("epochs", 15, 3), ("merge_epochs", 5, 1), ("batch_size", 128, 64), ("lr", 1e-5, 6e-4)):
        if getattr(c.training, name) is None:
            setattr(c.training, name, small if tiny else paper)
    if c.cmm.align_lr is None:
        c.cmm.align_lr = 1e-4 if tiny else 1e-7
    if c.clip_adapter.lr is None:
        c.clip_adapter.lr = 1e-2 if tiny else 1e-5
    if c.scenario.tasks is None and c.scenario.scenario == "cil":
        c.scenario.tasks = 5 if c.data.dataset == "glyphs" else 10
    if c.scenario.scenario == "dil" and c.scenario.class_order == ScenarioSettings.class_order:
        c.scenario.class_order = "natural"  # the permutation of 1993 is a convention for classes, not for domains
    checks = [
        ("--tasks", c.scenario.tasks, c.scenario.tasks is None or c.scenario.tasks >= 1, "at least 1"),
        ("--epochs", c.training.epochs, c.training.epochs >= 0, "0 or more"),
        ("--merge-epochs", c.training.merge_epochs, c.training.merge_epochs >= 0, "0 or more"),
        ("--batch-size", c.training.batch_size, c.training.batch_size >= 1, "at least 1"),
        ("--lr", c.training.lr, c.training.lr >= 0, "0 or more"),
        ("--head-lr", c.training.head_lr, c.training.head_lr >= 0, "0 or more"),
        ("--weight-decay", c.training.weight_decay, c.training.weight_decay >= 0, "0 or more"),
        ("--clip", c.training.clip, c.training.clip >= 0, "0 (off) or more"),
        ("--crop-scale", c.data.crop_scale, 0 < c.data.crop_scale <= 1, "above 0, at most 1"),
        ("--cache-gb", c.data.cache_gb, c.data.cache_gb >= 0, "0 or more"),
        ("--save-every", c.run.save_every, c.run.save_every >= 0, "0 or more seconds"),
        ("--method", c.training.method, len(c.training.method) > 0, "at least one method"),
        ("--method", c.training.method, len(set(c.training.method)) == len(c.training.method), "each method once"),
        ("--seeds", c.training.seeds, len(c.training.seeds) > 0, "at least one seed"),
        (
            "--seeds",
            c.training.seeds,
            all(0 <= s < 2**63 for s in c.training.seeds),
            "whole numbers from 0 to 2^63 - 1",
        ),
        ("--seeds", c.training.seeds, len(set(c.training.seeds)) == len(c.training.seeds), "each seed once"),
        ("--trm.replace-ratio", c.trm.replace_ratio, 0 <= c.trm.replace_ratio <= 1, "between 0 and 1"),
        (
            "--trm.layer-b",
            c.trm.layer_b,
            c.trm.layer_b is None or c.trm.layer_b >= 1,
            "1 or more (the first layer is 1)",
        ),
        ("--trm.lr", c.trm.lr, c.trm.lr >= 0, "0 or more"),
        ("--protocol", c.training.protocol, len(c.training.protocol) > 0, "at least one protocol"),
        (
            "--protocol",
            c.training.protocol,
            len(set(c.training.protocol)) == len(c.training.protocol),
            "each protocol once",
        ),
        ("--warmup-steps", c.training.warmup_steps, c.training.warmup_steps >= 0, "0 or more"),
        ("--validation", c.scenario.validation, 0 <= c.scenario.validation < 1, "at least 0, below 1"),
        ("--lora-rank", c.training.lora_rank, c.training.lora_rank >= 0, "0 (all weights) or more"),
        ("--pam.rank", c.pam.rank, c.pam.rank >= 0, "0 (all weights) or more"),
        ("--pam.lr", c.pam.lr, c.pam.lr >= 0, "0 or more"),
        ("--pam.epsilon", c.pam.epsilon, 0 <= c.pam.epsilon <= 1, "between 0 and 1 (eq. 13)"),
        ("--pam.p0", c.pam.p0, 0 <= c.pam.p0 <= 1, "between 0 and 1"),
        ("--cmm.lam", c.cmm.lam, 0 <= c.cmm.lam <= 1, "between 0 and 1"),
        ("--cmm.align-epochs", c.cmm.align_epochs, c.cmm.align_epochs >= 0, "0 or more"),
        ("--cmm.align-lr", c.cmm.align_lr, c.cmm.align_lr >= 0, "0 or more"),
        ("--task-arithmetic.scale", c.task_arithmetic.scale, c.task_arithmetic.scale > 0, "above 0"),
        ("--ties.density", c.ties.density, 0 < c.ties.density <= 1, "above 0, at most 1 (a fraction, not percent)"),
        ("--ties.scale", c.ties.scale, c.ties.scale > 0, "above 0"),
        ("--dare.p", c.dare.p, 0 <= c.dare.p < 1, "at least 0, below 1"),
        ("--dare.scale", c.dare.scale, c.dare.scale > 0, "above 0"),
        ("--magmax.scale", c.magmax.scale, c.magmax.scale > 0, "above 0"),
        ("--fisher.lam", c.fisher.lam, 0 <= c.fisher.lam <= 1, "between 0 and 1"),
        ("--fisher.images", c.fisher.images, c.fisher.images is None or c.fisher.images >= 1, "at least 1"),
        ("--fisher.floor", c.fisher.floor, c.fisher.floor >= 0, "0 or more"),
        ("--cofima.lam", c.cofima.lam, 0 <= c.cofima.lam <= 1, "between 0 and 1"),
        ("--coma.lam", c.coma.lam, 0 <= c.coma.lam <= 1, "between 0 and 1"),
        ("--wise-ft.alpha", c.wise_ft.alpha, 0 <= c.wise_ft.alpha <= 1, "between 0 and 1"),
        ("--clip-adapter.ratio", c.clip_adapter.ratio, 0 <= c.clip_adapter.ratio <= 1, "between 0 and 1"),
        ("--clip-adapter.reduction", c.clip_adapter.reduction, c.clip_adapter.reduction >= 1, "at least 1"),
        ("--clip-adapter.lr", c.clip_adapter.lr, c.clip_adapter.lr >= 0, "0 or more"),
        ("--ewc.lam", c.ewc.lam, c.ewc.lam >= 0, "0 or more"),
        ("--ewc.decay", c.ewc.decay, 0 <= c.ewc.decay <= 1, "between 0 and 1"),
        ("--lwf.lam", c.lwf.lam, c.lwf.lam >= 0, "0 or more"),
        ("--lwf.temperature", c.lwf.temperature, c.lwf.temperature > 0, "above 0"),
    ]
    for flag, value, good, expected in checks:
        if not good:
            raise UserError(f"{flag} {value}: expected {expected}")
    if c.run.run_dir is None:
        name = f"{c.data.dataset}-{c.scenario.scenario}{c.scenario.tasks or ''}-{c.model.model}"
        c.run.run_dir = str(Path("runs") / name.replace("/", "_"))
    return c


def parse(argv: Sequence[str] | None = None) -> Config:
    """Flags over `--config FILE` over defaults; resolved and checked. Bad flags exit with code 2 and say why."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    known, rest = pre.parse_known_args(argv)
    if known.config is not None:
        try:
            values = json.loads(Path(known.config).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"--config {known.config}: cannot be read ({error}); expected the config.json of a run"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"--config {known.config}: expected an object of groups, as in the config.json of a run")
        rest = [*as_flags(values, f"--config {known.config}"), *rest]
    config = tyro.cli(
        Config,
        args=rest,
        prog="fastmerge",
        description="Continual learning by model merging: train task after task, end with one model. "
        "--config FILE takes settings from a JSON file such as a run's config.json; flags win over it.",
    )
    return resolve(config)
