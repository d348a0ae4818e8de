"""What the sections of the configuration are made of."""

from os.path import expanduser
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, AfterValidator(expanduser)]  # relative ones start where the command runs
FolderText = Annotated[Text, AfterValidator(expanduser)]
Switch = Annotated[bool, Field(strict=False)]  # yes/no, on/off, true/false, 1/0
Probability = Annotated[float, Field(ge=0, le=1)]


def words(value: Any) -> Any:
    """Read one word, or several between commas, as a list, and `no` as an empty one."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.strip("[]()").split(",") if word.strip())
    return () if value is False else value


class Section(BaseModel, strict=True, frozen=True, extra="forbid", allow_inf_nan=False):
    """A part of the configuration. A text in a key's annotation says why that published key has no effect."""
