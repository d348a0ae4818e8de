"""What the sections of the configuration are made of."""

from os.path import expanduser
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, AfterValidator(expanduser)]  # relative ones start where the command runs
FolderText = Annotated[Text, AfterValidator(expanduser)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel, strict=True, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of the configuration. A text in a key's annotation says why that published key has no effect."""
