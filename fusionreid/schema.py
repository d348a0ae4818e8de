"""What the sections of the configuration are made of."""

from typing import Annotated

from pydantic import BaseModel, Field

Text = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel, strict=True, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of the configuration. A text in a key's annotation says why that published key has no effect."""
