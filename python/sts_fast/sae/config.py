"""A checkpoint's JSON, read strictly: a value of the wrong type is an error that names file and key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sts_fast.errors import InputError
from sts_fast.files import Document

MOST_BYTES = 16 << 20

# Keys that say how an SAE was trained, on what, where its files are and who made it. No feature depends on them.
IGNORED_KEYS = re.compile(
    # data and the activations that were buffered
    r"dataset\w*|data|is_dataset_tokenized|streaming|context_size|ctx_len|n_ctxs|buffer|tokens_per_buffer|seqpos_slice"
    r"|exclude_special_tokens|\w*cached_activations\w*|n_batches_in_buffer|\w+_tokens|\w*batch_size\w*|act_store_device"
    # the optimizer, its schedule and its losses
    r"|\w*lr|lr_\w+|adam\w*|betas?|optimizer\w*|scheduler\w*|\w*steps?|epochs?|\w+_cycles|\w*seed|resume|verbose"
    r"|\w*(loss|penalty|coefficient|auxk|top_k_aux)\w*|(l0|l1|lp|mse)_\w+|target_l0|use_ghost_grads|noise_scale|decay_start"
    r"|scale_sparsity_penalty_by_decoder_norm|multi_topk|threshold_(beta|lr)|topk_threshold_lr|\w*bandwidth"
    r"|jumprelu_(init_threshold|sparsity_loss_mode|tanh_scale|ste_to_input)|use_sparse_activations|finetuning_method"
    # its beginning, and constraints that the weights obey since
    r"|\w*init|\w*init_\w+|normalize_(sae_)?decoder|decoder_(exactly|fixed)_\w+|from_pretrained_path|expansion_factor"
    r"|matryoshka_widths|group_(fractions|weights)"
    # features that fell silent, evaluation, logs, computers
    r"|dead_\w+|feature_sampling_\w+|resample\w*|n_eval_batches|eval\w*|(hook|n)_eval\w*|wandb\w*|log_to_\w+|log_\w+_to_wandb"
    r"|\w*logger|n_checkpoints|checkpoint_path|autocast\w*|compile_\w+|\w+_compilation_mode|device|(torch_)?dtype"
    r"|use_triton_kernel|sparsity_threshold_for_triton_spmm_kernel|strict_loading|sae_pretrained_name_or_path"
    # names
    r"|(model|lm|run|sae|tokenizer|project|experiment|sweep|repo|series|release|neuronpedia)_(id|name)|(model|trainer)_class"
    r"|model_class_name|(\w+_)?(url|version)|id|name|authors?|licen[sc]e|notes?|comments?|description|tags|date|created_at"
    r"|hook_layer(_out)?|layer"
)


class Config:
    """The JSON object of one file, and the file's name for messages.

    Getters return the default where a key is missing or null. They raise InputError, naming file and key, where its
    value is of another type. Keys that no getter asks for are left over, see `refuse_unread`.
    """

    def __init__(self, where: str | Path, values: Document) -> None:
        self.where = str(where)
        self.values = values
        self._read: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> Config:
        if not path.is_file():
            raise InputError(f"{path.parent} has no {path.name}: copy or download the SAE's whole folder")
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, too many for an SAE's config: it was not read")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is not readable JSON ({error}): copy or download it again") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} does not hold a JSON object: copy or download it again")
        return cls(path, values)

    def refuse_unread(self, *ignored: str) -> None:
        """Raises InputError for keys that were never asked for, by name: they may change the features.

        ignored: keys that cannot change the features of this layout, beside IGNORED_KEYS and keys that say nothing
        """
        left = [key for key, value in self.values.items() if key not in {*self._read, *ignored} and _says_more(value)]
        left = [key for key in left if not IGNORED_KEYS.fullmatch(key)]
        if left:
            raise InputError(not_understood(self.where, left, "key"))

    def has(self, key: str) -> bool:
        self._read.add(key)
        return self.values.get(key) is not None

    def text(self, key: str, default: str = "") -> str:
        return str(self._checked(key, default, "a text", lambda value: isinstance(value, str)))

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._checked(key, default, "true or false", lambda value: isinstance(value, bool)))

    def whole(self, key: str) -> int | None:
        """A whole number; None where it is missing."""
        value = self._checked(key, None, "a whole number", lambda n: isinstance(n, int) and not isinstance(n, bool))
        return None if value is None else int(value)

    def number(self, key: str) -> float | None:
        """A finite number; None where it is missing."""
        value = self._checked(key, None, "a finite number", _is_finite)
        return None if value is None else float(value)

    def part(self, key: str) -> Config:
        """The object under the key, empty where there is none."""
        value = self._checked(key, {}, "a JSON object", lambda value: isinstance(value, dict))
        return Config(f"{self.where}, {key}", dict(value))

    def k(self, d_sae: int, key: str = "k") -> int:
        """Number of features that a row keeps, 1 to d_sae; raises InputError where it is missing."""
        self._read.add(key)
        value = self.values.get(key)
        if not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= d_sae):
            raise InputError(
                f"{self.where}: {key} must be a whole number between 1 and d_sae = {d_sae}, but is {_short(value)}"
            )
        return value

    def check_widths(self, **widths: int) -> None:
        """Raises InputError where a key states a width that differs from the weights'."""
        for key, width in widths.items():
            stated = self.whole(key)
            if stated is not None and stated != width:
                raise InputError(f"{self.where} says {key} = {_short(stated)}, but the weights have {width}")

    def _checked(self, key: str, default: Any, kind: str, is_valid: Any) -> Any:
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not is_valid(value):
            raise InputError(f"{self.where}: {key} must be {kind}, but is {_short(value)}")
        return value


def not_understood(where: str | Path, names: Sequence[str], kind: str) -> str:
    """Sentence that refuses tensors or keys of a file."""
    some = ", ".join(f"'{name[:60]}'" for name in names[:6]) + (", …" if len(names) > 6 else "")
    kinds, them = (kind, "it") if len(names) == 1 else (f"{kind}s", "them")
    return (
        f"{where}: the {kinds} {some} may change the features, and this package does not know how: remove {them} from "
        f"a copy of the file if the features do not depend on {them}, or save the SAE with SAELens"
    )


def _says_more(value: Any) -> bool:
    """False for values such as null, false, 0, 'none' and empty lists, which ask for nothing."""
    if isinstance(value, (list, tuple, dict)):
        return any(_says_more(part) for part in (value.values() if isinstance(value, dict) else value))
    if value is None or isinstance(value, (bool, int, float)):
        return bool(value)
    return not isinstance(value, str) or value.lower() not in ("", "none")


def _is_finite(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
