"""Watches during training whether a forecast comes true: a callback for the trainers of Transformers and TRL."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from sts_fast import files
from sts_fast.errors import InputError
from sts_fast.forecast.run import FEATURES_FILE, PROMPTS_FILE, SCORES_FILE, SHIFT_FILE, TRAINING_FILE, Run
from sts_fast.model.language_model import LanguageModel, batches
from sts_fast.model.memory import MOST_BATCH_TOKENS
from sts_fast.ops.shift import ShiftStats
from sts_fast.report import build_report
from sts_fast.sae import SAE, load_sae

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from transformers import Trainer

    from sts_fast.statistics import IntArray

BASE_FILE = "base.safetensors"
SCHEMA_VERSION = "1.0"
# The sums of a prompt's features in the forecast and here differ by the rounding of bfloat16; more is another model.
MOST_DIFFERENT = 0.1
LEAST_OVERLAP = 0.1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """How far training had come at one step.

    shift:           E_x sum_j (h_j(x; now) - h_j(x; base))^2 over all features, x the training set's probes
    overlap:         part of the forecast's D_N among the N features that have shifted most
    share_of_top_n:  part of `shift` that lies in the forecast's D_N
    exposure:        by domain, E_x sum_{j in D_N} (h_j(x; now) - h_j(x; base))^2: STS_icl with training in the place
                     of demonstrations
    seconds:         what this measurement took
    """

    step: int
    shift: float
    overlap: float
    share_of_top_n: float
    exposure: dict[str, float]
    seconds: float


class TransferMonitor(TrainerCallback):
    """Measures while training how far the model has moved, and whether in the features that were forecast.

        monitor = TransferMonitor("run1", output="run1-training", stop_when={"law": 0.5}).attach(trainer)
        trainer.train()

    The probes are prompts of the forecast, half of them from its training set; their residual streams before training
    are kept once, in bfloat16. A measurement runs them through the layers below the SAE and nothing else; it changes
    nothing about the training, whose weights are the same, bit for bit, as without it.

    forecast:  folder that `sts-fast score` wrote for this model
    output:    folder for what is kept: base activations (so that training can be resumed) and, at the end, a run with
               training.json, which `sts-fast report` shows and `sts-fast validate` reads
    every:     steps from one measurement to the next
    n_probes:  prompts run per measurement
    domains:   those to watch; by default all of the forecast
    stop_when: by domain, the exposure at which training stops; a domain's score by icl in the forecast, which is in
               the same unit, tells what the demonstrations alone did
    sae:       the forecast's SAE where it is not to be loaded again
    history:   one Measurement after another

    Raises InputError where the folder is no forecast, a domain is not in it, or the SAE is another one; and, when
    training begins, where the parameters are sharded over processes, or training is resumed without its base.
    """

    def __init__(
        self,
        forecast: str | Path,
        *,
        output: str | Path,
        every: int = 50,
        n_probes: int = 64,
        domains: Sequence[str] | None = None,
        stop_when: Mapping[str, float] | None = None,
        sae: SAE | None = None,
    ) -> None:
        self.folder, self.output = Path(forecast), Path(output)
        self.every, self.stop_when = every, dict(stop_when or {})
        self.history: list[Measurement] = []
        run = Run.load(self.folder)
        self.scores = run.scores
        names = [domain["name"] for domain in self.scores["domains"]]
        self.domains = list(names if domains is None else domains)
        for name in (*self.domains, *self.stop_when):
            if name not in names:
                raise InputError(f"{self.folder} forecasts nothing for '{name}': its domains are {', '.join(names)}")
        self.domains += [name for name in self.stop_when if name not in self.domains]
        if every < 1 or n_probes < 2 * (1 + len(self.domains)):
            raise InputError(
                f"every must be at least 1, and n_probes twice the number of sets watched, {1 + len(self.domains)}, "
                f"but they are {every} and {n_probes}"
            )
        self.sae = sae or load_sae(self.scores["sae"]["source"])
        shifts = [feature["mean_squared_shift"] for feature in self.scores["shifted_features"]]
        kind = "CorrelationStats" if None in shifts else "ShiftStats"
        if files.load_arrays(self.folder / SHIFT_FILE, kind)[1].get("sae_fingerprint") != self.sae.fingerprint:
            raise InputError(f"{self.sae.source} is not the SAE that {self.folder} was made with: give that as sae")
        self.features = np.sort([feature["index"] for feature in self.scores["shifted_features"]])
        self.probes = _choose_probes(run, self.scores["train"]["name"], self.domains, n_probes)
        self._base: torch.Tensor | None = None
        self._trainer: Trainer | None = None
        self._warned: set[str] = set()
        self._began = 0.0
        files.prepare_folder(self.output)

    def attach(self, trainer: Trainer) -> TransferMonitor:
        """Puts this callback into a trainer, and its numbers into that trainer's log."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        import torch

        self._began = time.perf_counter()
        if not state.is_world_process_zero:
            return
        # FSDP leaves no mark on the parameters; ZeRO 3 and distributed tensors do.
        is_fsdp = getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if is_fsdp or any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
            raise InputError("TransferMonitor cannot read parameters that are sharded over processes: train without it")
        if self._trainer is None:
            logger.warning(
                "TransferMonitor was given as a bare callback: its numbers go to %s, but not to the trainer's log; "
                "monitor.attach(trainer) does both",
                self.output / TRAINING_FILE,
            )
        path = self.output / BASE_FILE
        if state.global_step:
            self._resume(path, model, state.global_step)
        else:
            self._base = self._residuals(model)
            self._check_model()
            files.save_arrays(path, {"base": self._base.view(torch.int16).numpy()}, {"kind": "base", "of": self._key()})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        if state.is_world_process_zero:
            self._measure(state.global_step, model, control)
        if self.stop_when:
            _stop_together(control)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if not self.history or self.history[-1].step != state.global_step:
            self._measure(state.global_step, model, control)
        for name in (SCORES_FILE, SHIFT_FILE, PROMPTS_FILE, FEATURES_FILE):
            if (self.folder / name).is_file() and self.folder.resolve() != self.output.resolve():
                with files.atomic_path(self.output / name) as path:
                    shutil.copyfile(self.folder / name, path)
        build_report(self.output)
        spent, took = sum(m.seconds for m in self.history), time.perf_counter() - self._began
        logger.info("%d measurements took %.1f s, %.1f%% of the training", len(self.history), spent, 100 * spent / took)

    def _measure(self, step: int, model: Any, control: Any) -> None:
        began = time.perf_counter()
        assert self._base is not None  # kept when training began
        now = self._residuals(model)
        set_of = self.probes.row_sets
        in_train = set_of == 0
        all_features, exposed = (
            ShiftStats(self.sae),
            ShiftStats(self.sae, columns=self.features, n_replicates=len(self.domains)),
        )
        all_features.update(self._base[in_train], now[in_train])
        weights = (set_of[:, None] == 1 + np.arange(len(self.domains))).astype(np.float64)
        exposed.update(self._base, now, weights)
        moved = all_features.mean_squared_shift
        total = float(moved.sum())
        top = all_features.top(len(self.features)) if total else np.zeros(0, np.int64)
        found = Measurement(
            step=step,
            shift=total,
            overlap=len(np.intersect1d(top, self.features)) / len(self.features),
            share_of_top_n=float(moved[self.features].sum()) / total if total else 0.0,
            exposure=dict(
                zip(self.domains, (exposed.weighted_sq_shift.sum(axis=0) / weights.sum(axis=0)).tolist(), strict=True)
            ),
            seconds=time.perf_counter() - began,
        )
        self.history.append(found)
        self._write()
        self._log(found, control)
        self._warn(found, control)

    def _log(self, found: Measurement, control: Any) -> None:
        if self._trainer is None:
            return
        logs = {"transfer/shift": found.shift, "transfer/overlap": found.overlap}
        logs |= {"transfer/share_of_top_n": found.share_of_top_n, "transfer/seconds": found.seconds}
        logs |= {f"transfer/exposure/{name}": value for name, value in found.exposure.items()}
        from transformers import Trainer

        # Not the subclass' own, which in TRL ends the window that it averages over; and what the trainer itself is
        # about to log at this step must not count as done.
        due = control.should_log
        Trainer.log(self._trainer, logs)
        control.should_log = due

    def _warn(self, found: Measurement, control: Any) -> None:
        for name, budget in self.stop_when.items():
            if found.exposure[name] > budget:
                logger.warning(
                    "training stops at step %d: the exposure of '%s' is %.4g, over its budget of %.4g",
                    *(found.step, name, found.exposure[name], budget),
                )
                control.should_training_stop = True
        for domain in self.scores["domains"]:
            forecast, exposure = domain["scores"].get("icl"), found.exposure.get(domain["name"])
            if exposure and forecast and exposure > forecast["value"] > 0 and domain["name"] not in self._warned:
                self._warned.add(domain["name"])
                logger.warning(
                    "at step %d training has moved '%s' further (%.4g) than the demonstrations did (%.4g)",
                    *(found.step, domain["name"], exposure, forecast["value"]),
                )
        if found.overlap < LEAST_OVERLAP and found.shift and "" not in self._warned:
            self._warned.add("")
            logger.warning(
                "at step %d training moves other features than were forecast (overlap %.0f%%): the scores may not "
                "describe it",
                *(found.step, 100 * found.overlap),
            )

    def _residuals(self, model: Any) -> torch.Tensor:
        """[n_rows, d_in] bfloat16, on the CPU: what the SAE reads of each probe, one after another."""
        import torch

        # Adapters lie inside the model that they adapt.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        found: dict[int, torch.Tensor] = {}
        with _undisturbed(model):
            decoder = LanguageModel(model, self.scores["sae"]["hook_name"])
            for batch in batches([len(ids) for ids in self.probes.ids], MOST_BATCH_TOKENS):
                (rows,) = decoder.residuals([self.probes.ids[i] for i in batch])
                for i, of_probe in zip(batch, rows, strict=True):
                    positions = torch.from_numpy(self.probes.positions[i].astype(np.int64))
                    found[i] = of_probe[positions.to(of_probe.device)].to("cpu", torch.bfloat16)
        return torch.cat([found[i] for i in range(len(found))])

    def _resume(self, path: Path, model: Any, step: int) -> None:
        import torch

        self.history = [found for found in _read_history(self.output / TRAINING_FILE) if found.step <= step]
        if path.is_file():
            arrays, metadata = files.load_arrays(path, "base")
            if metadata.get("of") == self._key():
                self._base = torch.from_numpy(arrays["base"]).view(torch.bfloat16)
                return
        if not hasattr(model, "disable_adapter"):
            raise InputError(
                f"training is resumed at step {step}, but {path} does not hold the base activations of these probes: "
                "give the output folder of the monitor that began it"
            )
        with model.disable_adapter():
            self._base = self._residuals(model)

    def _check_model(self) -> None:
        """Warns where D_N's features on the base model are not those of the forecast."""
        from sts_fast.ops.encode import encode

        active = encode(self.sae, self._base, self.features)
        of_row = np.add.reduceat(np.append(active.values.astype(np.float64), 0.0), active.indptr[:-1])
        of_row[np.diff(active.indptr) == 0] = 0.0
        sums = np.bincount(self.probes.row_probes, of_row, minlength=len(self.probes.ids))
        known = np.isfinite(self.probes.act_sums)
        expected, actual = self.probes.act_sums[known].sum(), sums[known].sum()
        if abs(actual - expected) > MOST_DIFFERENT * abs(expected):
            logger.warning(
                "this model is not the one that %s was made from: on its prompts the features of D_N sum to %.4g, and "
                "not to %.4g",
                *(self.folder, actual, expected),
            )

    def _key(self) -> str:
        return f"{self.sae.fingerprint} {len(self.probes.ids)} {sum(map(len, self.probes.positions))}"

    def _write(self) -> None:
        record = {
            "schema_version": SCHEMA_VERSION,
            "forecast": str(self.folder),
            "every": self.every,
            "n_probes": len(self.probes.ids),
            "stop_when": self.stop_when,
            "history": [asdict(found) for found in self.history],
        }
        with files.atomic_path(self.output / TRAINING_FILE) as path:
            path.write_text(files.to_json(record), encoding="utf-8")


