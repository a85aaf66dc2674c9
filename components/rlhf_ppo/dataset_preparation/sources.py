"""Reading rows from wherever a data set lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from rlhf_ppo.config_validation.sources import commit_of, kind
from rlhf_ppo.errors import InputError
from rlhf_ppo.settings import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
_READING: dict[str, dict[str, Any]] = {
    "csv": {"encoding": "utf-8-sig", "keep_default_na": False, "na_values": [""]},
    "text": {"encoding": "utf-8-sig"},
}
"""How files are read: a mark at their beginning is no part of the first prompt, and NA and None are words."""
NO_DATA = ("manifest.json", "dataset_infos.json", "dataset_info.json", "state.json")
"""Files that describe the data beside them."""


class Source(NamedTuple):
    """All rows, still in Arrow's hands, and the commit of a hub dataset (None for anything else)."""

    rows: Dataset
    revision: str | None


def read(query_dataset: str, data: DataSettings, cache: str) -> Source:
    """Open the data set; ``cache`` is a directory that must live as long as the rows are used.

    A text file has one column, which is given the name that data_prompt_column asks for. Raises InputError that names
    the parameter, its value and what would be valid.
    """
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = kind(query_dataset)
    if where == "hub":
        return _read_hub(query_dataset, data)
    if data.data_revision:
        raise InputError(
            f"data_revision={data.data_revision!r} has no effect on query_dataset={query_dataset!r}, which is not on "
            "the hub: leave it empty"
        )
    path = Path(query_dataset)
    if where == "url" or path.is_file():
        return Source(_read_file(query_dataset, data, cache), None)
    if not path.is_dir():
        raise InputError(f"query_dataset={query_dataset!r} does not exist: give a hub id, a file, a directory or a URL")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return Source(_read_saved(query_dataset, path, data), None)
    return Source(_read_directory(query_dataset, path, data, cache), None)


def _read_saved(query_dataset: str, path: Path, data: DataSettings) -> Dataset:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"query_dataset={query_dataset!r} can't be read as a saved dataset: {error}") from error
    splits = {str(loaded.split or "train"): loaded} if isinstance(loaded, Dataset) else dict(loaded)
    if data.data_split not in splits:
        raise InputError(f"data_split={data.data_split!r} is not in {query_dataset}: give one of {', '.join(splits)}")
    return splits[data.data_split]


def _read_file(query_dataset: str, data: DataSettings, cache: str) -> Dataset:
    from datasets import load_dataset

    suffix = Path(urlsplit(query_dataset).path if "://" in query_dataset else query_dataset).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"query_dataset={query_dataset!r} is of no known kind: give one of {', '.join(FORMATS)}")
    if "://" not in query_dataset and not Path(query_dataset).stat().st_size:
        raise InputError(f"query_dataset={query_dataset!r} is empty: give at least two prompts")
    if data.data_config or data.data_split.split("[")[0] != "train":
        raise InputError(
            f"data_split={data.data_split!r} and data_config={data.data_config!r}: query_dataset={query_dataset!r} is "
            "one file, which has no splits and no configurations; leave them as they are by default"
        )
    separator = {"sep": "\t"} if suffix == ".tsv" else {}
    with _explained(query_dataset, data):
        loaded = load_dataset(
            FORMATS[suffix],
            data_files=query_dataset,
            split=data.data_split,
            cache_dir=cache,
            **separator,
            **_READING.get(FORMATS[suffix], {}),
        )
    return _with_text_as_prompt(loaded, FORMATS[suffix], data)


def _read_directory(query_dataset: str, path: Path, data: DataSettings, cache: str) -> Dataset:
    """Files named train*, validation* or test* are these splits, as on the hub; else all are the split train."""
    from datasets import load_dataset_builder

    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in FORMATS and file.name not in NO_DATA)
    files = [file for file in found if not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)]
    suffixes = sorted({file.suffix.lower() for file in files})
    if not files:
        raise InputError(f"query_dataset={query_dataset!r} holds no data files: give files of {', '.join(FORMATS)}")
    if len({FORMATS[suffix] for suffix in suffixes}) > 1:
        raise InputError(f"query_dataset={query_dataset!r} mixes {', '.join(suffixes)}: name one file, or one kind")
    if not any(file.stat().st_size for file in files):
        raise InputError(f"query_dataset={query_dataset!r} is empty: give at least two prompts")
    with _explained(query_dataset, data):
        reading = _READING.get(FORMATS[suffixes[0]], {})
        builder = load_dataset_builder(str(path), data.data_config or None, cache_dir=cache, **reading)
        taken = {Path(file).resolve() for part in (builder.config.data_files or {}).values() for file in part}
        left = [file.name for file in files if file.resolve() not in taken]
        if left and not data.data_config:
            raise InputError(
                f"query_dataset={query_dataset!r} has files named after splits and others ({', '.join(left[:3])}): "
                "name one file, or name all after splits"
            )
        builder.download_and_prepare()
        loaded = builder.as_dataset(split=data.data_split)
    return _with_text_as_prompt(loaded, FORMATS[suffixes[0]], data)


def _with_text_as_prompt(loaded: Dataset, form: str, data: DataSettings) -> Dataset:
    renamed = form == "text" and data.data_prompt_column != "text"
    return loaded.rename_column("text", data.data_prompt_column) if renamed else loaded


def _read_hub(query_dataset: str, data: DataSettings) -> Source:
    from datasets import load_dataset

    commit = commit_of("query_dataset", query_dataset, "data_revision", data.data_revision, "dataset") or None
    with _explained(query_dataset, data):
        loaded = load_dataset(query_dataset, data.data_config or None, split=data.data_split, revision=commit)
    return Source(loaded, commit)


@contextmanager
def _explained(query_dataset: str, data: DataSettings) -> Iterator[None]:
    """Turns what ``datasets`` raises about the user's input into an InputError."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    what = f"query_dataset={query_dataset!r}"
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{what} needs a package that is not installed: {error}") from error
    except DatasetNotFoundError as error:
        raise InputError(
            f"{what} is neither a path that exists nor a dataset that can be read on the hub: check the spelling, or "
            f"set HF_TOKEN to a token that may read it ({error})"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"{what} is no path that exists, and its server can't be reached: give a file or a directory, or check the "
            f"network and HF_ENDPOINT ({error})"
        ) from error
    except (DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        part = f"data_config={data.data_config!r}, data_split={data.data_split!r}"
        raise InputError(f"{what} can't be read ({part}): {str(cause or error)[:300]}") from error
