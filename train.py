"""Trains and evaluates the plain ViT of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

    python train.py                                             # the report's first row: ViT-S/16, 90 epochs of ImageNet
    python train.py --dataset=patterns ...                      # the demo; README.md has the whole line
    python train.py --eval_only --init=vit_s16_i1k_90ep.npz     # evaluates published or own weights
    python train.py --predict=a.jpg,b.png --init=FILE.npz       # names what is in pictures
    python train.py --benchmark                                 # the update step's speed

The default of every flag is the published run. First comes the method: schedule, optimiser, update; then `main`: data,
parameters, optimiser, step, loop; then what they build on. All of it functions to be imported by tests and forks.

Shapes: B batch, I image side, P patch side, L tokens, D width, C classes.
"""

import collections
from concurrent import futures
import contextlib
import datetime
import functools
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import time

if __name__ == "__main__" and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
  # XLA takes fresh memory for the temporaries of every step. In pages of 2 MB instead of 4 kB that makes a step on a CPU
  # 1.3 times as fast. The C library reads this setting when a process starts, so: start again.
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, sys.orig_argv)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # spare the reader TensorFlow's start-up messages

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import tensorflow as tf

import augment
import input_pipeline
import model

FLAGS = flags.FLAGS

# The recipe
flags.DEFINE_float("epochs", 90, "Passes over the training split: 90, 150 or 300 in the report.", 0)
flags.DEFINE_integer("batch_size", 1024, "Images per step, over all devices and processes.", 1)
flags.DEFINE_string("dataset", "imagenet2012", "TFDS name, patterns (the demo), or path of a folder SPLIT/CLASS/IMAGE.jpg.")
flags.DEFINE_string("train_split", "train[:99%]", "What to train on; the last percent of ImageNet's is 'minival'.")
flags.DEFINE_string("variant", "S/16", "Model size and patch size: mu, Ti, S, M, B, L or H (or demo) / pixels.")
flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
flags.DEFINE_enum("posemb", "sincos2d", ["sincos2d", "learned"], "Position embedding.")
flags.DEFINE_enum("pool", "gap", ["gap", "cls"], "Classify the mean of all tokens, or a [cls] token.")
flags.DEFINE_enum("head", "mlp", ["mlp", "linear"], "Classifier: one hidden tanh layer, or none.")
flags.DEFINE_integer("randaug_layers", 2, "Operations of RandAugment on each image; 0 turns it off.", 0)
flags.DEFINE_float("randaug_magnitude", 10, "Magnitude of RandAugment's operations.", 0, 20)  # 20: posterize keeps all 8 bits
flags.DEFINE_float("mixup", 0.2, "p of Mixup's Beta(p, p); 0 turns it off.", 0)
flags.DEFINE_float("lr", 1e-3, "Peak learning rate.", 0)
flags.DEFINE_float("weight_decay", 1e-4, "Decay of kernels per step at the schedule's peak; not multiplied by --lr.", 0)
flags.DEFINE_integer("warmup_steps", 10_000, "Steps of linear warm-up; 0 turns it off.", 0)
flags.DEFINE_float("grad_clip_norm", 1.0, "Largest global norm of the gradients; 0 turns clipping off.", 0)
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Inputs of matrix products; they accumulate in float32.")
flags.DEFINE_integer("seed", 0, "Seeds the initial parameters, the order of the data and the augmentations.", 0)
flags.DEFINE_integer("grad_accum", 1, "Take the gradients of a batch in this many parts, to save memory.", 1)
flags.DEFINE_string("init", None, "Start from the weights in this .npz: published ones or a checkpoint of ours.")

# The run
flags.DEFINE_string("workdir", "workdir", "Checkpoints, TensorBoard events and eval.json go here; the same command resumes.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets (default: TFDS' own, ~/tensorflow_datasets).")
flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1)
flags.DEFINE_integer("eval_every", 2500, "Steps between evaluations, with a checkpoint before each.", 1)
flags.DEFINE_integer("checkpoint_every", 1000, "Steps between checkpoints; the last two are kept.", 1)
flags.DEFINE_integer("keep_every", 0, "Also write a checkpoint every this many steps, and keep it; 0: none.", 0)
flags.DEFINE_list("eval", ["minival", "val"], "What to evaluate: minival, val, real, v2, or splits of --dataset.")
flags.DEFINE_bool("skip_bad_images", False, "Leave out records that cannot be used instead of stopping.")
flags.DEFINE_bool("allow_changes", False, "Resume although flags of the recipe have changed.")
flags.DEFINE_bool("remat", False, "Recompute the blocks in the backward pass, to save memory; not on a CPU.")
flags.DEFINE_string("coordinator", None, "Several processes that JAX does not find by itself: host:port of process 0.")
flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is.")

# What to do instead of training
flags.DEFINE_bool("eval_only", False, "Evaluate --init on --eval and stop.")
flags.DEFINE_list("predict", [], "Classify these pictures with --init and stop.")
flags.DEFINE_string("export_timm", None, "Write --init to this .npz for timm and stop.")
flags.DEFINE_bool("benchmark", False, "Measure the update step on random data and stop.")

for _name in ("epochs", "randaug_magnitude", "mixup", "lr", "weight_decay", "grad_clip_norm"):
  flags.register_validator(_name, math.isfinite, "expected a finite number")