@dataclass(frozen=True)
class _Probes:
    """Prompts to measure on, those of the training set first.

    ids, positions: token ids of each, and the positions that are read
    row_sets:   [n_rows] which set each row read belongs to: 0 the training set, then the domains
    row_probes: [n_rows] which probe each row belongs to
    act_sums:   [n_probes] the forecast's sum of D_N over the rows; NaN where it has none
    """

    ids: list[IntArray]
    positions: list[IntArray]
    row_sets: NDArray[np.int64]
    row_probes: NDArray[np.int64]
    act_sums: NDArray[np.float64]


def _choose_probes(run: Run, train: str, domains: Sequence[str], n_probes: int) -> _Probes:
    table = run.table(PROMPTS_FILE, ["stage", "domain", "base_ids", "positions", "act_sum"]).to_pydict()
    of_sets: list[list[int]] = []
    sets = [("shift", train), *(("score", name) for name in domains)]
    for i, key in enumerate(sets):
        rows = [
            row
            for row, found in enumerate(zip(table["stage"], table["domain"], strict=True))
            if found == key and table["positions"][row]
        ]
        if not rows:
            raise InputError(f"{run.folder / PROMPTS_FILE} has no prompts of '{key[1]}': forecast again")
        n = n_probes - n_probes // 2 if i == 0 and domains else n_probes // (2 * len(domains)) if domains else n_probes
        of_sets.append([rows[j] for j in np.unique(np.linspace(0, len(rows) - 1, n).astype(int))])
    chosen = [row for rows in of_sets for row in rows]
    lengths = [len(table["positions"][row]) for row in chosen]
    set_of = np.repeat(np.arange(len(of_sets)), [len(rows) for rows in of_sets])
    return _Probes(
        ids=[np.asarray(table["base_ids"][row], np.int32) for row in chosen],
        positions=[np.asarray(table["positions"][row], np.int32) for row in chosen],
        row_sets=np.repeat(set_of, lengths),
        row_probes=np.repeat(np.arange(len(chosen)), lengths),
        act_sums=np.asarray([table["act_sum"][row] for row in chosen], np.float64),
    )


def _stop_together(control: Any) -> None:
    """Stops every process where the first one stops: those that went on would wait for it for ever."""
    import torch.distributed as processes

    if processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1:
        decision = [control.should_training_stop]
        processes.broadcast_object_list(decision, src=0)
        control.should_training_stop = control.should_training_stop or decision[0]


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and random numbers of its own; afterwards everything is as it was."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _read_history(path: Path) -> list[Measurement]:
    try:
        return [Measurement(**found) for found in json.loads(path.read_text(encoding="utf-8"))["history"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it") from error
