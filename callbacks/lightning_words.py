"""What the engine's messages say under Lightning, where there is no loop to write calls into."""

from __future__ import annotations

LIGHTNING: dict[str, str] = {
    "Put the forward and backward inside: with monitor.micro_batch(x, y): ...": (
        "Step in training_step, with batches that input_key= and target_key= name."
    ),
    "monitor.before_step() was not called before optimizer.step()": (
        "Lightning did not announce this step (step what self.optimizers() returns)"
    ),
    "Call monitor.before_step(); in a closure of the optimizer's, after its backward pass.": (
        "Step what self.optimizers() returns."
    ),
    "Call monitor.before_step() right after the last backward pass.": (
        "Clip with gradient_clip_val= of the trainer, or in configure_gradient_clipping."
    ),
    "Under a gradient scaler write monitor.before_step(loss_scale=scaler.get_scale()) after unscaling, or "
    "monitor.before_step(grad_scale=scaler.get_scale()) before it.": (
        "Leave the scaling of the loss to precision= of the trainer."
    ),
    "Call monitor.before_step().": "Step what self.optimizers() returns.",
    "accumulate over two or more micro-batches": "write Trainer(accumulate_grad_batches=2)",
    "Accumulate over two or more micro-batches (Lightning: accumulate_grad_batches=2)": (
        "Write Trainer(accumulate_grad_batches=2)"
    ),
    "read monitor.accumulation after each step, and accumulate that many micro-batches": (
        "under manual optimization, accumulate as many batches as callback.monitor.accumulation says"
    ),
    "call monitor.micro_batch(x, y)": "pass input_key= and target_key=",
    "Hand over the": "Return from configure_optimizers the",
    "hand over one of these": "return one of these from configure_optimizers",
    "no micro-batch was seen": "no batch of training_step was seen",
    "inside monitor.micro_batch": "in training_step",
    "outside monitor.micro_batch": "outside training_step",
    "monitor.before_step()": "the optimizer's step",
    "before_step()": "the optimizer's step",
    "a micro-batch": "a batch",
    "each micro-batch": "each batch",
    "given to Monitor": "given to DynamicsMonitor",
    " Monitor(": " DynamicsMonitor(",
}
"""Longer phrases first: what one says is not said again by a part of it."""