# The flags that define the experiment: a run resumes only with the same values.
RECIPE = ("epochs", "batch_size", "dataset", "train_split", "variant", "image_size", "posemb", "pool", "head",
          "randaug_layers", "randaug_magnitude", "mixup", "lr", "weight_decay", "warmup_steps", "grad_clip_norm", "dtype",
          "seed", "init", "grad_accum")

# What --eval can name besides splits of --dataset: the dataset (None: --dataset), the split, the feature of the label.
EVALS = {
    "minival": (None, "train[99%:]", "label"),
    "val": (None, "validation", "label"),
    "real": ("imagenet2012_real", "validation", "real_label"),  # Beyer et al., arXiv 2006.07159
    "v2": ("imagenet_v2", "test", "label"),  # Recht et al., arXiv 1902.10811, matched frequency
}


class UserError(Exception):
  """Something the user can fix; the message says how, and is all that is printed."""


def log(message):
  """Prints a line, on the first process only."""
  if jax.process_index() == 0:
    print(message, flush=True)


@contextlib.contextmanager
def log_write_errors(what):
  """A full disk is no reason to lose a run: what could not be written is a line in the log."""
  try:
    yield
  except (OSError, tf.errors.OpError) as error:
    log(f"{what} could not be written ({error}); the run goes on.")


# --- The method -------------------------------------------------------------------------------------------------------


def make_schedule(warmup_steps, total_steps):
  """Linear warm-up, then a cosine to zero: function(step) -> factor of the learning rate, 0 for the first update."""

  def schedule(step):
    warmup = jnp.minimum(1.0, step / warmup_steps) if warmup_steps else 1.0
    progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0, 1)
    return warmup * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  return schedule


def make_optimizer(schedule, lr=1e-3, weight_decay=1e-4, grad_clip_norm=1.0):
  """Adam with decoupled weight decay of the kernels, in the order of the published run."""
  is_kernel = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
  return optax.chain(
      optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity(),
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.bfloat16),  # half the memory of the first moment
      optax.scale(lr),
      # After the learning rate, hence not multiplied by it: 1e-4 here is what 1e-4 / 1e-3 = 0.1 is in other AdamWs.
      optax.add_decayed_weights(weight_decay, mask=is_kernel),
      optax.scale_by_schedule(schedule),
      optax.scale(-1.0))


def make_update(tx, dtype=jnp.bfloat16, grad_accum=1, remat=False):
  """The training step, jitted: function(state, batch) -> (state, metrics). It donates the old state.

  state: {"params", "opt_state", "step" int32 []}; batch: {"images" [B, I, I, 3], "labels" [B, C], ...}, of `put_batch`.
  metrics: "loss", "grad_norm" (before clipping) and "param_norm" (after the update) float32 [], and those of `sum_host_info`.
  """

  def loss_fn(params, images, labels):
    return optax.softmax_cross_entropy(model.forward(params, images, dtype, remat), labels).mean()

  grad_fn = jax.value_and_grad(loss_fn)

  def accumulate(params, *batch):  # the mean over parts of equal size is the mean over the batch
    # [B, ...] -> [grad_accum, B / grad_accum, ...], every grad_accum-th row in a part, so that all devices share each part.
    parts = [x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1) for x in batch]
    add = lambda total, part: (jax.tree.map(jnp.add, total, grad_fn(params, *part)), None)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (jnp.float32(0), params)), parts)
    return jax.tree.map(lambda x: x / grad_accum, total)

  @jax.jit(donate_argnums=0)
  def update(state, batch):
    compute = accumulate if grad_accum > 1 else grad_fn
    loss, grads = compute(state["params"], batch["images"], batch["labels"])
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics | sum_host_info(batch)

  return update


def make_eval_step(dtype=jnp.bfloat16):
  """function(params, batch) -> {"count", "top1", "top5", "loss"}, sums over the rows that have a label.

  A prediction is right if it is in the set of labels of its row. The loss is against the labels in equal parts.
  """

  @jax.jit
  def eval_step(params, batch):
    labels, logits = batch["labels"], model.forward(params, batch["images"], dtype)
    mask = labels.any(1)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
    right = jnp.take_along_axis(labels, best, 1)
    loss = optax.softmax_cross_entropy(logits, labels / jnp.maximum(labels.sum(1, keepdims=True), 1))
    return {"count": mask.sum(), "top1": right[:, 0].sum(), "top5": right.any(1).sum(),
            "loss": jnp.where(mask, loss, 0).sum()} | sum_host_info(batch)

  return eval_step


# --- Training ---------------------------------------------------------------------------------------------------------


