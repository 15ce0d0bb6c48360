"""What programs read of Lightning's Trainer and leyden's has not: what to write instead, told where it is read."""

from __future__ import annotations

_NO_LOOPS = "leyden's loop is one function and keeps no object"
ABSENT = {
    "fit_loop": f"{_NO_LOOPS}. Counters: current_epoch, global_step, is_last_batch, num_training_batches; limits: max_epochs, "
    "max_steps. To train for longer, make a Trainer with another max_epochs and call fit(..., ckpt_path='last')",
    "validate_loop": f"{_NO_LOOPS}. Read num_val_batches and callback_metrics",
    "test_loop": f"{_NO_LOOPS}. Read num_test_batches and callback_metrics",
    "predict_loop": f"{_NO_LOOPS}. Read predictions, predict_batch_indices and epoch_batch_indices",
    "distributed_sampler_kwargs": "samples are divided among processes without DistributedSampler; strategy.data_world_size and "
    "strategy.data_rank are what one of your own needs",
    "enable_autolog_hparams": "hyperparameters are logged unless save_hyperparameters(logger=False) says otherwise",
    "split_idx": "parts of a sequence are not numbered; tbptt_split_batch(batch, split_size) cuts them, and can number them",
    "tune": "the Tuner is not there yet",
    "tuner": "the Tuner is not there yet",
}
