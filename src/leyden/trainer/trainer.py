"""Trainer: the arguments and the four verbs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from leyden import assemble, checks, loop, ranks
from leyden.callbacks import BasePredictionWriter, Callback
from leyden.checkpoint import state
from leyden.checkpoint.writer import Writer
from leyden.datamodule import LightningDataModule
from leyden.defaults import default_callbacks, default_loggers, global_switches, is_interactive, with_modules_own
from leyden.errors import LeydenError, call_each
from leyden.hparams import begin_logs
from leyden.loggers.logger import resume_loggers
from leyden.module import LightningModule
from leyden.policies import advise
from leyden.precision import default_dtype
from leyden.profilers import resolve_profiler
from leyden.profilers.wiring import batches_of, finish, measures
from leyden.run import Evaluation, Outlet, Run, Status
from leyden.settings import Settings
from leyden.sources import Sources
from leyden.strategy import Strategy, resolve_ranks
from leyden.trainer.former import in_words_of_today
from leyden.trainer.requests import TrainerRequests
from leyden.trainer.states import TrainerFn, TrainerState

if TYPE_CHECKING:
    from leyden.data.loader import Source
    from leyden.hooks import Resolver
    from leyden.loggers import Logger


class Trainer(TrainerRequests):
    """Runs a `LightningModule`: `fit`, `validate`, `test`, `predict`.

    Everything is checked here and raises `ConfigurationError` at once. What can be read of a Trainer is on the page of
    `TrainerView`.

    Args:
        accelerator: "auto", "cpu", "cuda", "mps", "tpu" (see docs/tpu.md), or "gpu" for cuda or mps.
        strategy: "auto", "single_device", "ddp", … or a `Strategy`; see docs/distributed.md.
        devices: devices of this machine, with a process each: a number, "auto" (every GPU; one process on the CPU), -1, or
            indices as in [0, 1] or "0,1".
        num_nodes: machines.
        max_restarts: how often all processes are started again when one has failed, to go on from the newest checkpoint.
        precision: "32-true" (default), "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"; 64, 32, 16 and
            "bf16" for short.
        logger: True (default; TensorBoard if installed, else CSV), False, a `Logger`, or several.
        callbacks: one or several.
        fast_dev_run: run this many batches (True: 1) of everything, once, and write nothing.
        max_epochs: default 1000 if neither ``max_steps`` nor ``max_time`` is given; -1 for no limit.
        min_epochs: epochs before a stop is heeded.
        max_steps: optimizer steps; -1 for no limit.
        min_steps: optimizer steps before a stop is heeded.
        max_time: "DD:HH:MM:SS", a `timedelta`, or a dict of its arguments.
        limit_train_batches: a number (int) or a fraction (float) of the batches of an epoch; so for the next three.
        limit_val_batches: 0 turns validation off.
        limit_test_batches: see above.
        limit_predict_batches: see above.
        overfit_batches: train and validate on this number or fraction of batches, in order.
        val_check_interval: validate after this many training batches (int), this fraction of an epoch (float), or this
            much time (as ``max_time``). One that falls into a window of accumulated batches waits for its end.
        check_val_every_n_epoch: validate in every n-th epoch; None counts ``val_check_interval`` across epochs.
        num_sanity_val_steps: validation batches before training, default 2; -1 for all. They leave no trace.
        log_every_n_steps: optimizer steps between two flushes of step values to the loggers; default 50.
        enable_checkpointing: add a `ModelCheckpoint` if there is none (default).
        enable_progress_bar: add a `RichProgressBar` if there is none (default).
        enable_model_summary: add a `ModelSummary` if there is none (default).
        accumulate_grad_batches: batches per optimizer step; an epoch's last step may have fewer, and divides by them.
        gradient_clip_val: see ``gradient_clip_algorithm``; None does not clip.
        gradient_clip_algorithm: "norm" (default) bounds the norm of all gradients, "value" each element.
        deterministic: True lets torch refuse operations that are not deterministic, "warn" lets it warn.
        benchmark: let cuDNN measure and choose its algorithms.
        compile: True compiles the whole training step into one graph, "auto" keeps it if it is faster; see `leyden.compiled`.
        fused_optimizer: use torch's fused kernels (default) where an optimizer has them and its own ``fused`` was left open.
        inference_mode: evaluate under `torch.inference_mode` (default) rather than `torch.no_grad`.
        profiler: None, "simple", "advanced", "pytorch", or a `leyden.profilers.Profiler`.
        detect_anomaly: stop at the first loss or gradient that is not finite, naming the operation. Slow.
        nan_policy: look at losses and gradients once per step, which waits for the device: "raise", "skip" the step, or
            "rollback" to the newest checkpoint and go on with the next batches. See `leyden.policies.FiniteGuard`.
        oom_policy: "raise", or "halve": train on batches that do not fit in parts. See `leyden.halving.Halving`.
        barebones: turn off everything that is not training, to measure it.
        plugins: a precision or a launcher of `leyden.plugins`, or a list of both.
        sync_batchnorm: let BatchNorm layers count the samples of all processes.
        use_distributed_sampler: divide the samples of loaders over the processes (default), where their samplers do not.
        reload_dataloaders_every_n_epochs: ask the loader hooks again every n epochs; 0 never.
        default_root_dir: where logs and checkpoints go; default: the working directory.
        **others: arguments of former days, which `leyden.compat` translates and tells of; others are refused.

    Raises:
        ConfigurationError: naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: str | int | Sequence[int] = "auto",
        num_nodes: int = 1,
        max_restarts: int = 0,
        precision: Any = None,
        logger: Logger | Sequence[Logger] | bool | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
        fast_dev_run: int | bool = False,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Any = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: Any = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        compile: bool | str = False,
        fused_optimizer: bool = True,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Any = None,
        detect_anomaly: bool = False,
        nan_policy: str | None = None,
        oom_policy: str = "raise",
        barebones: bool = False,
        plugins: Any = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: str | os.PathLike[str] | None = None,
        **others: Any,
    ) -> None:
        asked = {name: value for name, value in locals().items() if name not in ("self", "others")}
        asked, self._ckpt_path, self.truncated_bptt_steps = in_words_of_today(asked, others)
        self._take(asked)

    def _take(self, asked: dict[str, Any]) -> None:
        self._settings = Settings(**{name: asked[name] for name in asked if name in Settings.__dataclass_fields__})
        ranks_asked = [asked[name] for name in ("accelerator", "devices", "strategy", "num_nodes")]
        ranks_asked.append(self._settings.environment)
        self._device_choice, self.strategy = resolve_ranks(*ranks_asked)
        self.profiler = resolve_profiler(asked["profiler"])
        root = asked["default_root_dir"]
        self._default_root_dir = os.fspath(root) if root is not None else os.getcwd()
        self.callbacks = self._active_callbacks = default_callbacks(asked["callbacks"], self._settings)
        self.loggers = default_loggers(asked["logger"], self._settings, self._default_root_dir)
        self._status, self._writer = Status(), Writer()
        self.state = TrainerState(self._status)
        self._outlet: Outlet = assemble.new_outlet(self.loggers, None, self.strategy)
        self._module = self._datamodule = self._sources = self._run = self._evaluation = None
        self._requests, self._last_counts = [], {}

    # The four verbs

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        **former: Any,
    ) -> None:
        """Train, validating as scheduled. Every call starts anew, unless ``ckpt_path`` says where to go on.

        Args:
            model: what to train.
            train_dataloaders: batches to train on, or a list or dict of loaders to read together.
            val_dataloaders: batches to validate on, or several loaders to read one after the other.
            datamodule: instead of loaders. Without either, the module's own loader hooks are asked.
            ckpt_path: go on from a checkpoint: a path, "last" or "best".
            **former: names that loaders had in former days, which are told of; others are refused.

        Raises:
            HookError: if the module lacks a step or misspells a hook.
            DataError: if there is nothing to train on.
        """
        train_dataloaders = self._loaders("fit", "train_dataloaders", train_dataloaders, former)
        checks.check_fit(checks.check_module(model))
        if self.strategy.start_method is not None:
            self._launch(self.fit, model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)
            return
        passed = {"train": train_dataloaders, "val": val_dataloaders}
        with self._running("fit", model, datamodule, passed) as resolver:
            run = self._make_run(model, resolver, ckpt_path)
            loop.call(run.hooks.on_fit_start)
            self._sanity_check(run, resolver)
            assert self._sources is not None
            assemble.attach_sources(
                run, self._sources, self._settings, partial(self._make_evaluation, "validation", resolver)
            )
            self._status.stage = "train"
            run.metrics.enter_epoch_hooks()
            loop.train(run)
            run.metrics.leave()
            loop.call(run.hooks.on_fit_end)
            run.serve_requests()
            with run.account.spent_on("checkpoints"):
                self._writer.wait()
                self.strategy.barrier("fit")  # each rank may now read the files that the first one has written

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        **former: Any,
    ) -> list[dict[str, float]]:
        """Evaluate `validation_step` over the validation loaders.

        Args:
            model: what to evaluate; default: the module that was run last, with its best checkpoint if there is one.
            dataloaders: batches, or several loaders.
            ckpt_path: weights to load first: a path, "last" or "best".
            verbose: accepted for compatibility; the progress bar prints the results.
            datamodule: instead of loaders.
            **former: see `fit`.

        Returns:
            The epoch's values, one dict for each loader.
        """
        dataloaders = self._loaders("validate", "dataloaders", dataloaders, former)
        if self.strategy.start_method is not None:
            return self._launch(self.validate, model, dataloaders, ckpt_path, verbose, datamodule)
        return self._evaluate("validate", model, dataloaders, ckpt_path, datamodule)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        **former: Any,
    ) -> list[dict[str, float]]:
        """Evaluate `test_step` over the test loaders; arguments and result are those of `validate`."""
        dataloaders = self._loaders("test", "dataloaders", dataloaders, former)
        if self.strategy.start_method is not None:
            return self._launch(self.test, model, dataloaders, ckpt_path, verbose, datamodule)
        return self._evaluate("test", model, dataloaders, ckpt_path, datamodule)

    def _evaluate(self, verb: str, model: LightningModule | None, *given: Any) -> list[dict[str, float]]:
        results: list[dict[str, float]] = []  # of a run that is interrupted at a prompt
        with self._evaluating(verb, model, *given) as evaluation:
            loop.evaluate(evaluation)
            results = evaluation.metrics.evaluation_results(len(evaluation.sources))
            loop.report(evaluation)
        return results

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> list[Any] | None:
        """Collect what `predict_step` returns for every batch.

        Args:
            model: what to predict with; see `validate`.
            dataloaders: batches, or several loaders.
            datamodule: instead of loaders.
            return_predictions: False returns nothing, for predictions that a `BasePredictionWriter` writes to disk.
            ckpt_path: weights to load first.

        Returns:
            A list of outputs, or a list of such lists if there are several loaders; None if nothing is kept. Several processes
            predict a part each, and all of them return the whole, in the order of the data.
        """
        if self.strategy.start_method is not None:
            return self._launch(self.predict, model, dataloaders, datamodule, return_predictions, ckpt_path)
        keep = return_predictions is not False
        with self._evaluating("predict", model, dataloaders, ckpt_path, datamodule, keep) as evaluation:
            loop.evaluate(evaluation)
            evaluation.metrics.end_evaluation()
            if evaluation.predictions is not None:
                evaluation.predictions = ranks.gather_predictions(self.strategy, evaluation.predictions)
        return self.predictions if keep else None

    # How a verb is set up and taken down

    @contextmanager
    def _running(
        self, verb: str, module: LightningModule, datamodule: LightningDataModule | None, passed: dict[str, Any]
    ) -> Iterator[Resolver]:
        """Everything around the loop of one verb: setup, errors, teardown."""
        if self._status.verb is not None:
            raise LeydenError(
                f"{verb} was called while this Trainer runs {self._status.verb}. Use a Trainer of its own for it."
            )
        datamodule = checks.check_data(verb, datamodule, passed)
        assemble.join_formerly(module, self.strategy)
        self.strategy.connect()
        writing = ranks.share_loggers(self.strategy, self.loggers)
        before = {name: vars(module)[name] for name in ("_trainer", "_metrics", "_run")}  # of another Trainer's run
        progress = None if verb == "fit" else self._outlet.progress
        self._outlet = assemble.new_outlet(writing, progress, self.strategy, module)
        self._module, self._datamodule = module, datamodule
        self._run = None if verb == "fit" else self._run
        self._remember_counts()
        self._evaluation, self._requests = None, []
        share = ranks.share_of_data(self.strategy)
        self._sources = Sources(module, datamodule, passed, self._settings, batches_of(self.profiler), share)
        resolver = self._resolve(module, datamodule)  # a hook that is refused here must not be called in the teardown
        self.state.begin(verb)
        outcome, began = "failed", False
        first: BaseException | None = None
        try:
            with global_switches(self._settings, self.device):
                self._set_up(verb, module, datamodule)
                began = True
                yield resolver
            outcome = "success"
        except KeyboardInterrupt as interrupt:
            first, outcome = interrupt, "interrupted"
            self.strategy.fail(interrupt)
            self._on_exception(interrupt)
            where = f"epoch {self.current_epoch} after {self.global_step} steps"
            self.print(f"\nInterrupted in {where}; nothing half-done was saved.{self._way_on(verb)}")
            if not is_interactive():
                raise SystemExit(130) from None  # 128 + SIGINT, what a shell expects
            if not began:
                raise  # a context manager cannot leave out its body
        except BaseException as exception:
            first = exception
            if isinstance(exception, SystemExit):  # somebody's wish, such as a scheduler's, and not a failure
                outcome = "interrupted"
            other = self.strategy.fail(exception)
            self._on_exception(exception)
            if other is not None:
                raise other from None
            raise
        finally:
            self._tear_down(verb, outcome, first)
            if before["_run"] is not None:
                vars(module).update(before)

    def _resolve(self, module: LightningModule, datamodule: LightningDataModule | None) -> Resolver:
        module.trainer = self
        if datamodule is not None:
            datamodule.trainer = self
        self._active_callbacks = with_modules_own(self.callbacks, module.configure_callbacks())
        self._dress = assemble.dressed(self, module, self._active_callbacks)
        try:
            return assemble.make_resolver(self, module, datamodule, self._active_callbacks, self._dress)
        except BaseException:
            self._undress()
            raise

    def _set_up(self, verb: str, module: LightningModule, datamodule: LightningDataModule | None) -> None:
        if measures(self.profiler):
            self.profiler.rank = self.global_rank
            self.profiler.setup(verb, self.log_dir)
        stage = TrainerFn(verb)
        module.__dict__["_metrics"] = None if self._settings.barebones else self._outlet.metrics
        ranks.prepare_data(self.strategy, module, datamodule)
        if datamodule is not None:
            datamodule.setup(stage)
        for callback in self._active_callbacks:
            callback.setup(self, module, stage)
        module.setup(stage)
        with self.strategy.model_context(module), default_dtype(self._settings.precision.parameter_dtype):
            module.configure_model()
        self._settings.precision.convert_module(module)
        self.strategy.prepare_module(module, self._settings)

    def _on_exception(self, exception: BaseException) -> None:
        self.state.interrupt()
        module, datamodule = self.lightning_module, self._datamodule
        advise(exception, self._run, self._settings)
        parts = [partial(callback.on_exception, self, module, exception) for callback in self._active_callbacks]
        parts += [partial(datamodule.on_exception, exception)] if datamodule is not None else []
        call_each(parts, exception)

    def _tear_down(self, verb: str, outcome: str, first: BaseException | None) -> None:
        module, datamodule, stage = self.lightning_module, self._datamodule, TrainerFn(verb)
        self._close_account(verb, outcome)
        if verb == "fit" and self.compilation is not None:
            self.compilation.undo()
        parts: list[Callable[[], object]] = [self._writer.release, self._writer.check]
        parts += [partial(finish, self.profiler, verb), *(partial(each.finalize, outcome) for each in self.loggers)]
        parts += [self._sources.shut_down] if self._sources is not None else []
        parts += [partial(datamodule.teardown, stage)] if datamodule is not None else []
        parts += [partial(callback.teardown, self, module, stage) for callback in self._active_callbacks]
        last = call_each([*parts, partial(module.teardown, stage), self._undress], first)
        self.state.end()
        module.__dict__.update(_metrics=None, _run=None)
        if outcome == "failed":
            module.trainer = None
        if first is None and last is not None:
            raise last
        for note in getattr(first, "__notes__", ()) if outcome == "interrupted" else ():  # no traceback will show them
            print(note)

    def _make_run(self, module: LightningModule, resolver: Resolver, ckpt_path: Any) -> Run:
        found = self._find_checkpoint(ckpt_path, "fit")
        if found is None:
            for callback in self._active_callbacks:
                callback.start_anew()
        else:
            state.apply_weights(self, module, self._active_callbacks, *found)
        run = assemble.make_run(self._parts(resolver), lambda run: self._reload(run, resolver))
        self._run = module.__dict__["_run"] = run
        writing = self._outlet.loggers
        if found is not None:
            state.apply_training(self._active_callbacks, self._datamodule, run, *found)
            resume_loggers(writing, state.own_part(found[0]).get("loggers", ()), run.progress.global_step)
        else:
            ranks.spread_random_state(self.strategy, self.device)
        run.run_id = self.strategy.share_run_id(run.run_id)
        begin_logs(writing, module, self._datamodule)
        return run

    def _sanity_check(self, run: Run, resolver: Resolver) -> None:
        assert self._sources is not None
        steps = self._settings.num_sanity_val_steps
        if not steps or run.restored is not None or not self._sources.validates():
            return  # a run that goes on has been checked, and validates nothing again
        # Metrics of its own, so that no value of it is seen later.
        kept, module = self._outlet, run.module
        self._outlet = assemble.new_outlet([], kept.progress, self.strategy, module)
        self._status.sanity, module.__dict__["_metrics"] = True, self._outlet.metrics
        loop.call(run.hooks.on_sanity_check_start)
        few = [each if steps == -1 else each.limited(steps) for each in self._sources.validation()]
        self._evaluation = self._make_evaluation("validation", resolver, few)
        loop.sanity_check(run, self._evaluation)
        self._evaluation, self._outlet, self._status.sanity = None, kept, False
        module.__dict__["_metrics"] = None if self._settings.barebones else kept.metrics

    def _make_evaluation(self, stage: str, resolver: Resolver, sources: Sequence[Source], **kept: bool) -> Evaluation:
        return assemble.make_evaluation(stage, self._parts(resolver), sources, **kept)

    def _parts(self, resolver: Resolver) -> assemble.Parts:
        module, settings = self.lightning_module, self._settings
        move = assemble.make_move(module, self._datamodule, self.device, settings.precision)
        return assemble.Parts(
            module, resolver, settings, self._status, self._outlet, self.device, move, self.profiler, self.strategy
        )

    def _reload(self, run: Run, resolver: Resolver) -> None:
        every, epoch = self._settings.reload_dataloaders_every_n_epochs, run.progress.epoch
        if every and epoch and epoch % every == 0 and self._sources is not None:
            self._sources.reload()
            assemble.attach_sources(
                run, self._sources, self._settings, partial(self._make_evaluation, "validation", resolver)
            )

    @contextmanager
    def _evaluating(
        self,
        verb: str,
        model: LightningModule | None,
        dataloaders: Any,
        ckpt_path: Any,
        datamodule: LightningDataModule | None,
        keep_predictions: bool = False,
    ) -> Iterator[Evaluation]:
        stage, kind = ("validation", "val") if verb == "validate" else (verb, verb)
        if model is None:
            model, datamodule, ckpt_path = self._ran_last(verb, datamodule, dataloaders is not None, ckpt_path)
        with self._running(verb, checks.check_module(model), datamodule, {kind: dataloaders}) as resolver:
            weights_only = not state.wanted_by_hooks(model, self._active_callbacks)
            found = self._find_checkpoint(ckpt_path, verb, weights_only)
            if found is not None:
                state.apply_weights(self, model, self._active_callbacks, *found)
            assert self._sources is not None
            writers = [each for each in self._active_callbacks if isinstance(each, BasePredictionWriter)]
            self._evaluation = self._make_evaluation(
                stage,
                resolver,
                self._sources.evaluation(kind),
                keep_predictions=keep_predictions or any(stage == "predict" and each.wants_all for each in writers),
                record_indices=bool(writers) and stage == "predict",
            )
            yield self._evaluation
        if self._evaluation is None:
            raise KeyboardInterrupt  # at a prompt, before there was anything to run
