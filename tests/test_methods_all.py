"""What holds for every method with a ``train``: it resumes, it trains in two processes, it refuses in a sentence."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import TensorDataset

pytest.importorskip("transformers")

from w2s_fast.methods import available
from w2s_fast.testing import methods as cases
from w2s_fast.testing.selection import covering

TRAINS = {name: method.family for name, method in available().items() if method.family != "streams"}


class Stop(Exception):
    pass


def test_every_method_has_a_case():
    assert set(cases.CASES) == set(TRAINS)


@pytest.mark.parametrize("name", covering(TRAINS, lambda name: [TRAINS[name]], seed=2))
def test_a_stopped_method_goes_on_bit_for_bit(name, tmp_path):
    """In another process, whose random numbers are others: what is drawn before the loop must not count."""

    def run(folder, stop=-1):
        told, given = [], cases.arguments(name)

        def tick(value):
            told.append(value)
            if len(told) == stop:
                raise Stop

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5 if folder == "whole" or stop > 0 else 77)
            cases.run(name, given=given, checkpoint=tmp_path / folder, tick=tick)
        return told, given["model"].state_dict()

    losses, state = run("whole")
    at = random.Random(name).randrange(cases.STEP.every + 1, len(losses))
    with pytest.raises(Stop):
        run("stopped", at)
    found, after = run("stopped")
    assert found == losses, f"stopped after {at}"
    for key, value in state.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{key}, stopped after {at}")


# what a user's file may hold

LANGUAGE = sorted(name for name in TRAINS if name in cases.CASES and "rows" in cases.inputs(name))
BAD = {
    "empty": [], "no column": [{"zzz": "x"}], "nothing": [dict.fromkeys(cases.WORDS[0])],
    "numbers": [dict.fromkeys(cases.WORDS[0], 3)], "no text": [dict.fromkeys(cases.WORDS[0], "")],
    "the second": [cases.WORDS[0], {"zzz": 1}],
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGE)
def test_rows_that_do_not_fit_are_refused_in_a_sentence(name):
    """Each by a ValueError or TypeError of ours; rows with empty texts may also train, on what little there is."""
    for what, rows in BAD.items():
        given = {**cases.arguments(name), "rows": rows}
        if given["tokenizer"] is None:
            given["tokenizer"] = cases.words()
        try:
            cases.run(name, cases.STEP.but(steps=1), given)
        except (ValueError, TypeError) as error:
            assert str(error).startswith("w2s_fast."), (what, error)
        else:
            assert what == "no text", what


DATA = sorted(name for name in TRAINS if name in cases.CASES and "data" in cases.inputs(name) and name != "mowst")


@pytest.mark.parametrize("name", DATA)
def test_data_that_does_not_fit_is_refused_in_a_sentence(name):
    """A number, and nothing at all; what is iterated over as it is may also be a list of batches."""
    for data in (3, TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))):
        with pytest.raises((ValueError, TypeError), match=r"^w2s_fast\."):
            cases.run(name, cases.STEP.but(steps=1), {**cases.arguments(name), "data": data})
