"""Hooks of 2020: where they are called today, and what is written in their place."""

from __future__ import annotations

EPOCH_ENDS = {
    "validation": ("validation_epoch_end", "validation_end"),
    "test": ("test_epoch_end", "test_end"),
}
_COLLECTED = "self.log in {0}_step, which means over the epoch; or a list of your own, used in on_{0}_epoch_end()"
TODAY = {
    "training_end": "compute it in training_step",
    "training_step_end": "compute it in training_step",
    "training_epoch_end": "keep what is needed in a list of your own, and use it in on_train_epoch_end()",
    "validation_step_end": "compute it in validation_step",
    "test_step_end": "compute it in test_step",
    **{name: _COLLECTED.format(stage) for stage, names in EPOCH_ENDS.items() for name in names},
    "on_epoch_start": "on_train_epoch_start()",
    "on_epoch_end": "on_train_epoch_end()",
    "on_batch_start": "on_train_batch_start(batch, batch_idx)",
    "on_batch_end": "on_train_batch_end(outputs, batch, batch_idx)",
    "on_pre_performance_check": "on_validation_start() and on_test_start()",
    "on_post_performance_check": "on_validation_end() and on_test_end()",
    "on_pretrain_routine_start": "on_fit_start()",
    "on_pretrain_routine_end": "on_fit_start()",
    "on_init_start": "setup(trainer, pl_module, stage)",
    "on_init_end": "setup(trainer, pl_module, stage)",
    "on_keyboard_interrupt": "on_exception(trainer, pl_module, exception)",
    "tng_dataloader": "train_dataloader()",
    "tbptt_split_batch": "split the batch in training_step, with automatic_optimization = False",
    "configure_apex": "Trainer(precision='16-mixed') or 'bf16-mixed', which torch does by itself; it is not called",
    "get_progress_bar_dict": "self.log(name, value, prog_bar=True); it is not called",
    "get_tqdm_dict": "self.log(name, value, prog_bar=True); it is not called",
    "configure_ddp": "Trainer(strategy=DDPStrategy(find_unused_parameters=…))",
    "init_ddp_connection": "Trainer(devices=…, num_nodes=…), torchrun or srun, which join the ranks",
}
PLACES = {
    "on_epoch_start": ("on_train_epoch_start",),
    "on_batch_start": ("on_train_batch_start",),
    "on_pretrain_routine_start": ("on_fit_start",),
    "on_pretrain_routine_end": ("on_fit_start",),
    "on_pre_performance_check": ("on_validation_start", "on_test_start"),
    "on_epoch_end": ("on_train_epoch_end",),
    "on_batch_end": ("on_train_batch_end",),
    "on_post_performance_check": ("on_validation_end", "on_test_end"),
}
"""Hooks of then, and of today at the same places."""
SINGLE = {
    "optimizer_step": ("epoch", "batch_idx", "optimizer", "optimizer_closure"),
    "optimizer_zero_grad": ("epoch", "batch_idx", "optimizer"),
    "lr_scheduler_step": ("scheduler", "metric"),
    "configure_gradient_clipping": ("optimizer", "gradient_clip_val", "gradient_clip_algorithm"),
    "backward": ("loss",),
    "transfer_batch_to_device": ("batch", "device", "dataloader_idx"),
}
"""Hooks that one asks for, and their arguments of today."""
