"""The base of every section of a configuration: unknown keys are errors, true is no number, nan and inf are none."""
from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

NO_NUMBER = "true and false are no numbers; write a number"
DAYS_30_S = 30 * 86400.0        # bound of every longest wait
MANY = 10_000_000               # bound of counts of images and architectures
SEEDS = 2**32 - 1               # numpy takes no larger seed


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, raw: Any) -> Any:
        wrong = [InitErrorDetails(type=PydanticCustomError("no_number", NO_NUMBER), loc=(name,), input=raw[name])
                 for name, field in cls.model_fields.items()
                 if isinstance(raw, dict) and name in raw and misplaced_bool(raw[name], field.annotation)]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return raw


class Frozen(Section):
    """A section that nobody changes once it is checked."""

    model_config = ConfigDict(frozen=True)


def misplaced_bool(value: Any, annotation: Any) -> bool:
    """Is it a bool, or a list with one, where the annotation has numbers but no bool? Python would take it for 0 or 1.
    """
    kinds = _leaves(annotation)
    if bool in kinds or not kinds & {int, float}:
        return False
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, bool) for item in values)


def _leaves(annotation: Any) -> set[Any]:
    arguments = get_args(annotation)
    return {leaf for argument in arguments for leaf in _leaves(argument)} if arguments else (
        {annotation} if isinstance(annotation, type) else set())