def main(_):
  logging.set_verbosity(logging.WARNING)  # TFDS and JAX have much to say
  start_processes()
  dtype = jnp.dtype(FLAGS.dtype)
  if FLAGS.benchmark:
    return benchmark()
  weights = {}
  if FLAGS.init:
    weights, rest = read_weights(FLAGS.init)
    adopt_architecture(FLAGS.init, weights, rest)
  if FLAGS.eval_only or FLAGS.predict or FLAGS.export_timm:
    if not FLAGS.init:
      raise UserError("--eval_only, --predict and --export_timm need --init=FILE.npz")
    return use_weights(weights, rest, dtype)

  # Data
  recipe = {name: FLAGS[name].value for name in RECIPE}
  dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir)
  num_classes = input_pipeline.num_classes(dataset)
  num_examples = input_pipeline.split_size(dataset, FLAGS.train_split)
  total_steps = round(FLAGS.epochs * num_examples / FLAGS.batch_size)
  check_run(total_steps)
  evals = open_evals(dataset)
  train_batches = functools.partial(
      input_pipeline.train_batches, dataset, FLAGS.train_split, FLAGS.batch_size, image_size=FLAGS.image_size,
      randaug_layers=FLAGS.randaug_layers, randaug_magnitude=FLAGS.randaug_magnitude, mixup_p=FLAGS.mixup, dtype=dtype,
      seed=FLAGS.seed, process_index=jax.process_index(), process_count=jax.process_count(),
      skip_bad_images=FLAGS.skip_bad_images)

  # Parameters
  params = model.init_params(FLAGS.seed, flags_table(num_classes))
  if weights:
    params = model.unflatten(model.flatten(params) | fit_weights(weights, num_classes))

  # Optimiser
  schedule = make_schedule(FLAGS.warmup_steps, total_steps)
  tx = make_optimizer(schedule, FLAGS.lr, FLAGS.weight_decay, FLAGS.grad_clip_norm)
  state = {"params": params, "opt_state": tx.init(params), "step": np.int32(0)}
  state = restore_checkpoint(FLAGS.workdir, state, recipe, FLAGS.allow_changes)
  step = int(state["step"])
  if np.ptp(multihost_utils.process_allgather(np.int32(step))):
    raise UserError(f"the processes do not see the same checkpoints: --workdir={FLAGS.workdir} must be one that all share")
  state = put_replicated(state)

  # Step
  update = make_update(tx, dtype, grad_accum=FLAGS.grad_accum, remat=FLAGS.remat)
  eval_step = make_eval_step(dtype)
  log(f"{FLAGS.variant} with {sum(x.size for x in jax.tree.leaves(params)):,} parameters on {jax.device_count()} x "
      f"{jax.devices()[0].device_kind}: {total_steps:,} steps of {FLAGS.batch_size}, {num_examples:,} images an epoch.")

  # Loop
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle_signal)
  train_log = TrainLog(total_steps, num_examples, schedule)
  label_names = np.array(dataset.info.features["label"].names)
  checkpointer = AsyncCheckpointer({"label_names": label_names, "flags": np.array(json.dumps(recipe))})
  batches, unread, stop = train_batches(start_step=step), None, 0  # stop: the number of a signal
  while not stop:
    if step >= total_steps or step and step % FLAGS.eval_every == 0:
      results, stop = evaluate(state["params"], eval_step, evals, dtype)
      if not stop:  # else they are of a part only
        train_log.evaluation(step, results)
      if step >= total_steps or stop:
        break
    batch = train_log.wait_for(batches)
    if step == 0:
      train_log.events(step, {}, batch["images"])
    state, metrics = update(state, put_batch(batch))
    step += 1
    if unread:  # the metrics of the step before: the device works on this one meanwhile
      stop = train_log.step(step - 1, unread)
    unread = metrics
    periods = FLAGS.eval_every, FLAGS.checkpoint_every, FLAGS.keep_every or total_steps
    if stop or step == total_steps or any(step % period == 0 for period in periods):
      stop, unread = train_log.step(step, unread) or stop, None  # what is not finite stops the run before it is saved
      checkpointer.save(state)
  checkpointer.wait(last=True)
  if stop:
    log(f"Stopped after step {step}; the same command goes on from there.")
    sys.exit(128 + stop)


def check_run(total_steps):
  """Raises UserError for what can be known to be wrong before any work."""
  if not total_steps:
    raise UserError(f"--epochs={FLAGS.epochs} is less than one step of --batch_size={FLAGS.batch_size}; expected more epochs")
  if total_steps <= FLAGS.warmup_steps:
    raise UserError(f"--warmup_steps={FLAGS.warmup_steps} is not shorter than the run of {total_steps} steps: pass "
                    f"--warmup_steps={total_steps // 10} or more --epochs")
  check_batch_size()
  check_workdir()


def check_batch_size():
  """Raises UserError unless every device gets the same number of rows in every part of a batch."""
  if FLAGS.batch_size % (jax.device_count() * FLAGS.grad_accum):
    raise UserError(f"--batch_size={FLAGS.batch_size}: expected a multiple of {jax.device_count()} devices times "
                    f"--grad_accum={FLAGS.grad_accum}")


def check_workdir():
  """Makes the workdir; raises UserError if it cannot be written."""
  probe = os.path.join(FLAGS.workdir, f"writable_{jax.process_index()}")
  try:
    tf.io.gfile.makedirs(FLAGS.workdir)
    write_npz(probe, {})
    tf.io.gfile.remove(probe)
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f"--workdir={FLAGS.workdir} cannot be written: {error}") from None


# --- The log ----------------------------------------------------------------------------------------------------------


