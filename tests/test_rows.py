"""A row may set what its method reads, and nothing else."""

import dataclasses

import pytest
import toy
from test_methods import FLAGS

from fastmerge.merging import RULES
from fastmerge.methods import METHODS
from fastmerge.plan import row_settings

# read only beside another value; those of training are read by the loop, or where the model is made
BESIDE = {"trm": {"trm.layer_b", "trm.teacher"}, "sdlora": {"sdlora.residual"}}
ELSEWHERE = {
    f"training.{name}" for name in ("checkpoint_gradients", "lora_rank", "prompt_length", "compile", "micro_batch")
}


def watch(config):
    """The settings of `config` that are read from now on, as GROUP.SETTING."""
    read = set()
    for group in dataclasses.fields(config):
        settings = getattr(config, group.name)
        names = {field.name for field in dataclasses.fields(settings)}

        def get(self, key, names=names, group=group.name):
            if key in names:
                read.add(f"{group}.{key}")
            return object.__getattribute__(self, key)

        settings.__class__ = type(type(settings).__name__, (type(settings),), {"__getattribute__": get})
    return read


@pytest.mark.parametrize("name", [name for name in METHODS if name not in RULES])
def test_a_method_reads_what_a_row_may_set(name, tmp_path):
    kind = METHODS[name]
    learner = toy.learner(*FLAGS, "--head=text", method=name)
    learner.head = toy.head(kind.head, learner.head)
    given = {".".join(place) for place in row_settings(name, learner.config).values()}
    read = watch(learner.config)
    method = kind.build(learner, toy.nowhere(tmp_path), None)
    toy.drive(learner, method)
    method.also_evaluated()
    assert given - read - ELSEWHERE == BESIDE.get(name, set())
