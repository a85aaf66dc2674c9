"""Reading rows from wherever a data set lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_ppo.errors import InputError
from rlhf_ppo.settings import DataSettings

FORMATS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
    ".text": "text",
}  # fmt: skip
Rows = tuple[list[dict[str, Any]], list[str], str | None]


def read(query_dataset: str, data: DataSettings, cache: str) -> Rows:
    """All rows, the names of the columns, and the revision on the hub (None for a file).

    A text file has one column, which is given the name that data_prompt_column asks for. ``cache`` is a directory that
    may be thrown away. Raises InputError that names the parameter, its value and what would be valid.
    """
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = Path(query_dataset)
    if "://" in query_dataset:
        loaded, revision = _load_files(query_dataset, [query_dataset], data, cache), None
    elif path.exists():
        loaded, revision = _load_path(query_dataset, path, data, cache), None
    else:
        loaded, revision = _load_hub(query_dataset, data)
    return loaded.to_list(), list(loaded.column_names), revision


def _load_path(query_dataset: str, path: Path, data: DataSettings, cache: str) -> Any:
    if path.is_file():
        return _load_files(query_dataset, [str(path)], data, cache)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _load_saved(query_dataset, path, data)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FORMATS)
    kinds = {file.suffix.lower() for file in files}
    if not files:
        raise InputError(f"query_dataset={query_dataset!r} holds no data files: give files of {', '.join(FORMATS)}")
    if len({FORMATS[kind] for kind in kinds}) > 1:
        raise InputError(
            f"query_dataset={query_dataset!r} mixes {', '.join(sorted(kinds))}: name one file, or one kind"
        )
    return _load_files(query_dataset, [str(file) for file in files], data, cache)


def _load_saved(query_dataset: str, path: Path, data: DataSettings) -> Any:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if data.data_split not in loaded:
        raise InputError(f"data_split={data.data_split!r} is not in {query_dataset}: give one of {', '.join(loaded)}")
    return loaded[data.data_split]


def _load_files(query_dataset: str, files: list[str], data: DataSettings, cache: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = Path(files[0]).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"query_dataset={query_dataset!r} is of no known kind: give one of {', '.join(FORMATS)}")
    kind = FORMATS[suffix]
    if "://" not in files[0] and not any(Path(file).stat().st_size for file in files):
        raise InputError(f"query_dataset={query_dataset!r} is empty: give at least two prompts")
    try:
        if suffix == ".tsv":
            return load_dataset("csv", data_files=files, split="train", cache_dir=cache, sep="\t")
        loaded = load_dataset(kind, data_files=files, split="train", cache_dir=cache)
    except ImportError as error:
        raise InputError(f"query_dataset={query_dataset!r} needs a package that is not installed: {error}") from error
    except (DatasetGenerationError, FileNotFoundError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise InputError(f"query_dataset={query_dataset!r} can't be read as {kind}: {str(cause)[:300]}") from error
    return loaded.rename_column("text", data.data_prompt_column) if _renames(kind, data) else loaded


def _renames(kind: str, data: DataSettings) -> bool:
    return kind == "text" and data.data_prompt_column != "text"


def _load_hub(query_dataset: str, data: DataSettings) -> tuple[Any, str | None]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(
            query_dataset, data.data_config or None, split=data.data_split, revision=data.data_revision or None
        )
    except Exception as error:
        raise InputError(
            f"query_dataset={query_dataset!r} (data_config={data.data_config!r}, data_split={data.data_split!r}, "
            f"data_revision={data.data_revision!r}) is no path that exists and can't be read from the hub "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return loaded, data.data_revision or None