class TrainLog:
  """A line every --log_every steps, and TensorBoard events in the workdir; both by process 0 alone."""

  def __init__(self, total_steps, num_examples, schedule):
    self.total_steps, self.num_examples, self.schedule = total_steps, num_examples, schedule
    self.writer = tf.summary.create_file_writer(FLAGS.workdir) if jax.process_index() == 0 else None
    self.bad = 0
    self.since = None  # speed is measured from this step on; not yet, as the first one compiles
    self.waited = 0.0

  def restart(self, step):
    """Measures speed from here on."""
    self.since, self.started, self.waited = step, time.perf_counter(), 0.0

  def wait_for(self, batches):
    """The next batch; measures the wait."""
    started = time.perf_counter()
    batch = next(batches)
    self.waited += time.perf_counter() - started
    return batch

  def step(self, step, metrics):
    """Waits for the metrics of a step; logs them if it is time to. Returns the number of a signal that some process got, or 0.

    Raises:
      UserError: the loss, the gradients or the new parameters are not finite.
    """
    metrics = {key: value.item() for key, value in metrics.items()}  # waits for the device
    if not all(map(math.isfinite, metrics.values())):
      raise UserError(f"not finite at step {step}: loss {metrics['loss']}, norm of the gradients {metrics['grad_norm']}, of "
                      f"the parameters {metrics['param_norm']}. The last checkpoint in {FLAGS.workdir} is from before; try a "
                      "lower --lr or a longer --warmup_steps")
    self.bad += metrics["bad"]
    if self.since is None:
      self.restart(step)
    if step % FLAGS.log_every == 0 or step == self.total_steps:
      elapsed, steps = time.perf_counter() - self.started, step - self.since
      scalars = {"epoch": step * FLAGS.batch_size / self.num_examples, "loss": metrics["loss"],
                 "learning_rate": FLAGS.lr * float(self.schedule(step - 1)), "grad_norm": metrics["grad_norm"],
                 "param_norm": metrics["param_norm"], "images_per_second": steps * FLAGS.batch_size / elapsed,
                 "data_wait": self.waited / elapsed, "bad_images": self.bad}
      left = datetime.timedelta(seconds=round((self.total_steps - step) * elapsed / steps)) if steps else "?"
      log(f"step {step}/{self.total_steps}  epoch {scalars['epoch']:.2f}  loss {scalars['loss']:.4f}  "
          f"lr {scalars['learning_rate']:.2e}  grad {scalars['grad_norm']:.3f}  {scalars['images_per_second']:.0f} images/s  "
          f"waiting for data {scalars['data_wait']:.0%}  {left} left" + f"  {self.bad} bad images left out" * bool(self.bad))
      self.events(step, scalars)
      self.restart(step)
    return metrics["stop"]

  def events(self, step, scalars, images=None):
    """Writes TensorBoard events: {name: number}, and the first 16 of images in [-1, 1]."""
    if self.writer:
      with log_write_errors(f"TensorBoard events in {FLAGS.workdir}"), self.writer.as_default(step):
        for name, value in scalars.items():
          tf.summary.scalar(name, value)
        if images is not None:
          tf.summary.image("first_batch", images[:16].astype(np.float32) / 2 + 0.5, max_outputs=16)
        self.writer.flush()

  def evaluation(self, step, results):
    """Logs the results of `evaluate`."""
    log(f"Evaluation at step {step}:")
    show(results)
    self.events(step, {f"{name}/{key}": value for name, result in results.items() for key, value in result.items()})
    self.restart(step)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def open_evals(dataset):
  """{name: (builder, split, label feature)} of --eval. Datasets that are not prepared are reported and left out.

  Raises:
    UserError: none is left.
  """
  evals = {}
  for name in FLAGS.eval:
    other, split, label = EVALS.get(name, (None, name, "label"))
    try:
      builder = input_pipeline.open_dataset(other, FLAGS.data_dir) if other else dataset
      split = name if name in builder.info.splits else split  # a folder may have a split "val" of its own
      input_pipeline.split_size(builder, split)
      classes = [input_pipeline.num_classes(dataset), input_pipeline.num_classes(builder, label)]
      if classes[0] != classes[1]:
        raise input_pipeline.DatasetError(f"it has {classes[1]} classes, --dataset={FLAGS.dataset} {classes[0]}")
      evals[name] = builder, split, label
    except input_pipeline.DatasetError as error:
      log(f"  {name:10} not available: {error}")
  if not evals:
    raise UserError(f"--eval={','.join(FLAGS.eval)}: none of these is available; expected minival, val, real, v2 or "
                     f"splits of --dataset={FLAGS.dataset}: {', '.join(dataset.info.splits)}")
  return evals


