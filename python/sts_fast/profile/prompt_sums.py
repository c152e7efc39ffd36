"""What scores need of a profile, taken from it or read from its files without the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sts_fast.errors import one_line
from sts_fast.files import Document
from sts_fast.profile.identity import Identity
from sts_fast.profile.profile import (
    KEY,
    ROWS_FILE,
    DamagedProfile,
    Profile,
    identity_in,
    is_whole,
    read_entries,
    read_index,
)
from sts_fast.profile.rows import Quantity, SparseSums

if TYPE_CHECKING:
    import pyarrow as pa

    from sts_fast.statistics import Counts, IntArray


@dataclass(frozen=True)
class PromptSums:
    """Some quantities of a profile, and the tokens that they are sums over.

    n_read, n_pairs: [n_prompts] int64 tokens of each prompt, and pairs
    draw_of:  [n_prompts] int32 the draw of demonstrations that each was asked behind
    sums:     of each prompt, by feature
    """

    identity: Identity
    n_read: Counts
    n_pairs: Counts
    draw_of: IntArray
    sums: SparseSums

    @classmethod
    def of(cls, profile: Profile | Path, quantities: Sequence[Quantity]) -> PromptSums:
        """profile: itself, or its folder, of which these quantities are read.

        Raises DamagedProfile where a file is missing, damaged, or not the one that profile.json names.
        """
        if isinstance(profile, Profile):
            log = profile.log
            return cls(profile.identity, log.n_read, log.n_pairs, profile.prompt_set.draw_of, profile.rows.sums)
        index = read_index(profile)
        quantities = tuple(dict.fromkeys(quantities))
        table = read_columns(profile, index, ["n_tokens", "n_pairs", "draw", "features", *quantities])
        try:
            identity = identity_in(index)
            d_sae = int(identity.sae["d_sae"])
            indptr, entries = read_entries(table, ("indices", *quantities), d_sae)
            sums = SparseSums(d_sae, indptr, entries.pop("indices"), entries)  # type: ignore[arg-type]
            n_read, n_pairs, draw_of = (np.asarray(table.column(name)) for name in ("n_tokens", "n_pairs", "draw"))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedProfile(
                f"{profile} is no whole profile ({one_line(error)}): make it again", profile
            ) from error
        return cls(identity, n_read, n_pairs, draw_of.astype(np.int32), sums)


def questions_of(folder: Path) -> list[tuple[str, str]]:
    """(id, question) of the prompts of a profile whose text is known; raises as `PromptSums.of`."""
    table = read_columns(folder, read_index(folder), ["id", "question"])
    rows = zip(table.column("id").to_pylist(), table.column("question").to_pylist(), strict=True)
    return [(name, question) for name, question in rows if question is not None]


def read_columns(folder: Path, index: Document, names: Sequence[str]) -> pa.Table:
    """Some columns of rows.parquet, whose pages' checksums are compared; a file without the key is hashed as a whole.

    index: profile.json. Raises DamagedProfile where the file is missing, damaged, or of another profile.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / ROWS_FILE
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            key = (file.metadata.metadata or {}).get(KEY.encode())
            if key == index["key"].encode() or (key is None and is_whole(path, index)):
                table = file.read(columns=list(names), use_threads=False)
                if set(names) <= set(table.column_names):
                    return table
    except (OSError, pa.ArrowException):
        pass
    raise DamagedProfile(f"{path} is missing or damaged: make the profile again", folder)
