"""What requests say: their bodies, and the fields that several have."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from retrac_scale.query.topk import Duplicates, Reduce
from retrac_scale.query.where import LONGEST

Stored = Literal["queries", "training"]
Name = Annotated[str, Field(max_length=4096)]
Fold = Annotated[Duplicates, Field(description="whether near-duplicates are folded into the best of them")]
Told = Annotated[
    str, Field(max_length=2000, description="a concept, in place of the loss: a prompt, or a class's number")
]
Against = Annotated[
    str, Field(max_length=2000, description="what that is compared with; default the empty prompt or no class")
]
InViews = Annotated[
    bool,
    Field(
        description="ask about it as it is, moved, smaller, larger, lighter and darker, for the best scores: for what "
        "may lie elsewhere in a training image, or look otherwise; takes up to nine times as long"
    ),
]
Where = Annotated[str, Field(max_length=LONGEST, description="which samples count, such as `year < 2000`")]


class Body(BaseModel):
    """A request's JSON; fields that nobody knows are refused."""

    model_config = ConfigDict(extra="forbid")


class Ask(Body):
    """Which training samples influenced these queries most?"""

    source: Stored = Field(description="the store of queries, or training samples, themselves left out")
    ids: list[Name] = Field(min_length=1, description="of queries in that source", examples=[["0"]])
    k: int = Field(10, ge=1, description="results per side")
    where: Where | None = None
    duplicates: Fold = "keep"
    indexes: list[Name] | None = Field(None, min_length=1, max_length=64, description="which; null for all")


class Explain(Body):
    """What does each checkpoint and timestep add to this score?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    sample: Name = Field(description="id of the training sample", examples=["0"])
    index: Name
    side: Literal["proponents", "opponents"] = Field(
        "proponents", description="of a query in views: the best score of all is explained, or the smallest"
    )


class Part(Body):
    """Which training samples influenced this part of a picture most, or what the model makes of a concept in it?

    Or all of it, in views.
    """

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    box: list[int] | None = Field(None, min_length=4, max_length=4, description="x0, y0, x1, y1 in pixels")
    mask: str | None = Field(None, max_length=2**20, description="a PNG in base64, white where it counts")
    rest: bool = Field(False, description="all but it")
    concept: Told | None = None
    against: Against | None = None
    views: InViews = False
    k: int = Field(10, ge=1, description="results per side")
    where: Where | None = None
    duplicates: Fold = "keep"


class Groups(Body):
    """Which artists, licences, classes, ... influenced this query most?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    column: Name
    reduce: Reduce = "sum"
    k: int = Field(10, ge=1, description="groups per side")
    where: Where | None = None
    duplicates: Fold = "keep"


class Halves(Body):
    """How many names of this query's list do two halves of the measurements share?"""

    source: Literal["queries", "training", "uploads"]
    id: Name = Field(description="of the query in its source", examples=["0"])
    k: int = Field(10, ge=1, description="length of the list of proponents")
    where: Where | None = None
