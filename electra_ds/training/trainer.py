"""The training loop."""

import contextlib
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from electra_ds.cluster import run_folder
from electra_ds.cluster.launchers import Ranks
from electra_ds.common.errors import RunFailure, UserError
from electra_ds.common.folder_lock import Lock
from electra_ds.config.loading import differences, parse_run
from electra_ds.config.schema import RunConfig
from electra_ds.data.batch import Batch
from electra_ds.data.dataset import Data
from electra_ds.data.loader import Loader, StepBatch, consumed_rows_from_state
from electra_ds.data.masking import masking_recipe
from electra_ds.data.rows import RowOrder, RowReader
from electra_ds.data.tokenizer import load_tokenizer
from electra_ds.model.kernels.attention import document_cu_seqlens
from electra_ds.model.losses import BINS, Counts, Losses
from electra_ds.model.weights import padded_rows
from electra_ds.training import checkpoint, checkpointer
from electra_ds.training.checkpoint import find_checkpoint, tokenizer_of
from electra_ds.training.engine import (
    Engine,
    StepResult,
    Votes,
    on_rank0,
    precision_name,
)
from electra_ds.training.held_out import evaluate_sources
from electra_ds.training.metrics import metrics_of_kind, rates
from electra_ds.training.run_logger import RunLogger
from electra_ds.training.schedule import learning_rate
from electra_ds.training.spike_guard import SpikeGuard
from electra_ds.training.state import Progress


@dataclass(frozen=True)
class Limits:
    """When an attempt ends before the schedule does, and where its weights come from.

    asked: why it is to stop at the next vote; signals and others add to it.
    """

    stop_at_step: int | None = None
    max_minutes: float | None = None
    extend: bool = False
    init_from: Path | None = None
    asked: list[str] = field(default_factory=list)


def _refuse_other_words(source: Path, ours: Path) -> None:
    """Two vocabularies of one size fit each other's tables: compare the words, where both are at hand."""
    theirs = tokenizer_of(source)
    if (
        theirs.is_dir()
        and ours.is_dir()
        and load_tokenizer(theirs).names != load_tokenizer(ours).names
    ):
        raise UserError(
            f"--init-from {source}: its vocabulary ({theirs}) is not that of the data ({ours}); prepare with that one"
        )


def _with_bounds(batch: Batch) -> Batch:
    return batch._replace(cu_seqlens=document_cu_seqlens(batch.document_ids).pin_memory())


