"""What a request says in ``SamplingParams.extra_args``, and the small models of the engine's ``additional_config``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch

from ... import checks
from ..transformers.recipes import METHODS, Fuser

OP = "integrations.vllm.FusionLogitsProcessor"
#: what the settings of a request begin with
PREFIX = "w2s_fast_"
#: settings of a request: those of `Fuser`, flat, so that they pass through ``vllm_xargs`` of the HTTP server too
SETTINGS = ("method", "weights", "base_weight", "plausible", "student_temperature", "dynamic")


@dataclass(frozen=True)
class Models:
    """``additional_config["w2s_fast"]``: where the small models are, and what requests ask for unless they say it.

    Attributes:
        experts, anti: folders or hub names that ``AutoModelForCausalLM.from_pretrained`` takes, or addresses of vLLM
            servers (`RemoteModel`).
        defaults: settings of requests, without the prefix.
    """

    experts: tuple[str, ...]
    anti: tuple[str, ...]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, additional_config: Any) -> Models:
        """From vLLM's ``additional_config``.

        Raises:
            ValueError, TypeError: naming `additional_config`.
        """
        given = additional_config.get("w2s_fast") if isinstance(additional_config, Mapping) else None
        if not isinstance(given, Mapping):
            checks.fail(OP, "additional_config", 'a dict with an entry "w2s_fast" for its models', additional_config,
                        error=TypeError)
        if extra := set(given) - {"experts", "anti", "defaults"}:
            checks.fail(OP, 'additional_config["w2s_fast"]', "made of experts, anti and defaults", sorted(extra))
        defaults = given.get("defaults") or {}
        if unknown := set(defaults) - set(SETTINGS):
            checks.fail(OP, 'additional_config["w2s_fast"]["defaults"]', "made of " + ", ".join(SETTINGS),
                        sorted(unknown))
        found = cls(_paths("experts", given.get("experts")), _paths("anti", given.get("anti")), dict(defaults))
        if not found.experts + found.anti:
            checks.fail(OP, 'additional_config["w2s_fast"]', "with experts or anti", dict(given))
        return found


def _paths(name: str, value: Any) -> tuple[str, ...]:
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        checks.fail(OP, f'additional_config["w2s_fast"]["{name}"]', "a path or a list of paths", value, error=TypeError)
    return tuple(paths)


def fuser_of(extra_args: Mapping[str, Any] | None, defaults: Mapping[str, Any] | None) -> Fuser | None:
    """What a request asks for; None where its method is ``"none"`` or neither it nor the defaults name one.

    Args:
        defaults: see `Models`; None where they are not known.

    Raises:
        ValueError, TypeError: naming the setting.
    """
    given = {key[len(PREFIX):]: value for key, value in (extra_args or {}).items() if key.startswith(PREFIX)}
    if unknown := set(given) - set(SETTINGS):
        checks.fail(OP, "extra_args", "of " + ", ".join(PREFIX + name for name in SETTINGS),
                    ", ".join(sorted(PREFIX + name for name in unknown)))
    # a method of its own does not take over the settings of another one
    usual = defaults or {}
    found = {**(usual if given.get("method", usual.get("method")) == usual.get("method") else {}), **given}
    method = found.pop("method", None)
    if method is None and found and defaults is not None:
        checks.fail(OP, "extra_args", f"with {PREFIX}method", ", ".join(PREFIX + name for name in sorted(found)))
    if method is None or method == "none":
        return None
    checks.choice(OP, PREFIX + "method", method, [*METHODS, "none"])
    if not isinstance(found.get("weights"), (int, float, str, list, tuple, NoneType)):
        checks.fail(OP, PREFIX + "weights", "a number or a list of numbers", found["weights"], error=TypeError)
    plausible = found.get("plausible", "default")
    if plausible == "none":
        found["plausible"] = None
    elif isinstance(plausible, list):
        found["plausible"] = tuple(plausible)
    return Fuser(method, **found)


def uses(fuser: Fuser, experts: int, anti: int) -> tuple[int, int]:
    """How many of the experts and anti-experts that are loaded the method reads."""
    spec = METHODS[fuser.method]
    return 0 if spec.experts[1] == 0 else experts, 0 if spec.anti is False else anti


def check(fuser: Fuser, experts: int, anti: int) -> None:
    """Run the fusion once on small logits, so that a setting that its ops refuse is refused before a batch holds it.

    Raises:
        ValueError, TypeError: of a setting, or of a method that cannot work with so many models.
    """
    fuser.check_models(experts, anti)
    logits = torch.arange(8.0)[None]
    fuser.fuse(logits, [logits.sin()] * experts, [logits.cos()] * anti)


def check_alone(extra_args: Mapping[str, Any] | None) -> None:
    """`check` where the models are not known: as many experts as there are weights.

    Raises:
        ValueError: naming what is wrong.
    """
    try:
        fuser = fuser_of(extra_args, None)
        if fuser is not None:
            given = fuser.weights
            check(fuser, *uses(fuser, len(given) if isinstance(given, (list, tuple)) else 1, 1))
    except TypeError as error:  # vLLM turns a ValueError into the answer of status 400
        raise ValueError(str(error)) from error
