"""How conversations are rendered as text: what is not in the data or the model, but changes the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Self

from forgetcast.errors import DataError


@dataclass(frozen=True)
class Rendering:
    """How conversations are rendered; stored with the scores, because they depend on it.

    Attributes
    ----------
    date : str
        Today's date for templates that write it, YYYY-MM-DD. It is fixed, so that scores of two days can be compared.
    thinking : bool
        Whether the thinking that an answer contains is a target.

    Raises
    ------
    DataError
        If the date is not one.
    """

    date: str = "2024-07-26"
    thinking: bool = True

    def __post_init__(self) -> None:
        """Check the date."""
        try:
            date.fromisoformat(self.date)
        except ValueError:
            raise DataError(f"the date must be of the form 2024-07-26, not {self.date!r}") from None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Self:
        """Return the rendering that scores with this metadata were made with; the default where they do not say."""
        text = metadata.get("text", {})
        return cls(**{name: text[name] for name in ("date", "thinking") if name in text})


DEFAULT_RENDERING = Rendering()
