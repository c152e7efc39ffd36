"""A callback for the trainers of Transformers and TRL that measures during training whether a forecast comes true."""

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
# The sums of a prompt's features in the forecast and here differ by the rounding of bfloat16; a larger relative
# difference means another model.
MOST_DIFFERENT = 0.1
LEAST_OVERLAP = 0.1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Shift of the features at one step of training.

    shift:           E_x sum_j (h_j(x; now) - h_j(x; base))^2 over all features, x the training set's probes
    overlap:         share of the forecast's D_N among the N features that have shifted most
    share_of_top_n:  share of `shift` in the forecast's D_N
    exposure:        by domain, E_x sum_{j in D_N} (h_j(x; now) - h_j(x; base))^2: STS_icl with training instead of
                     demonstrations
    seconds:         duration of this measurement
    """

    step: int
    shift: float
    overlap: float
    share_of_top_n: float
    exposure: dict[str, float]
    seconds: float


class TransferMonitor(TrainerCallback):
    """Measures during training how far the model has moved, and how much of that is in the forecast's features.

        monitor = TransferMonitor("run1", output="run1-training", stop_when={"law": 0.5}).attach(trainer)
        trainer.train()

    The probes are prompts of the forecast, half of them from its training set. Their residual streams before training
    are stored once, in bfloat16. A measurement runs only the layers below the SAE. It does not affect the training: the
    weights are the same, bit for bit, as without it.

    forecast:  folder that `sts-fast score` wrote for this model
    output:    folder for the base activations, from which training can be resumed, and at the end for a run with
               training.json, which `sts-fast report` shows and `sts-fast validate` reads
    every:     steps between two measurements
    n_probes:  prompts per measurement
    domains:   domains to measure; by default all of the forecast
    stop_when: by domain, the exposure at which training stops. The domain's STS_icl in the forecast has the same unit,
               and is the effect of the demonstrations alone.
    sae:       the forecast's SAE, if it is loaded already
    history:   the measurements in order

    Raises InputError where the folder is not a forecast, a domain is not in it, or the SAE is another one; and, when
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
        self._run = files.sha256(run.folder / SCORES_FILE)
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
        if run.means()[0].sae_fingerprint != self.sae.fingerprint:
            raise InputError(f"{self.sae.source} is not the SAE that {self.folder} was made with: give that as sae")
        self.features = np.sort([feature["index"] for feature in self.scores["shifted_features"]])
        self.probes = _choose_probes(run, self.scores["train"]["name"], self.domains, n_probes)
        self._base: torch.Tensor | None = None
        self._trainer: Trainer | None = None
        self._warned: set[str] = set()
        self._began = 0.0
        files.prepare_folder(self.output)

    def attach(self, trainer: Trainer) -> TransferMonitor:
        """Adds this callback to a trainer, and its numbers to the trainer's log; returns itself."""
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
        measurement = Measurement(
            step=step,
            shift=total,
            overlap=len(np.intersect1d(top, self.features)) / len(self.features),
            share_of_top_n=float(moved[self.features].sum()) / total if total else 0.0,
            exposure=dict(
                zip(self.domains, (exposed.weighted_sq_shift.sum(axis=0) / weights.sum(axis=0)).tolist(), strict=True)
            ),
            seconds=time.perf_counter() - began,
        )
        self.history.append(measurement)
        self._write()
        self._log(measurement, control)
        self._warn(measurement, control)

    def _log(self, measurement: Measurement, control: Any) -> None:
        if self._trainer is None:
            return
        logs = {"transfer/shift": measurement.shift, "transfer/overlap": measurement.overlap}
        logs |= {"transfer/share_of_top_n": measurement.share_of_top_n, "transfer/seconds": measurement.seconds}
        logs |= {f"transfer/exposure/{name}": value for name, value in measurement.exposure.items()}
        from transformers import Trainer

        # TRL's own `log` would end the window that it averages over. Restoring should_log keeps the trainer's own log
        # entry of this step.
        due = control.should_log
        Trainer.log(self._trainer, logs)
        control.should_log = due

    def _warn(self, measurement: Measurement, control: Any) -> None:
        for name, budget in self.stop_when.items():
            if measurement.exposure[name] > budget:
                logger.warning(
                    "training stops at step %d: the exposure of '%s' is %.4g, over its budget of %.4g",
                    *(measurement.step, name, measurement.exposure[name], budget),
                )
                control.should_training_stop = True
        for domain in self.scores["domains"]:
            forecast, exposure = domain["scores"].get("icl"), measurement.exposure.get(domain["name"])
            if exposure and forecast and exposure > forecast["value"] > 0 and domain["name"] not in self._warned:
                self._warned.add(domain["name"])
                logger.warning(
                    "at step %d training has moved '%s' further (%.4g) than the demonstrations did (%.4g)",
                    *(measurement.step, domain["name"], exposure, forecast["value"]),
                )
        if measurement.overlap < LEAST_OVERLAP and measurement.shift and "" not in self._warned:
            self._warned.add("")
            logger.warning(
                "at step %d training moves other features than were forecast (overlap %.0f%%): the scores may not "
                "describe it",
                *(measurement.step, 100 * measurement.overlap),
            )

    def _residuals(self, model: Any) -> torch.Tensor:
        """[n_rows, d_in] bfloat16, on the CPU: the SAE's input at each probe's positions, probe after probe."""
        import torch

        # Adapters are inside the model that they adapt.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        rows_of: dict[int, torch.Tensor] = {}
        with _undisturbed(model):
            decoder = LanguageModel(model, self.scores["sae"]["hook_name"])
            for batch in batches([len(ids) for ids in self.probes.ids], MOST_BATCH_TOKENS):
                (rows,) = decoder.residuals([self.probes.ids[i] for i in batch])
                for i, of_probe in zip(batch, rows, strict=True):
                    positions = torch.from_numpy(self.probes.positions[i].astype(np.int64))
                    rows_of[i] = of_probe[positions.to(of_probe.device)].to("cpu", torch.bfloat16)
        return torch.cat([rows_of[i] for i in range(len(rows_of))])

    def _resume(self, path: Path, model: Any, step: int) -> None:
        import torch

        self.history = [
            measurement for measurement in _read_history(self.output / TRAINING_FILE) if measurement.step <= step
        ]
        if path.is_file():
            arrays, metadata = files.load_arrays(path, "base")
            if metadata.get("of") == self._key():
                self._base = torch.from_numpy(arrays["base"]).view(torch.bfloat16)
                return
        if not hasattr(model, "disable_adapter"):
            raise InputError(
                f"training is resumed at step {step}, but {path} lacks the base activations of these probes: give the "
                "output folder of the monitor that began it"
            )
        with model.disable_adapter():
            self._base = self._residuals(model)

    def _check_model(self) -> None:
        """Warns where the activations of D_N on the base model are not those of the forecast."""
        from sts_fast.ops.encode import encode

        active = encode(self.sae, self._base, self.features)
        of_row = np.add.reduceat(np.append(active.values.astype(np.float64), 0.0), active.indptr[:-1])
        of_row[np.diff(active.indptr) == 0] = 0.0
        sums = np.bincount(self.probes.row_probes, of_row, minlength=len(self.probes.ids))
        known = np.isfinite(self.probes.act_sums)
        expected, actual = self.probes.act_sums[known].sum(), sums[known].sum()
        if abs(actual - expected) > MOST_DIFFERENT * abs(expected):
            logger.warning(
                "this model is not the one that %s was made from: on its prompts the features of D_N sum to %.4g, "
                "not to %.4g",
                *(self.folder, actual, expected),
            )

    def _key(self) -> str:
        return f"{self.sae.fingerprint} {len(self.probes.ids)} {sum(map(len, self.probes.positions))}"

    def _write(self) -> None:
        record = {
            "schema_version": SCHEMA_VERSION,
            "run": self._run,
            "forecast": str(self.folder),
            "every": self.every,
            "n_probes": len(self.probes.ids),
            "stop_when": self.stop_when,
            "history": [asdict(measurement) for measurement in self.history],
        }
        with files.atomic_path(self.output / TRAINING_FILE) as path:
            path.write_text(files.to_json(record), encoding="utf-8")


@dataclass(frozen=True)
class _Probes:
    """Prompts of the measurements, those of the training set first.

    ids, positions: token ids of each, and the positions that are read
    row_sets:   [n_rows] index of each row's set: 0 for the training set, then the domains
    row_probes: [n_rows] index of each row's probe
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
            for row, row_key in enumerate(zip(table["stage"], table["domain"], strict=True))
            if row_key == key and table["positions"][row]
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
    """Stops every process where the first one stops: otherwise the others would wait for it forever."""
    import torch.distributed as processes

    if processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1:
        decision = [control.should_training_stop]
        processes.broadcast_object_list(decision, src=0)
        control.should_training_stop = control.should_training_stop or decision[0]


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Restores the modules' training modes and the random number generators on exit."""
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
        return [Measurement(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["history"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it") from error
