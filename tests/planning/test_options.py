"""One table of options: the request, the two doors, the command line and the page say what it says."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from math import inf, isinf, nextafter
from pathlib import Path

import pytest

from kaleido_fast import InputError, SampleRequest, fast_sample, op, sample_op
from kaleido_fast.cli.parameters import flag
from kaleido_fast.cli.sample import command
from kaleido_fast.planning.options import OPTIONS, RECOMMENDABLE, OneOf, Option, Real, Switch, Whole

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"
NOT_ON_THE_COMMAND_LINE = {"tile_chains"}


def test_a_request_has_the_options_of_the_table_and_its_defaults():
    found = {field.name: field.default for field in fields(SampleRequest)}
    assert found.pop("trace") is None
    assert list(found) == list(OPTIONS)
    for name, default in found.items():
        assert (None if default is MISSING else default) == OPTIONS[name].default, name
        assert (default is MISSING) == (OPTIONS[name].default is None and not OPTIONS[name].or_none), name


def test_fast_sample_takes_every_option():
    found = {name: parameter.default for name, parameter in inspect.signature(fast_sample).parameters.items()}
    for name, option in OPTIONS.items():
        left_out = "recommended" if option.or_none else None  # where None is a value, a word leaves it out
        default = left_out if name in RECOMMENDABLE else option.default
        assert found[name] == (inspect.Parameter.empty if name == "n_chains" else default), name


def test_sample_op_takes_every_option():
    found = {name: parameter.default for name, parameter in inspect.signature(sample_op).parameters.items()}
    assert found.keys() == {"model", "z0", *op.NUMBERS, *op.TEXT_OPTIONS}
    for name in OPTIONS.keys() & found.keys():
        settled_later = name in ("n_chains", "thin", "tol")
        assert found[name] == (None if settled_later else OPTIONS[name].default), name
    assert OPTIONS.keys() - found.keys() == {"tile_chains"}


def test_fast_sample_documents_every_option():
    text = inspect.getdoc(fast_sample)
    arguments = text[text.index("Args:") : text.index("Raises:")]
    documented = [
        name for names in re.findall(r"^    ([a-z0-9_, ]+): ", arguments, re.MULTILINE) for name in names.split(", ")
    ]
    assert documented == list(inspect.signature(fast_sample).parameters)


def test_sample_has_a_flag_for_every_option():
    flags = {option.name: option.opts for option in command.params}
    for name in OPTIONS.keys() - NOT_ON_THE_COMMAND_LINE:
        assert flags[name] == [flag(name)], name
    assert not flags.keys() & NOT_ON_THE_COMMAND_LINE


@pytest.mark.parametrize("name", OPTIONS)
def test_texts_name_options_and_defaults_that_exist(name):
    option = OPTIONS[name]
    assert not option.text.endswith(".")
    assert set(re.findall(r"`(\w+)`", option.text + option.otherwise)) <= {"None", *OPTIONS}
    if option.otherwise and isinstance(option.default, str):
        assert option.otherwise.endswith(f"else {option.default}")
    elif option.otherwise and option.default is not None:
        numbers = re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", option.otherwise)
        assert option.default in [float(found) for found in numbers]


def outside(option: Option) -> list[object]:
    """Values next to the range, or of another type."""
    if isinstance(option.range, Whole):
        return [option.range.least - 1, option.range.most + 1, option.range.least + 0.5, "1", True]
    if isinstance(option.range, Real):
        ends = [-5e-324, 0.0] if option.range.positive else [-5e-324]
        return [*ends, nextafter(option.range.most, inf), float("nan"), inf, "1", True]
    return [f"{option.range.names[0]}s", 1, None] if isinstance(option.range, OneOf) else []


@pytest.mark.parametrize("name", OPTIONS)
def test_what_lies_outside_of_a_range_is_refused_by_name(name):
    option = OPTIONS[name]
    for value in [*outside(option), *([] if option.or_none or isinstance(option.range, Switch) else [None])]:
        with pytest.raises(InputError, match=f"^({name} is|unknown {name}) "):
            SampleRequest(**{"n_chains": 1, name: value})
    if isinstance(option.range, Whole):
        given = {"n_chains": 1, "sampler": option.sampler or "kaleidoscope", name: option.range.least}
        assert getattr(SampleRequest(**given), name) == option.range.least


def power(n: int) -> str:
    """A large bound as the power of two that it is, or is one below."""
    found = {2**k: f"2^{k}" for k in range(14, 65)} | {2**k - 1: f"2^{k} - 1" for k in range(14, 65)}
    return found.get(n, str(n))


def values(option: Option) -> str:
    """The values of an option in words."""
    if isinstance(option.range, Whole):
        text = f"{option.range.least} to {power(option.range.most)}"
    elif isinstance(option.range, Real):
        text = "above 0" if option.range.positive else "0 or more"
        text += "" if isinf(option.range.most) else f", at most {option.range.most:g}"
    else:
        text = ", ".join(option.range.names) if isinstance(option.range, OneOf) else "on, off"
    return f"{text}, `None`" if option.or_none else text


def default(option: Option) -> str:
    """What holds where an option is left out."""
    if option.otherwise or option.default is None:
        return option.otherwise or "must be passed"
    return {True: "on", False: "off"}[option.default] if isinstance(option.range, Switch) else str(option.default)


def rows() -> str:
    """The table of the page."""
    head = ["option", "in `sample`", "values", "unit", "default", "what it is"]
    lines = [head, ["---"] * len(head)]
    for name, option in OPTIONS.items():
        shown = "" if name in NOT_ON_THE_COMMAND_LINE else f"`{flag(name)}`"
        lines.append([f"`{name}`", shown, values(option), option.unit, default(option), option.text])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_page_has_the_table():
    assert rows() in PAGE.read_text(), f"docs/sampling.md should have this table:\n{rows()}"
