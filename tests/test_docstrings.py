"""Every public function says what it takes, in which shape, what it returns and what it raises."""

import inspect
import re
from collections.abc import Callable

import pytest

import causal_padded_flexattn

PUBLIC = [
    x
    for name, x in inspect.getmembers(causal_padded_flexattn, inspect.isfunction)
    if x.__module__ == causal_padded_flexattn.__name__ and not name.startswith("_")
]


def sections(function: Callable) -> dict[str, str]:
    """The text of each section, the summary's under ""."""
    _, *parts = re.split(r"^(Args|Returns|Raises):\n", "Summary:\n" + inspect.getdoc(function), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_docstring(function: Callable) -> None:
    found = sections(function)
    signature = inspect.signature(function)
    described: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", found.get("Args", ""), re.MULTILINE):
        described |= dict.fromkeys(names.split(", "), text)
    assert list(described) == list(signature.parameters)
    for name in ("pads", "query", "key", "value"):
        # What transformers hands over has its shapes.
        if name in described and function.__name__ != "transformers_attention":
            assert re.match(r"\(B, [\w, /]+\)", described[name]), f"{name} has no shape"
    if "pads" in described:
        assert "torch.bool" in described["pads"]
    assert ("Returns" in found) == (signature.return_annotation is not None)
    for error in re.findall(r"raise (\w+)\(", inspect.getsource(function)):
        assert error in found.get("Raises", ""), f"{error} is raised"


def test_there_are_functions() -> None:
    assert {"causal", "create_padding_mask", "causal_padded_attention", "main"} <= {x.__name__ for x in PUBLIC}
