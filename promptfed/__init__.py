"""promptfed: federated tuning of foundation models that nobody may fine-tune.

    import promptfed

    result = promptfed.run("demo.toml", out="runs/demo")
    fm = promptfed.load_fm("embedded:smollm2-135m-instruct")
    promptfed.Prompt.load("runs/demo").predict(["What a day!"], fm=fm)

Types and errors are loaded at once, the rest (torch and all) when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from promptfed.errors import (
    BudgetError,
    CapabilityError,
    ConfigError,
    DataError,
    FMError,
    PromptfedError,
    RunError,
    UnknownNameError,
    UserError,
    WireError,
)
from promptfed.types import Capability, FMRequest, FMResponse, FoundationModel, LabelRequest, TextRequest

if TYPE_CHECKING:
    from promptfed.app import resume, run
    from promptfed.conduct import Result
    from promptfed.predictor import Predictor
    from promptfed.prompts.artefact import Prediction
    from promptfed.prompts.artefact import PromptSet as Prompt
    from promptfed.prompts.template import PromptTemplate
    from promptfed.registry import load_fm

__version__ = "0.1.0"

# name -> (module, name in the module)
_LAZY = {
    "Prediction": ("promptfed.prompts.artefact", "Prediction"),
    "Predictor": ("promptfed.predictor", "Predictor"),
    "Prompt": ("promptfed.prompts.artefact", "PromptSet"),
    "PromptTemplate": ("promptfed.prompts.template", "PromptTemplate"),
    "Result": ("promptfed.conduct", "Result"),
    "load_fm": ("promptfed.registry", "load_fm"),
    "resume": ("promptfed.app", "resume"),
    "run": ("promptfed.app", "run"),
}

__all__ = [
    "BudgetError",
    "Capability",
    "CapabilityError",
    "ConfigError",
    "DataError",
    "FMError",
    "FMRequest",
    "FMResponse",
    "FoundationModel",
    "LabelRequest",
    "Prediction",
    "Predictor",
    "Prompt",
    "PromptTemplate",
    "PromptfedError",
    "Result",
    "RunError",
    "TextRequest",
    "UnknownNameError",
    "UserError",
    "WireError",
    "load_fm",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'promptfed' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