def _say(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        with contextlib.suppress(OSError):  # the console may be a file on a full disk
            print(text, flush=True)


WAIT_SHARE = 0.05  # of an interval's time: more is said aloud
LOOK_SECONDS = (
    1.0  # between two looks for OUT/STOP and OUT/SAVE, which may lie on a far file system
)


class Run:
    """One attempt at a run on this rank."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        data: Data,
        reader: RowReader,
        row_order: RowOrder,
        out: Path,
        total_steps: int,
        limits: Limits,
        began: float,
        lock: Lock,
    ):
        self.config, self.engine, self.out, self.total_steps = config, engine, out, total_steps
        self.data, self.reader, self.row_order, self.held_out = (
            data,
            reader,
            row_order,
            data.held_out(),
        )
        self.limits, self.began, self.lock = limits, began, lock
        self.padded = padded_rows(engine.module)
        masks_words = config.objective.masking != "token"
        begins_word = load_tokenizer(data.tokenizer).begins_word() if masks_words else None
        self.recipe = masking_recipe(
            data.manifest, config.objective, config.train.seed, begins_word
        )
        self.is_rank0 = engine.ranks.rank == 0
        self.last_step = min(total_steps, limits.stop_at_step or total_steps)  # of this attempt
        self.metrics: RunLogger | None = None
        self.saving: checkpointer.PendingCheckpoint | None = None  # not yet a checkpoint
        self._voted = (
            self.saving
        )  # the one that the last vote told of: a save since then committed it
        self.asked = limits.asked
        self.saved_step = -1
        self._looked: dict[str, float] = {}
        self._interval_began, self._waited, self._interval_tokens, self._pause = (
            time.perf_counter(),
            0.0,
            0,
            0.0,
        )
        self._steps_here = 0

    def resume(self) -> Progress:
        """Load OUT's latest checkpoint (or --init-from, weights alone), refusing another science or other data."""
        engine, limits = self.engine, self.limits
        found = on_rank0(lambda: checkpoint.latest(self.out / "ckpt"))
        if found is None:
            if limits.init_from is not None:
                source = find_checkpoint(limits.init_from)
                _refuse_other_words(source, self.data.tokenizer)
                checkpoint.load(engine, source, self.padded, weights_only=True)
                _say(engine.ranks, f"weights of {source}; new schedule, position 0")
            return Progress()
        meta = checkpoint.read_meta(found)
        science, machine = differences(parse_run(meta.config, f"{found}/meta.json"), self.config)
        if limits.extend:
            science = [
                line
                for line in science
                if not line.startswith(("train.total_steps:", "train.epochs:"))
            ]
        if science:
            raise UserError(
                f"{found} was trained with another config: {'; '.join(science)}. Take the old values back, choose "
                "another --out, or start from its weights with --init-from"
            )
        consumed_rows_from_state(meta.progress.data, self.reader, self.row_order)
        checkpoint.load(engine, found, self.padded)
        if limits.extend and found.name == checkpoint.FINAL:
            checkpointer.rename_final(engine, found, meta.progress.step)
        changed = f"; now {', '.join(machine)}" if machine else ""
        _say(engine.ranks, f"resuming {found} at step {meta.progress.step}{changed}")
        return meta.progress

    # ------------------------------------------------------------------------------------------------------ the loop

    def train(self, progress: Progress) -> bool:
        """Run from `progress` to the end of the schedule (True) or to an agreed stop (False); saved either way."""
        engine, train, options = self.engine, self.config.train, self.config.optimizer
        batches = self._batches(progress)
        self.interval = self._open_interval(progress)
        self.saved_step = progress.step if progress.data else -1
        self.guard = SpikeGuard(train.spike_factor, progress.recent_losses)
        refuses = self.guard.refuses if train.spike_factor else None
        on_rank0(lambda: self._open_metrics(progress.step))
        with self.metrics or contextlib.nullcontext():
            self._greet(progress)
            batch = next(batches)._replace(
                wait_seconds=0.0
            )  # nothing was ahead of it, nor could be
            engine.send_votes(batch.masked_count, batch.token_count, **self._votes(progress.step))
            while True:
                votes = engine.wait_votes()
                if votes.written == engine.ranks.world_size and self.saving is self._voted:
                    self._commit()
                if votes.save:
                    self._save(progress, batches)
                if votes.stop or progress.step >= self.last_step:
                    break
                logs = (
                    progress.step + 1
                ) % self.config.logging.every == 0 or progress.step + 1 == self.total_steps
                counts = (votes.masked_count, votes.token_count)
                losses = engine.forward_backward(
                    batch.micro_batches, batch.first_rows, counts, refuses, with_counts=logs
                )
                following = next(batches)
                engine.send_votes(
                    following.masked_count, following.token_count, **self._votes(progress.step)
                )
                lr = learning_rate(
                    options.peak_lr, options.warmup_steps, progress.step, self.total_steps
                )
                result = engine.step(lr)
                self._gather_interval(losses if result.applied else [], batch)
                progress = self._advance(progress, batches, batch, votes, result, losses)
                batch = following
                if not result.applied:
                    continue
                if logs:
                    self._log(progress, losses, lr, result)
                if train.eval_every and progress.step % train.eval_every == 0:
                    self._evaluate(progress.step)
                if (
                    progress.step % self.config.checkpoint.every == 0
                    and progress.step < self.total_steps
                ):
                    self._save(progress, batches)
            return self._leave(progress, batches)

    def _batches(self, progress: Progress) -> Loader:
        train, ranks = self.config.train, self.engine.ranks
        return Loader(
            self.reader,
            self.row_order,
            self.recipe,
            rank=ranks.rank,
            world_size=ranks.world_size,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            consumed_rows=progress.data.get("position", 0),
            pin_memory=self.engine.device.type == "cuda",
            transform=_with_bounds if self.engine.device.type == "cuda" else None,
        )

    def _advance(
        self,
        progress: Progress,
        batches: Loader,
        batch: StepBatch,
        votes: Votes,
        result: StepResult,
        losses: list[Losses],
    ) -> Progress:
        """Where the run stands after an attempt: rows are consumed, the step counts only if it was applied."""
        data = batches.state(batch.first_row + self.config.train.global_batch_size)
        tokens = progress.tokens + votes.token_count
        progress = replace(progress, data=data, tokens=tokens, recent_losses=self.guard.recent)
        if result.applied:
            if self.metrics:
                self.metrics.advance(progress.step + 1)
            return replace(progress, step=progress.step + 1, skipped_in_a_row=0)
        self._tell_bad_loss(progress, batch, losses)
        progress = replace(
            progress, skipped=progress.skipped + 1, skipped_in_a_row=progress.skipped_in_a_row + 1
        )
        if progress.skipped_in_a_row > self.config.train.max_skipped_steps:
            raise RunFailure(
                f"{progress.skipped_in_a_row} steps in a row after step {progress.step} were skipped, for gradients or "
                f"losses that are not finite or spikes (train.max_skipped_steps = {self.config.train.max_skipped_steps}"
                "): lower optimizer.peak_lr, use bf16 or fp32, or look at the rows named above; last good "
                f"checkpoint: {self._last_checkpoint()}"
            )
        return progress

    def _tell_bad_loss(self, progress: Progress, batch: StepBatch, losses: list[Losses]) -> None:
        """A skipped step is rare, so a look at the losses may cost a sync. All ranks come here, and stop, together."""
        micro = self.config.train.micro_batch_size
        mine = [
            (
                float(loss.total),
                f"rank {self.engine.ranks.rank}: mlm_loss {float(loss.mlm_loss)}, disc_loss "
                f"{float(loss.disc_loss)} in rows "
                f"{np.array2string(batch.rows[index * micro : (index + 1) * micro], separator=', ', threshold=64)}",
            )
            for index, loss in enumerate(losses)
        ]
        found = self.guard.blame(
            [part for parts in self.engine.all_gather_object(mine) for part in parts]
        )
        if found and self.config.train.on_bad_loss == "stop":
            raise RunFailure(
                f"step {progress.step + 1} has {found}. The weights were not touched; --set train.on_bad_loss=skip "
                f"leaves out such steps; last good checkpoint: {self._last_checkpoint()}"
            )
        if found and self.metrics:
            self.metrics.say(f"step {progress.step + 1} has {found}: skipped")

    def _last_checkpoint(self) -> str:
        """The last checkpoint, for people. Collective while one is on its way: that one is waited for."""
        self._commit()
        return str(checkpoint.latest(self.out / "ckpt") or "none yet")

    # --------------------------------------------------------------------------------------------------- log and save

    def _open_interval(self, progress: Progress) -> Tensor:
        """[3] fp64 on the device: this rank's sums of mlm_loss, disc_loss and steps since the last log line."""
        saved, ranks = progress.interval, self.engine.ranks
        if len(saved) != ranks.world_size:  # another world size: rank 0 carries the sum of all
            saved = (
                [[sum(part) for part in zip(*saved, strict=True)]]
                if saved and ranks.rank == 0
                else []
            )
            own = saved[0] if saved else [0.0, 0.0, 0.0]
        else:
            own = saved[ranks.rank]
        return torch.tensor(own, dtype=torch.float64, device=self.engine.device)

    def _gather_interval(self, losses: list[Losses], batch: StepBatch) -> None:
        for loss in losses:
            self.interval[:2] += torch.stack([loss.mlm_loss, loss.disc_loss])
        self.interval[2] += 1 if self.is_rank0 and losses else 0
        self._waited += batch.wait_seconds
        self._steps_here += 1
        self._interval_tokens += batch.token_count

    def _log(self, progress: Progress, losses: list[Losses], lr: float, result: StepResult) -> None:
        """Losses averaged over the interval, rates of its last step. Ours alone syncs here; DeepSpeed reads norms."""
        counts = sum(
            torch.cat([torch.stack(loss.counts[:8]), loss.counts.histogram.flatten()])
            for loss in losses
        )
        timed = torch.tensor([self._waited, float(self._interval_tokens)], dtype=torch.float64)
        ranks = torch.stack(
            self.engine.all_gather(torch.cat([self.interval.cpu(), timed, counts.cpu()]))
        )
        sums, waited = ranks.sum(0), ranks[:, 3]
        mlm, disc, steps, _, tokens = sums[:5].tolist()
        now = time.perf_counter()
        seconds, self._interval_began = now - self._interval_began, now
        gen_weight, disc_weight = self.config.objective.loss_weights
        if self.metrics:
            values = {
                "loss": (gen_weight * mlm + disc_weight * disc) / steps,
                "mlm_loss": mlm / steps,
                "disc_loss": disc / steps,
                **rates(Counts(*sums[5:13], sums[13:].view(2, BINS))),
                "lr": lr,
                "grad_norm": float(result.grad_norm),
                "loss_scale": result.loss_scale,
                "skipped_steps": float(progress.skipped),
                "tokens": float(progress.tokens),
                "epoch": progress.data["position"] / self.reader.rows,
                "tokens_per_second": tokens / seconds,
                "data_wait_share": float(waited.max()) / seconds,  # the others wait for that rank
                "checkpoint_pause_seconds": self._pause,
                "seconds": time.monotonic() - self.began,
            }
            values = metrics_of_kind(values, self.config.objective)
            self.metrics.train(
                progress.step,
                values,
                seconds / self._steps_here * (self.total_steps - progress.step),
            )
            if values["data_wait_share"] > WAIT_SHARE:
                self.metrics.say(
                    f"WARNING: rank {int(waited.argmax())} waited for data in {values['data_wait_share']:.0%} of the "
                    "time since the last line: stage the data on local disks, or give each rank one more CPU core"
                )
        self.interval.zero_()
        self._waited, self._interval_tokens, self._pause, self._steps_here = 0.0, 0, 0.0, 0

    def _evaluate(self, step: int) -> None:
        if not self.held_out:
            return
        train, engine = self.config.train, self.engine
        with engine.evaluating() as module:
            values = evaluate_sources(
                module,
                self.held_out,
                self.recipe,
                engine.device,
                batch_rows=train.micro_batch_size,
                max_rows=train.eval_rows,
                rank=engine.ranks.rank,
                world_size=engine.ranks.world_size,
                sum_over_ranks=engine.sum,
            )
        if self.metrics:
            self.metrics.valid(step, values)

    def _save(self, progress: Progress, batches: Loader, final: bool = False) -> None:
        """Take a snapshot, to be committed once every rank has said that its files are written."""
        if progress.step == self.saved_step and not final:
            return
        self._commit()  # at most one snapshot in memory
        began = time.perf_counter()
        if self.metrics:
            self.lock.beat()  # a process that slept may have lost OUT
        interval = [part.tolist() for part in self.engine.all_gather(self.interval.cpu())]
        progress = replace(progress, data=progress.data or batches.state(0), interval=interval)
        folder, name = self.out / "ckpt", checkpoint.FINAL if final else str(progress.step)
        config = self.config.model_dump(mode="json")
        self.saving = checkpointer.PendingCheckpoint(
            self.engine, folder, name, progress, config, self.padded
        )
        self.saved_step, self._gathering = progress.step, time.perf_counter() - began
        if not self.config.checkpoint.asynchronous:
            self._commit()

    def _commit(self) -> None:
        """Make the snapshot that is on its way a checkpoint; waits for its writing."""
        if self.saving is None:
            return
        began, saving, self.saving = time.perf_counter(), self.saving, None
        if self.metrics:
            self.lock.beat()
        saving.commit(self.metrics.flush if self.metrics else lambda: None)
        if self.is_rank0:
            checkpointer.prune(self.out / "ckpt", self.config.checkpoint, self.saved_step)
        pause = self._gathering + time.perf_counter() - began
        self._pause += pause
        if self.metrics:
            self.metrics.saved(self.saved_step, pause)

    def _leave(self, progress: Progress, batches: Loader) -> bool:
        done = progress.step >= self.total_steps
        if done:
            evaluated = (
                self.config.train.eval_every and progress.step % self.config.train.eval_every == 0
            )
            if not evaluated:
                self._evaluate(progress.step)
        self._save(progress, batches, final=done)
        self._commit()
        batches.close()
        otherwise = (
            f"--stop-at-step {self.last_step}"
            if progress.step >= self.last_step
            else "asked on another rank"
        )
        reason = "" if done else [*self.asked, otherwise][0]
        facts = {"step": progress.step, "total_steps": self.total_steps, "reason": reason}
        on_rank0(lambda: run_folder.finish(self.out, done, facts))
        if self.metrics:
            ended, why = ("finished", "") if done else ("stopped and saved", f" ({reason})")
            self.metrics.say(f"{ended} at step {progress.step}{why}: {self._last_checkpoint()}")
        return done

    # ---------------------------------------------------------------------------------------------------------- votes

    def _votes(self, step: int) -> dict[str, bool]:
        """This rank's votes; one rank's wish is enough, and all follow it together."""
        self.lock.step = step
        if self.lock.lost:
            raise self.lock.lost
        minutes = self.limits.max_minutes
        if minutes is not None and time.monotonic() - self.began >= 60 * minutes:
            self.asked.append(f"--max-minutes {minutes}")
        if self._found_file("STOP"):
            self.asked.append("OUT/STOP")
        self._voted, written = self.saving, self.saving is not None and self.saving.is_written()
        return {"stop": bool(self.asked), "save": self._found_file("SAVE"), "written": written}

    def _found_file(self, name: str) -> bool:
        """Whether somebody touched OUT/STOP or OUT/SAVE: rank 0 looks now and then."""
        now = time.monotonic()
        if not self.is_rank0 or now - self._looked.get(name, -math.inf) < LOOK_SECONDS:
            return False
        self._looked[name] = now
        found = (self.out / name).exists()
        if found:
            (self.out / name).unlink(missing_ok=True)
        return found

    # ------------------------------------------------------------------------------------------------------- greeting

    def _open_metrics(self, step: int) -> None:
        epochs = self.total_steps * self.config.train.global_batch_size / self.reader.rows
        self.metrics = RunLogger(
            self.out, step, self.total_steps, epochs, self.config.logging.tensorboard
        )

    def _greet(self, progress: Progress) -> None:
        if not self.metrics:
            return
        train, engine = self.config.train, self.engine
        precision = precision_name(engine.deepspeed_config)
        count = sum(engine.shape(name).numel() for name in engine.parameters)
        self.metrics.say(
            f"{count:,} parameters, {engine.ranks.world_size} rank(s) under {engine.ranks.launcher}, "
            f"ZeRO {engine.stage}, {precision}; a step is {train.global_batch_size} rows "
            f"of {self.config.data.sequence_length} tokens ({engine.accumulation} x {train.micro_batch_size} a rank); "
            f"{self.total_steps} steps, from step {progress.step}"
        )
        offloads = "offload_optimizer" in engine.deepspeed_config.get("zero_optimization", {})
        if (
            engine.ranks.world_size == 1
            and engine.stage
            and precision not in ("bf16", "fp16")
            and not offloads
        ):
            same = "zero0-fp32" if precision == "fp32" else "zero0"
            self.metrics.say(
                f"ZeRO {engine.stage} divides nothing on one rank: --engine {same} is faster and smaller"
            )
        rows, portions = self.total_steps * train.global_batch_size, self.data.shares.items()
        parts = [
            f"{name} {part.share:.2%}, {part.epochs(rows):.2f} epochs" for name, part in portions
        ]
        if parts:
            self.metrics.say(f"mixture: {'; '.join(parts)}")
