"""The options of the training loop."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a model is trained. Names follow Hugging Face's TrainingArguments where those have one."""

    output_dir: str | None = None
    """Run folder; unless given runs/DATA-MODEL, or runs/DATA-MODEL-SCHEME with --scheme."""
    resume: Literal["never", "auto", "resized"] = "never"
    """auto: go on from the run folder's checkpoint, or start where there is none; resized: like auto, where the batch
    size may change if batch size x accumulation steps stays the same. The epoch that it stands in then ends with other
    batches: some examples come twice in it, others not at all."""
    num_train_epochs: int = 8
    """Passes over the training data, at most; early stopping may end sooner."""
    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""
    per_device_train_batch_size: int = 32
    """Examples in a batch."""
    per_device_eval_batch_size: int = 128
    """Examples in a batch of evaluation."""
    gradient_accumulation_steps: int = 1
    """Batches to one optimizer step."""
    learning_rate: float = 1e-3
    """The schedule's highest learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 after the warm-up, or none."""
    warmup_steps: int | None = None
    """Optimizer steps over which the learning rate rises from 0; unless given 100, or a tenth of a training of less
    than 300 steps."""
    optim: Literal["adamw", "sgd"] = "adamw"
    """adamw: betas 0.9 and 0.999, fused; sgd: momentum 0.9."""
    weight_decay: float = 0.1
    """For matrices only, never for biases, norms and scales."""
    max_grad_norm: float = 1.0
    """The gradient's norm is cut to this; 0: it is not cut."""
    label_smoothing_factor: float = 0.1
    """Share of the target spread evenly over the classes."""
    class_weights: Literal["balanced"] | None = None
    """balanced: rare classes count more in the loss, and in the accuracy that chooses the weights that are kept; a
    class with n_c of n texts counts n/(C·n_c) times."""
    eval_steps: int | None = None
    """Optimizer steps between validations; once an epoch unless given."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints, beside those at each validation."""
    early_stopping_patience: int | None = None
    """Validations after which training ends if none was better: more right answers, or as many at a lower loss. Kept
    are the latest weights that no earlier ones beat by more than a standard error of their validation accuracy."""
    logging_steps: int = 10
    """Optimizer steps to a row of metrics.jsonl; the last row may have fewer."""
    inspect_every: int | None = None
    """Optimizer steps to a row with the signal and the gradient at each block; none unless given."""
    report_to: Literal["none", "tensorboard"] = "none"
    """tensorboard: write the rows of metrics.jsonl as event files too, in the run folder's tensorboard."""
    bf16: bool = False
    """Forward pass in bfloat16 autocast."""
    torch_compile: bool = False
    """Compile the model."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    dataloader_num_workers: int = 0
    """Processes that collate batches; the order of the data does not depend on it."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, and dropout."""

    def steps_per_epoch(self, batches: int) -> int:
        """Optimizer steps to one pass over so many batches; the last step may have fewer."""
        return math.ceil(batches / self.gradient_accumulation_steps)

    def steps(self, batches: int) -> int:
        """Optimizer steps of a training that is not stopped early."""
        return self.max_steps or self.steps_per_epoch(batches) * self.num_train_epochs

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a training of so many."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 100 if steps >= 300 else steps // 10