def evaluate(params, eval_step, evals, dtype):
  """Evaluates {name: (builder, split, label feature)}; every image counts once, on any number of devices and processes.

  The batch size is the next multiple of the number of devices.

  Returns:
    {name: {"count", "top1" and "top5" in percent, "loss", "bad"}}, and the number of a signal that ended it, or 0.
  """
  results, batch_size = {}, -(-FLAGS.batch_size // jax.device_count()) * jax.device_count()
  for name, (builder, split, label) in evals.items():
    sums, last = collections.Counter(), {}
    for batch in input_pipeline.eval_batches(
        builder, split, batch_size, label=label, image_size=FLAGS.image_size, dtype=dtype,
        process_index=jax.process_index(), process_count=jax.process_count(), skip_bad_images=FLAGS.skip_bad_images):
      metrics = eval_step(params, put_batch(batch))
      sums.update({key: value.item() for key, value in last.items()})  # the device works on this batch meanwhile
      if sums["stop"]:
        return results, int(sums["stop"])
      last = metrics
    sums.update({key: value.item() for key, value in last.items()})
    mean = {key: sums[key] / max(sums["count"], 1) for key in ("top1", "top5", "loss")}
    results[name] = {"count": sums["count"], "top1": 100 * mean["top1"], "top5": 100 * mean["top5"],
                     "loss": mean["loss"], "bad": sums["bad"]}
  return results, 0


def show(results):
  """Prints the results as a table, and writes them to eval.json in the workdir."""
  for name, result in results.items():
    bad = f"  ({result['bad']} bad images left out)" if result["bad"] else ""
    log(f"  {name:10} top-1 {result['top1']:6.2f} %   top-5 {result['top5']:6.2f} %   loss {result['loss']:.4f}   "
        f"{result['count']:,} images{bad}")
  if jax.process_index() == 0:
    path = os.path.join(FLAGS.workdir, "eval.json")
    with log_write_errors(path), tf.io.gfile.GFile(path, "w") as f:
      f.write(json.dumps(results, indent=2) + "\n")


# --- Devices, processes and signals -----------------------------------------------------------------------------------


def start_processes():
  """Joins the other processes: on TPU pods and under srun JAX finds them, elsewhere the flags name them."""
  if FLAGS.coordinator:
    if FLAGS.num_processes is None or FLAGS.process_id is None:
      raise UserError("--coordinator needs --num_processes and --process_id")
    jax.distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, heartbeat_timeout_seconds=30)
    return
  under_srun = "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
  if under_srun or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    jax.distributed.initialize()


def on_devices(spec):
  """The sharding over one axis of all devices: PartitionSpec("data") splits a batch, PartitionSpec() replicates."""
  return NamedSharding(Mesh(jax.devices(), ("data",)), spec)


def put_replicated(tree):
  """The same arrays on all devices of all processes."""
  sharding = on_devices(PartitionSpec())  # device_put would compare each array between all processes
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda _: x), jax.device_get(tree))


received_signal = 0


def handle_signal(number, _):
  """SIGTERM and Ctrl-C end the run after a checkpoint; a second one ends it at once."""
  global received_signal
  received_signal = number
  signal.signal(number, signal.SIG_DFL)
  print(f"\n{signal.Signals(number).name}: saving a checkpoint and stopping; once more to stop at once.", flush=True)


def put_batch(batch):
  """This process's rows -> global arrays, split over all devices.

  What only one process knows is sent along, as "host_info" [devices, 2]: how many of its images were bad, and the number
  of a signal it received. So all processes read it in the metrics of the same step, and stop after the same step.
  """
  sharding = on_devices(PartitionSpec("data"))
  host_info = np.zeros([jax.local_device_count(), 2], np.int32)
  host_info[0] = batch["bad"], received_signal
  batch = {"images": batch["images"], "labels": batch["labels"], "host_info": host_info}
  return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def sum_host_info(batch):
  """{"bad": the number of bad images, "stop": the number of a signal, or 0}, of all processes."""
  return {"bad": batch["host_info"][:, 0].sum(), "stop": batch["host_info"][:, 1].max()}


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def write_npz(path, arrays):
  """Writes {name: array} so that `path` is always either the old file or the new one, whole."""
  temporary, buffer = f"{path}.tmp", io.BytesIO()
  np.savez(buffer, **arrays)  # numpy does not know bfloat16: its bytes are stored, as type V2
  try:
    with tf.io.gfile.GFile(temporary, "wb") as f:
      f.write(buffer.getvalue())
    if os.path.exists(temporary):  # on this machine's disk: make sure that it is there before it replaces the old one
      with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    tf.io.gfile.rename(temporary, path, overwrite=True)
  except (OSError, tf.errors.OpError):
    if tf.io.gfile.exists(temporary):  # else a full disk stays full
      tf.io.gfile.remove(temporary)
    raise


def read_npz(path, skip=()):
  """{name: array} of an .npz file, without the names that start with one of `skip`. Never unpickles.

  Raises:
    UserError: it is not there, is damaged, or holds anything other than arrays of numbers and strings.
  """
  try:
    with np.load(tf.io.gfile.GFile(path, "rb")) as npz:
      declared, stored = (sum(getattr(f, size) for f in npz.zip.infolist()) for size in ("file_size", "compress_size"))
      if declared > 20 * stored + 2 ** 20:  # numbers hardly compress; this is a bomb
        raise ValueError(f"its {stored:,} bytes claim to be {declared:,}")
      arrays = {name: npz[name] for name in npz.files if not name.startswith(skip)}
    return {name: x.view(jnp.bfloat16) if x.dtype == "V2" else x for name, x in arrays.items()}
  except Exception as error:  # whatever GFile, zipfile and numpy make of a file that is something else
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path} is not a checkpoint that can be read ({reason}); expected an .npz file of arrays") from None


def checkpoints(workdir):
  """[(step, path)] of the checkpoints in a workdir, oldest first."""
  names = tf.io.gfile.listdir(workdir) if tf.io.gfile.isdir(workdir) else []
  names = [name for name in names if re.fullmatch(r"checkpoint_\d+\.npz", name)]
  return sorted((int(re.search(r"\d+", name)[0]), os.path.join(workdir, name)) for name in names)


