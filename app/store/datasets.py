"""Data sets: JSONL files, or folders with one, under `datasets/`."""

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import NotFound
from app.store import named
from app.store.tables import DatasetRow


class DatasetNotFound(NotFound):
    """No data set has this id or name."""

    code = "dataset_not_found"


async def get_dataset(session: AsyncSession, dataset: str) -> DatasetRow:
    """Return the data set with this id or name or raise `DatasetNotFound`."""
    row = await named.find(session, DatasetRow, dataset)
    if row is None:
        raise DatasetNotFound(dataset=dataset)
    return row
