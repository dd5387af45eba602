"""The base of what is written as JSON and read again: answers, manifests, columns of rows."""

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A value whose members are checked. Its validator is built at its first use, a tenth of the API's start otherwise.

    Bodies of requests are no such values: FastAPI builds its own of each with the route, and warns if it cannot.
    """

    model_config = ConfigDict(defer_build=True)