def save_checkpoint(workdir, arrays, keep_every=0):
  """Writes checkpoint_STEP.npz, then deletes all but it, the last two and the multiples of `keep_every`."""
  written = os.path.join(workdir, f"checkpoint_{arrays['step']:08}.npz")
  write_npz(written, arrays)
  for step, path in checkpoints(workdir)[:-2]:
    if path != written and not (keep_every and step % keep_every == 0):
      tf.io.gfile.remove(path)


def restore_checkpoint(workdir, state, recipe, allow_changes=False):
  """The newest state in a workdir, or `state` itself if there is none; a damaged file is named and the previous one used.

  Args:
    workdir: any path that tf.io.gfile handles.
    state: a state with the names, shapes and dtypes to expect.
    recipe: {flag: value} of this run.
    allow_changes: resume although the recipe is not the checkpoint's.

  Raises:
    UserError: there are checkpoints, but none can be read, or the newest is of another recipe or model.
  """
  found, expected = checkpoints(workdir)[::-1], model.flatten(state)
  for _, path in found:
    try:
      arrays = read_npz(path)
      try:
        before = {name: FLAGS[name].default for name in recipe} | json.loads(arrays["flags"].item())
      except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} has no flags in it; expected a checkpoint of train.py") from None
    except UserError as error:
      log(f"{error}. Trying the previous one.")
      continue
    changes = [f"--{name}={before[name]} (now {value})" for name, value in recipe.items() if before[name] != value]
    if changes and not allow_changes:
      raise UserError(f"{path} was trained with {', '.join(changes)}. Give the same flags, or another --workdir, or "
                      "--allow_changes to go on with the new ones.")
    wrong = [name for name, x in expected.items()
             if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype)]
    if wrong:
      raise UserError(f"{path} does not fit the model: {', '.join(wrong[:3])} missing, or of another shape or type; give "
                      "another --workdir")
    log(f"Resuming after step {int(arrays['step'])} from {path}.")
    return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in expected])
  if found:
    raise UserError(f"No checkpoint in {workdir} can be read; remove them to start again.")
  return state


class AsyncCheckpointer:
  """Writes checkpoints in the background, one at a time, on the first process."""

  def __init__(self, extra):  # {name: array} to store beside the state
    self.extra, self.pool, self.pending = extra, futures.ThreadPoolExecutor(1), None

  def save(self, state):
    """Copies the state off the device, and leaves the rest to the background."""
    self.wait()
    if jax.process_index() == 0:
      arrays = {name: np.array(x) for name, x in model.flatten(state).items()}  # a copy: the next step reuses the state
      self.pending = self.pool.submit(save_checkpoint, FLAGS.workdir, arrays | self.extra, FLAGS.keep_every)

  def wait(self, last=False):
    """Waits until everything is written. That it could not be is an error only for the last checkpoint."""
    pending, self.pending = self.pending, None
    try:
      if pending:
        pending.result()
    except (OSError, tf.errors.OpError) as error:
      message = f"A checkpoint could not be written to {FLAGS.workdir} ({error}); the previous one is kept"
      if last:
        raise UserError(message) from None
      log(f"{message}, and the run goes on.")


# --- Weights: --init, --predict, --export_timm ------------------------------------------------------------------------


def read_weights(path):
  """The parameters in an .npz file, under the names of `model.parameter_table`, and what else there is.

  Knows the naming schemes met in the wild: bare, under "params/" (as ours) or "opt/target/", with the position embedding
  under an older name, and with the arrays of all blocks stacked into one.

  Returns:
    {name: array} of the parameters, and of the rest: "label_names" and "flags" in a checkpoint of ours.
  """
  rest = read_npz(path, skip=("opt_state/", "opt/state/"))
  prefix = next((p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in rest)), "")
  params = {}
  for name in [name for name in rest if name.startswith(prefix)]:
    array = rest.pop(name)
    name = name.removeprefix(prefix).replace("Transformer/posembed_input/pos_embedding", "pos_embedding")
    stacked = name.removeprefix("Transformer/encoderblock/")
    if stacked == name:
      params[name] = array
    else:
      params |= {f"Transformer/encoderblock_{i}/{stacked}": x for i, x in enumerate(np.atleast_1d(array))}
  return params, rest


def adopt_architecture(path, params, rest):
  """Sets --variant, --posemb, --pool, --head and --image_size to what a file holds (the output of `read_weights`).

  Raises:
    UserError: there is no ViT in it, or a flag on the command line says otherwise.
  """
  shapes = {name: x.shape for name, x in params.items()}
  block = "Transformer/encoderblock_0/"
  try:
    P, _, _, D = shapes["embedding/kernel"]
    M, = shapes[block + "MlpBlock_0/Dense_0/bias"]
    N, _ = shapes[block + "MultiHeadDotProductAttention_0/query/bias"]
    _, = shapes["head/bias"]
    _, tokens, _ = shapes.get("pos_embedding", (1, 0, D))
    image_size = json.loads(rest["flags"].item())["image_size"] if "flags" in rest else math.isqrt(tokens) * P
  except (KeyError, ValueError, TypeError) as error:
    raise UserError(f"--init={path}: no ViT in it; expected embedding/kernel [P, P, 3, D], {block}..., head/bias [C] and, if "
                    f"there is one, pos_embedding [1, L, D] ({error})") from None
  sizes = D, sum(name.endswith("/query/bias") for name in shapes), M, N
  variant = next((name for name, known in model.VARIANTS.items() if known == sizes), None)
  if variant is None:
    raise UserError(f"--init={path}: width, depth, MLP width and heads are {sizes}, which is no variant of model.VARIANTS")
  for name, value in {"variant": f"{variant}/{P}", "posemb": "learned" if tokens else "sincos2d",
                      "pool": "cls" if "cls" in shapes else "gap",
                      "head": "mlp" if "pre_logits/kernel" in shapes else "linear"}.items():
    if FLAGS[name].present and FLAGS[name].value != value:
      raise UserError(f"--{name}={FLAGS[name].value} contradicts --init={path}, which holds {name}={value}")
    FLAGS[name].value = value
  if image_size and not FLAGS["image_size"].present:
    FLAGS.image_size = image_size


def fit_weights(params, num_classes):
  """Parameters {name: array} for a model of C classes and --image_size, {name: float32 array}.

  Another number of classes leaves the head out; another image size resamples a learned position embedding.

  Raises:
    UserError: arrays are missing, unknown, of another shape or not floats; lists them all.
  """
  params, table = dict(params), flags_table(num_classes)
  if len(params["head/bias"]) != num_classes:
    log(f"--init={FLAGS.init} has {len(params['head/bias'])} classes, the dataset {num_classes}: starting with a new head.")
    for name in ("head/kernel", "head/bias"):
      table.pop(name), params.pop(name, None)
  if "pos_embedding" in table:
    stored, L = params["pos_embedding"], table["pos_embedding"][0][1]
    if stored.shape[1] != L and math.isqrt(stored.shape[1]) ** 2 == stored.shape[1]:
      log(f"Resampling the position embedding from {stored.shape[1]} to {L} tokens.")
      params["pos_embedding"] = resample_posemb(stored, L)
  wrong = [f"{name} missing" for name in table.keys() - params.keys()]
  wrong += [f"{name} unknown" for name in params.keys() - table.keys()]
  wrong += [f"{name} {params[name].dtype} {params[name].shape}, expected floats {table[name][0]}"
            for name in table.keys() & params.keys()
            if params[name].shape != table[name][0] or not jnp.issubdtype(params[name].dtype, jnp.floating)]
  if wrong:
    raise UserError(f"--init={FLAGS.init} does not fit: {'; '.join(sorted(wrong))}")
  return {name: x.astype(np.float32) for name, x in params.items()}


def resample_posemb(posemb, L):
  """A learned position embedding [1, h*h, D] for another square grid, [1, L, D]: bilinear, corners aligned."""
  old, new = math.isqrt(posemb.shape[1]), math.isqrt(L)
  grid = posemb.astype(np.float32).reshape(old, old, -1)
  where = np.linspace(0, old - 1, new)
  weights = np.stack([np.interp(where, np.arange(old), row) for row in np.eye(old)], 1)  # [new, old]
  return np.einsum("yh,xw,hwd->yxd", weights, weights, grid).reshape(1, L, -1)


def flags_table(num_classes):
  """The parameter table that the flags describe."""
  try:
    return model.parameter_table(FLAGS.variant, FLAGS.image_size, FLAGS.posemb, FLAGS.pool, FLAGS.head, num_classes)
  except ValueError as error:
    raise UserError(f"--{error}") from None


def predict(params, names, paths, dtype):
  """Prints the five most probable classes of pictures, and draws where the model looked.

  Args:
    params: nested dict of arrays.
    names: of the classes, a list of C strings.
    paths: of the pictures.
    dtype: of the inputs of matrix products.
  """
  pictures, captions = [], []
  for path in paths:
    try:
      image = input_pipeline.eval_image(tf.io.read_file(path), FLAGS.image_size)
    except tf.errors.OpError as error:
      raise UserError(f"--predict={path}: not a picture that can be read: {error.message.splitlines()[0]}") from None
    images = input_pipeline.scale(image)[None].numpy()  # [1, I, I, 3]
    probs = np.asarray(jax.nn.softmax(model.forward(params, images, dtype)))[0]  # [C]
    best = probs.argsort()[::-1][:5]
    log(f"{path}: " + ", ".join(f"{names[c]} {probs[c]:.1%}" for c in best))
    heat = np.asarray(model.attention_map(params, images, dtype))[0, ..., None]  # [I/P, I/P, 1]
    heat = tf.image.resize(heat / heat.max(), image.shape[:2]).numpy()
    shown = np.stack([image, image.numpy() * (0.2 + 0.8 * heat)])
    pictures += [*np.uint8(tf.image.resize(shown, (224, 224), "nearest"))]
    captions += [f"{names[best[0]]} {probs[best[0]]:.0%}", "attention of the last block"]
  out = os.path.join(FLAGS.workdir, "predictions.png")
  augment.draw_grid(out, pictures, captions, columns=2 * min(4, len(paths)))
  log(f"Wrote {out}.")


def export_timm(params, out):
  """Writes parameters {name: array} so that timm's VisionTransformer.load_pretrained reads them: README.md has the lines."""
  if "pos_embedding" not in params:  # timm knows learned ones only
    P, _, _, D = params["embedding/kernel"].shape
    params = params | {"pos_embedding": model.sincos2d(FLAGS.image_size // P, FLAGS.image_size // P, D)[None]}
  write_npz(out, {f"params/{name}": array for name, array in params.items()})
  log(f"Wrote {out}.")
  if "pre_logits/kernel" in params:
    log("It has an MLP head, of which timm reads the last layer only: copy both layers, as README.md shows.")


def use_weights(params, rest, dtype):
  """What can be done with --init (the output of `read_weights`) besides training: evaluate, classify, export."""
  num_classes, = params["head/bias"].shape
  flat = fit_weights(params, num_classes)
  params = put_replicated(model.unflatten(flat))
  if FLAGS.predict:
    check_workdir()
    predict(params, rest.get("label_names", [f"class {i}" for i in range(num_classes)]), FLAGS.predict, dtype)
  if FLAGS.export_timm:
    try:
      export_timm(flat, FLAGS.export_timm)
    except (OSError, tf.errors.OpError) as error:
      raise UserError(f"--export_timm={FLAGS.export_timm} cannot be written: {error}") from None
  if FLAGS.eval_only:
    dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir)
    check_workdir()
    if input_pipeline.num_classes(dataset) != num_classes:
      raise UserError(f"--init={FLAGS.init} has {num_classes} classes, --dataset={FLAGS.dataset} "
                      f"{input_pipeline.num_classes(dataset)}")
    results, _ = evaluate(params, make_eval_step(dtype), open_evals(dataset), dtype)
    show(results)


# --- Benchmark --------------------------------------------------------------------------------------------------------


def benchmark(rounds=5):
  """Prints the speed of the update step on random data, against the best matrix product of this device."""

  def seconds(function, repeats):  # of one call, when calls follow each other as the steps of a run do
    jax.block_until_ready(function())
    started = time.perf_counter()
    for _ in range(repeats):
      out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / repeats

  check_batch_size()
  dtype, B, b = jnp.dtype(FLAGS.dtype), FLAGS.batch_size, FLAGS.batch_size // jax.process_count()
  table = flags_table(num_classes=1000)
  started = time.perf_counter()
  params = model.init_params(FLAGS.seed, table)
  tx = make_optimizer(make_schedule(FLAGS.warmup_steps, 10 ** 6), FLAGS.lr, FLAGS.weight_decay, FLAGS.grad_clip_norm)
  state = put_replicated({"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)})
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (b, FLAGS.image_size, FLAGS.image_size, 3)).astype(dtype)
  batch = put_batch({"images": images, "labels": np.eye(1000, dtype=np.float32)[rng.integers(0, 1000, b)], "bad": 0})
  ready = time.perf_counter()
  update = make_update(tx, dtype, grad_accum=FLAGS.grad_accum, remat=FLAGS.remat).lower(state, batch).compile()
  compiled = time.perf_counter()
  state, metrics = update(state, batch)
  jax.block_until_ready(state)
  log(f"Parameters after {ready - started:.1f} s, compiled in {compiled - ready:.1f} s, "
      f"first step {time.perf_counter() - compiled:.1f} s.")

  def step():
    nonlocal state
    state, metrics = update(state, batch)
    return metrics

  multiply = jax.jit(lambda x, w: model.einsum("ij,jk->ik", x, w, dtype))
  factors = [[put_replicated(rng.standard_normal(shape, np.float32).astype(dtype)) for shape in shapes]
             for shapes in (((4096, 4096), (4096, 4096)), ((3136, 1536), (1536, 1536)))]  # the faster of two shapes counts
  repeats = 2 if jax.default_backend() == "cpu" else 20
  rates, times = [], []
  for _ in range(rounds):
    rates.append([2 * len(x) * w.size * jax.device_count() / seconds(lambda: multiply(x, w), 2 * repeats) for x, w in factors])
    times.append(seconds(step, repeats))
  best, step_time = max(map(statistics.median, zip(*rates))), statistics.median(times)
  flops = 3 * B * model.flops(table, FLAGS.image_size)
  memory = update.memory_analysis()
  log(f"{FLAGS.variant} at {FLAGS.image_size}, {FLAGS.dtype}, batch {B} on {jax.device_count()} x "
      f"{jax.devices()[0].device_kind}: {B / step_time:.2f} images/s, {flops / step_time / 1e9:,.0f} GFLOP/s, "
      f"{flops / step_time / best:.2f} of the best matrix product's {best / 1e9:,.0f} GFLOP/s; "
      f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30:.1f} GiB per device.")


# --- Start ------------------------------------------------------------------------------------------------------------


def run(argv):
  """`main`, with a line instead of a traceback for what the user can fix."""
  try:
    return main(argv)
  except (UserError, input_pipeline.DatasetError, input_pipeline.BadImage) as error:
    message = f"Error: {error}"
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    message = (f"Error: {str(error).splitlines()[0]}. If another process of this run was lost, start all of them again "
               "with the same commands to go on from the last checkpoint.")
  if jax.process_count() > 1:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # a regular exit would wait for the others, which wait for this one
  sys.exit(message)


if __name__ == "__main__":
  app.run(run)
