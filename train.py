"""Trains and evaluates the plain ViT of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

    python train.py                                          # the report's first row: 90 epochs
    python train.py --dataset=patterns ...                   # the demo; README.md has the whole line
    python train.py --eval_only --init=vit_s16_i1k_90ep.npz  # evaluates published or own weights
    python train.py --init=FILE.npz --predict a.jpg b.png    # names what is in pictures
    python train.py --benchmark [--topology=v3:2x2]          # the speed of a step, here or on a TPU

The default of every flag is the published run. First comes the method, then `main`, then what it
stands on. Only `main` and what it starts instead of training read flags; all else takes arguments.

Shapes: B batch, b this process's share of it, I image side, C classes.
"""

import collections
import contextlib
from concurrent import futures
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

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

import input_pipeline  # before tensorflow, to which it says how much to print
import tensorflow as tf

import augment
import model

FLAGS = flags.FLAGS

# The recipe: a run resumes only with the same values, unless --allow_changes.
flags.DEFINE_float("epochs", 90, "Passes over the training split: 90, 150 or 300 in the report.", 0)
flags.DEFINE_integer("batch_size", 1024, "Images per step, over all devices and processes.", 1)
flags.DEFINE_string("dataset", "imagenet2012", "TFDS name, patterns (the demo), or a folder's path.")
flags.DEFINE_string("train_split", "train[:99%]", "What to train on; ImageNet's rest is 'minival'.")
flags.DEFINE_string("variant", "S/16", "Size: mu, Ti, S, M, B, L or H (or demo) / patch in pixels.")
flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
flags.DEFINE_enum("posemb", "sincos2d", model.CHOICES["posemb"], "Position embedding.")
flags.DEFINE_enum("pool", "gap", model.CHOICES["pool"], "Classify the mean token, or a [cls] token.")
flags.DEFINE_enum("head", "mlp", model.CHOICES["head"], "One hidden tanh layer, or none.")
flags.DEFINE_integer("randaug_layers", 2, "RandAugment's operations on each image; 0: off.", 0)
flags.DEFINE_float("randaug_magnitude", 10, "Magnitude of RandAugment's operations.", 0, 20)
flags.DEFINE_float("mixup", 0.2, "p of Mixup's Beta(p, p); 0 turns it off.", 0)
flags.DEFINE_float("lr", 1e-3, "Peak learning rate.", 0)
flags.DEFINE_float("weight_decay", 1e-4, "Of kernels, per step at the peak; not multiplied by --lr.", 0)
flags.DEFINE_integer("warmup_steps", 10_000, "Steps of linear warm-up; 0 turns it off.", 0)
flags.DEFINE_float("grad_clip_norm", 1.0, "Largest global norm of the gradients; 0: no clipping.", 0)
flags.DEFINE_enum("dtype", "bfloat16", model.CHOICES["dtype"], "Products and activations in a block. "
                  "float32 is exact on every device, and slower than a GPU's TF32.")
flags.DEFINE_integer("seed", 0, "Seeds parameters, order of the data and augmentations.", 0)
flags.DEFINE_string("init", None, "Start from the weights in this .npz: published ones or ours.")

# All others change how a run is done, not what comes out of it.
NOT_RECIPE = {flag.name for flag in (
    flags.DEFINE_string("workdir", "workdir", "Checkpoints and logs go here; the same command resumes."),
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets (default: TFDS' own)."),
    flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1),
    flags.DEFINE_integer("eval_every", 2500, "Steps between evaluations.", 1),
    flags.DEFINE_integer("checkpoint_every", 1000, "Steps between checkpoints; two are kept.", 1),
    flags.DEFINE_integer("keep_every", 0, "Also keep the checkpoint of every so many steps.", 0),
    flags.DEFINE_list("eval", ["minival", "val"], "minival, val, real, v2, or splits of --dataset."),
    flags.DEFINE_bool("skip_bad_images", False, "Leave out records that cannot be used."),
    flags.DEFINE_bool("allow_changes", False, "Resume although the recipe has changed."),
    flags.DEFINE_integer("grad_accum", 1, "Take a batch in this many parts, to save memory.", 1),
    flags.DEFINE_bool("remat", False, "Compute blocks twice, to save memory; not on a CPU."),
    flags.DEFINE_string("coordinator", None, "Of processes that JAX does not find: process 0's host:port."),
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are."),
    flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is."),
    # What to do instead of training
    flags.DEFINE_bool("eval_only", False, "Evaluate --init on --eval and stop."),
    flags.DEFINE_list("predict", [], "Classify these pictures, or folders of them, and stop."),
    flags.DEFINE_string("export_timm", None, "Write --init to this .npz for timm and stop."),
    flags.DEFINE_bool("benchmark", False, "Measure the update step on random data and stop."),
    flags.DEFINE_string("topology", None, "With --benchmark: compile for this TPU, such as v3:2x2."))}

for _name in ("epochs", "randaug_magnitude", "mixup", "lr", "weight_decay", "grad_clip_norm"):
  flags.register_validator(_name, math.isfinite, "expected a finite number")

# What --eval can name besides splits of --dataset: (data set, None for --dataset; split; label).
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


# --- The method -----------------------------------------------------------------------------------


def make_optimizer(schedule, lr=1e-3, weight_decay=1e-4, grad_clip_norm=1.0):
  """Adam with decoupled weight decay of the kernels, in the order of the published run."""
  is_kernel = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
  return optax.chain(
      optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity(),
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.bfloat16),  # half the memory
      optax.scale(lr),
      # After the learning rate, hence not multiplied by it: 1e-4 here is 0.1 in other AdamWs.
      optax.add_decayed_weights(weight_decay, mask=is_kernel),
      optax.scale_by_schedule(schedule),
      optax.scale(-1.0))


def loss_fn(params, batch, config, remat=False):
  """Softmax cross-entropy with the (mixed) labels, the mean over a batch: float32 []."""
  logits = model.forward(params, batch["images"], config, remat)
  return optax.softmax_cross_entropy(logits, batch["labels"]).mean()


def loss_and_grads(params, batch, config, remat=False, grad_accum=1):
  """The loss and its gradients, from `grad_accum` equal parts of the batch one after the other."""
  grad_fn = functools.partial(jax.value_and_grad(loss_fn), config=config, remat=remat)
  if grad_accum == 1:
    return grad_fn(params, batch)
  # [B, ...] -> [grad_accum, B / grad_accum, ...], every grad_accum-th row in a part, so that all
  # devices share each part. The mean over parts of equal size is the mean over the batch.
  parts = jax.tree.map(lambda x: x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1), batch)
  add = lambda total, part: (jax.tree.map(jnp.add, total, grad_fn(params, part)), None)
  total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (jnp.float32(0), params)), parts)
  return jax.tree.map(lambda x: x / grad_accum, total)


received_signal = 0  # SIGTERM or SIGINT, of `handle_signal`


def put(batch, split):
  """This process's rows of a batch, {name: numpy array [b, ...]}, split over all devices: [B, ...].

  A row more, "stop", tells all processes in the same step of a signal that one of them received.
  """
  stop = np.full(len(batch["images"]), received_signal, np.int32)
  return jax.make_array_from_process_local_data(split, batch | {"stop": stop})


def host_metrics(batch):
  """What processes tell each other: "bad", how many rows could not be used, and "stop", a signal."""
  return {"bad": batch["bad"].sum(), "stop": batch["stop"].max()}


def make_eval_step(config, replicated, split):
  """function(params, batch) -> {"count", "top1", "top5", "loss"} and `host_metrics`, sums over rows.

  A prediction is right if it is in the set of labels of its row; the loss is against the labels in
  equal parts. Only rows of the batch's mask count, and, as in ReaL, only those that have a label.
  """

  @jax.jit(in_shardings=(replicated, split), out_shardings=replicated)
  def eval_step(params, batch):
    labels, logits = batch["labels"], model.forward(params, batch["images"], config)
    counts = batch["mask"] & labels.any(1)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
    right = jnp.take_along_axis(labels, best, 1) * counts[:, None]
    loss = optax.softmax_cross_entropy(logits, labels / jnp.maximum(labels.sum(1, keepdims=True), 1))
    return {"count": counts.sum(), "top1": right[:, 0].sum(), "top5": right.any(1).sum(),
            "loss": jnp.where(counts, loss, 0).sum()} | host_metrics(batch)

  return eval_step


def evaluate(params, evals, eval_step, split, prefix=""):
  """Evaluates parameters on {name: (function() -> batches, what to say of them)} of `open_evals`.

  Every image counts once, on any number of devices and processes.

  Returns:
    {prefix + name: {"count", "top1" and "top5" in percent, "loss", "bad", ...}}, and the number of a
    signal that ended it, or 0.
  """
  results = {}
  for name, (batches, about) in evals.items():
    sums, last = collections.Counter(), {}
    for batch in batches():
      # The device works on this batch while the sums of the one before are read.
      before, last = last, eval_step(params, put(batch, split))
      sums.update({key: value.item() for key, value in before.items()})
      if sums["stop"]:
        return results, int(sums["stop"])
    sums.update({key: value.item() for key, value in last.items()})
    if not sums["count"]:
      raise UserError(f"--eval: not one image of {name} has a label and can be used ({about})")
    mean = {key: sums[key] / sums["count"] for key in ("top1", "top5", "loss")}
    results[prefix + name] = {"count": sums["count"], "top1": 100 * mean["top1"], "top5": 100 *
                              mean["top5"], "loss": mean["loss"], "bad": sums["bad"], **about}
  return results, 0


# --- Training -------------------------------------------------------------------------------------


def check_batch_size(batch_size, devices, grad_accum):
  """UserError unless every device gets the same number of rows in every part of a batch."""
  if batch_size % (devices * grad_accum):
    raise UserError(f"--batch_size={batch_size}: expected a multiple of {devices} devices times "
                    f"--grad_accum={grad_accum}")


def make_training(config, replicated, split, total_steps, *, warmup_steps=10_000, lr=1e-3,
                  weight_decay=1e-4, grad_clip_norm=1.0, grad_accum=1, remat=False):
  """What is trained, and the step that does it.

  Args:
    config: a model.Config.
    replicated, split: the shardings over the devices of the state, and of the rows of a batch.
    The rest are the flags of the same names.

  Returns:
    init: function(params) -> state, a dict of all that training changes, which checkpoints hold.
    step: function(state, batch of `put`) -> (state, metrics), jitted. It reuses the memory of the
      state it is given. metrics, all []: "loss", "learning_rate", "grad_norm" (before clipping),
      "param_norm" (after the update), and those of `host_metrics`.
  """
  if warmup_steps >= total_steps:
    raise UserError(f"--warmup_steps={warmup_steps} is not shorter than the run of {total_steps} "
                    f"steps: pass --warmup_steps={total_steps // 10} or more --epochs")
  # Linear from 0 to 1, then a cosine to 0; 0 for the first update.
  schedule = optax.warmup_cosine_decay_schedule(0, 1, warmup_steps, total_steps)
  optimizer = make_optimizer(schedule, lr, weight_decay, grad_clip_norm)

  def init(params):
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

  @jax.jit(in_shardings=(replicated, split), out_shardings=replicated, donate_argnums=0)
  def step(state, batch):
    # The loss is a mean over rows that are split: hence XLA adds the gradients of all devices.
    loss, grads = loss_and_grads(state["params"], batch, config, remat, grad_accum)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": loss, "learning_rate": lr * schedule(state["step"]),
               "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    return state, metrics | host_metrics(batch)

  return init, step


def main(argv):
  # One axis of devices: the state is the same on all of them, the rows of a batch are split.
  start_processes(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  mesh = Mesh(jax.devices(), ("data",))
  replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

  # Model: as the flags say, and, with --init, otherwise as its file does
  weights, info = model.load(FLAGS.init) if FLAGS.init else ({}, model.Info())
  config = info.config._replace(
      attention="cudnn" if mesh.devices.flat[0].platform == "gpu" else "xla",
      **{field: FLAGS[field].value for field in model.Config._fields
         if field in FLAGS and (FLAGS[field].present or not FLAGS.init)})
  if FLAGS.benchmark or FLAGS.eval_only or FLAGS.predict or FLAGS.export_timm or argv[1:]:
    return instead_of_training(argv, weights, info, config, replicated, split)

  # Data
  dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir)
  weights, label_names = fit_weights(weights, info, config, dataset)
  num_examples = input_pipeline.split_size(dataset, FLAGS.train_split)
  total_steps = round(FLAGS.epochs * num_examples / FLAGS.batch_size)
  check_batch_size(FLAGS.batch_size, jax.device_count(), FLAGS.grad_accum)
  train_batches = functools.partial(
      input_pipeline.train_batches, dataset, FLAGS.train_split, FLAGS.batch_size,
      image_size=config.image_size, randaug_layers=FLAGS.randaug_layers,
      randaug_magnitude=FLAGS.randaug_magnitude, mixup_p=FLAGS.mixup, dtype=config.dtype,
      seed=FLAGS.seed, label_names=label_names, process_index=jax.process_index(),
      process_count=jax.process_count(), skip_bad_images=FLAGS.skip_bad_images)
  evals = open_evals(FLAGS.eval, dataset, FLAGS.data_dir, FLAGS.batch_size, config, label_names,
                     FLAGS.skip_bad_images)

  # Parameters, optimiser, step
  config = config._replace(num_classes=len(label_names))
  params = model.init_params(FLAGS.seed, config) | weights
  init, train_step = make_training(
      config, replicated, split, total_steps, warmup_steps=FLAGS.warmup_steps, lr=FLAGS.lr,
      weight_decay=FLAGS.weight_decay, grad_clip_norm=FLAGS.grad_clip_norm,
      grad_accum=FLAGS.grad_accum, remat=FLAGS.remat)
  eval_step = make_eval_step(config, replicated, split)
  recipe = {flag.name: flag for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__])
            if flag.name not in NOT_RECIPE}
  defaults = {name: flag.default for name, flag in recipe.items()} | {"data_order": 1}
  recipe = {name: getattr(config, name, flag.value) for name, flag in recipe.items()}
  recipe["data_order"] = input_pipeline.ORDER
  state = restore_checkpoint(FLAGS.workdir, init(params), recipe, defaults, FLAGS.allow_changes)
  step = int(state["step"])
  state = jax.make_array_from_process_local_data(replicated, state)

  # Loop
  run_log = RunLog(FLAGS.workdir, total_steps, FLAGS.batch_size, num_examples, FLAGS.log_every)
  log(f"{config.variant} with {sum(x.size for x in jax.tree.leaves(params)):,} parameters on "
      f"{jax.device_count()} x {jax.devices()[0].device_kind}: {total_steps:,} steps of "
      f"{FLAGS.batch_size}, {num_examples:,} images an epoch, in {FLAGS.workdir}.")
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle_signal)
  about = {"label_names": np.array(label_names), "flags": np.array(json.dumps(recipe)),
           "config": np.array(json.dumps(config._replace(attention="xla")._asdict()))}
  background, saved = futures.ThreadPoolExecutor(1), None
  periods = FLAGS.eval_every, FLAGS.checkpoint_every, FLAGS.keep_every or total_steps
  batches, stop = train_batches(start_step=step), 0  # stop: the number of a signal
  while not stop:
    if step >= total_steps or step and step % FLAGS.eval_every == 0:
      results, stop = evaluate(state["params"], evals, eval_step, split)
      if not stop:  # else they are of a part only
        run_log.evaluation(step, results)
      if stop or step >= total_steps:
        break
    batch = run_log.wait_for(batches)
    state, metrics = train_step(state, put(batch, split))
    step += 1
    due = step == total_steps or any(step % period == 0 for period in periods)
    stop = run_log.step(step, metrics, wait=due)  # raises before what is not finite is saved
    if due or stop:
      if saved:
        saved.result()  # until the checkpoint before is written
      # A copy, as the next step reuses the state's memory; it is written in the background.
      saved = background.submit(save_checkpoint, FLAGS.workdir, jax.tree.map(np.array, state) | about,
                                FLAGS.keep_every, last=bool(stop) or step == total_steps)
  if saved:
    saved.result()
  if stop:
    log(f"Stopped after step {step}; the same command goes on from there.")
    sys.exit(128 + stop)
  path = checkpoint_path(FLAGS.workdir, step)
  log(f"Done: {path}. Next: python train.py --init={path} --predict PICTURE.jpg")


# --- Data and weights of a run --------------------------------------------------------------------


def fit_weights(weights, info, config, dataset):
  """The weights of `model.load`, as far as they fit a model and a data set, and the model's classes.

  Where the classes are the same in another order, the model keeps its own; the data's labels follow.

  Returns:
    nested dict of the parameters to start from, and the names of the C classes.
  """
  label_names = input_pipeline.class_names(dataset)
  if not weights:
    return {}, label_names
  weights = model.fit(weights, info.config, config)
  try:
    input_pipeline.label_positions(dataset, info.label_names)
  except input_pipeline.DatasetError as error:
    log(f"Starting with a new head: {error}.")
    weights.pop("head", None)
  else:
    if set(label_names) == set(info.label_names):
      label_names = info.label_names
  return weights, label_names


def open_evals(names, dataset, data_dir, batch_size, config, label_names, skip_bad_images):
  """What to evaluate: {name: (function() -> batches, {"dataset", "split", "image_size", "dtype"})}.

  What is not available is said and left out. The batch size is rounded up to what the devices share.

  Raises:
    UserError: nothing is left.
  """
  evals, devices = {}, jax.device_count()
  for name in names:
    other, split, label = EVALS.get(name, (None, name, "label"))
    try:
      data = input_pipeline.open_dataset(other, data_dir) if other else dataset
      split = name if name in data.info.splits else split  # a folder may have a split "val"
      size = input_pipeline.split_size(data, split)
      input_pipeline.label_positions(data, label_names, label)
    except input_pipeline.DatasetError as error:
      log(f"  {name:10} not available: {error}")
      continue
    if size < 100:
      log(f"  {name:10} has {size} images only: its percentages are coarse.")
    evals[name] = functools.partial(
        input_pipeline.eval_batches, data, split, -(-batch_size // devices) * devices, label=label,
        image_size=config.image_size, dtype=config.dtype, label_names=label_names,
        process_index=jax.process_index(), process_count=jax.process_count(),
        skip_bad_images=skip_bad_images), {
            "dataset": data.name, "split": split, "image_size": config.image_size,
            "dtype": config.dtype}
  if not evals:
    raise UserError(f"--eval={','.join(names)}: none of these is available; expected minival, val, "
                    f"real, v2 or splits of {dataset.name}: {', '.join(dataset.info.splits)}")
  return evals


# --- The log --------------------------------------------------------------------------------------


class RunLog:
  """Lines on the screen; the same as JSON in log.jsonl, and TensorBoard events, in the workdir."""

  def __init__(self, workdir, total_steps, batch_size, num_examples, log_every):
    self.workdir, self.total_steps, self.batch_size = workdir, total_steps, batch_size
    self.num_examples, self.log_every = num_examples, log_every
    self.bad, self.speed, self.unread, self.since = 0, 0, None, None
    self.started, self.waited = time.perf_counter(), 0.0
    if jax.process_index() == 0:
      make_workdir(workdir)
      self.events, self.path = tf.summary.create_file_writer(workdir), os.path.join(workdir, "log.jsonl")

  def restart(self, step):
    """Measures speed from this step on."""
    self.since, self.started, self.waited = step, time.perf_counter(), 0.0

  def wait_for(self, batches):
    """The next batch; measures the wait."""
    started = time.perf_counter()
    batch = next(batches)
    self.waited += time.perf_counter() - started
    return batch

  def step(self, step, metrics, wait):
    """Takes the metrics of a step, but reads those of the one before: so the device has work.

    Reads these, too, if `wait`, or if it is time to stop.

    Returns:
      The number of a signal that some process received, or 0.

    Raises:
      UserError: the loss, the gradients or the new parameters are not finite.
    """
    before, self.unread = self.unread, (step, metrics)
    stop = self._read(*before) if before else 0
    if wait or stop:
      stop, self.unread = self._read(*self.unread) or stop, None
    return stop

  def _read(self, step, metrics):
    metrics = {key: value.item() for key, value in metrics.items()}  # waits for the device
    if not all(map(math.isfinite, metrics.values())):
      raise UserError(f"not finite at step {step}: loss {metrics['loss']}, norm of the gradients "
                      f"{metrics['grad_norm']}, of the parameters {metrics['param_norm']}. The last "
                      f"checkpoint in {self.workdir} is from before; try a lower --lr or a longer "
                      "--warmup_steps")
    self.bad += metrics.pop("bad")
    stop = metrics.pop("stop")
    first, now = self.since is None, time.perf_counter()
    if first or step % self.log_every == 0 or step == self.total_steps:
      took, steps = now - self.started, step - (self.since or 0)
      line = {"epoch": step * self.batch_size / self.num_examples, **metrics, "bad_images": self.bad}
      if first:
        tail = f"compiled and done after {took:.1f} s"
      else:
        if steps >= self.log_every or not self.speed:  # the last interval may be too short to tell
          self.speed, self.wait = steps * self.batch_size / took, self.waited / took
        left = datetime.timedelta(seconds=round((self.total_steps - step) * self.batch_size / self.speed))
        line |= {"images_per_second": self.speed, "data_wait": self.wait}
        tail = f"{self.speed:.0f} images/s  waiting for data {self.wait:.0%}  {left} left"
      log(f"step {step}/{self.total_steps}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
          f"lr {line['learning_rate']:.2e}  grad {line['grad_norm']:.3f}  {tail}"
          + f"  {self.bad} bad images left out" * bool(self.bad))
      self.write(step, line)
      self.restart(step)
    return stop

  def evaluation(self, step, results):
    """Logs the results of `evaluate`."""
    log(f"Evaluation at step {step}:")
    show(results, self.workdir, step, checkpoint_path(self.workdir, step))
    self.write(step, {f"{name}/{key}": result[key] for name, result in results.items()
                      for key in ("count", "top1", "top5", "loss")})
    self.restart(step)

  def write(self, step, scalars):
    """Appends {name: number} to log.jsonl and to TensorBoard's events."""
    if jax.process_index() == 0:
      with log_write_errors(f"The log in {self.workdir}"), self.events.as_default(step):
        with tf.io.gfile.GFile(self.path, "a") as f:
          f.write(json.dumps({"step": step} | scalars) + "\n")
        for name, value in scalars.items():
          tf.summary.scalar(name, value)
        self.events.flush()


@contextlib.contextmanager
def log_write_errors(what):
  """A full disk is no reason to lose a run: what could not be written is a line in the log."""
  try:
    yield
  except (OSError, tf.errors.OpError) as error:
    log(f"{what} could not be written ({error}); the run goes on.")


def show(results, workdir, step, weights):
  """Prints the results of `evaluate`, and writes them to eval.json in the workdir."""
  for name, result in results.items():
    log(f"  {name:10} top-1 {result['top1']:6.2f} %   top-5 {result['top5']:6.2f} %   loss "
        f"{result['loss']:.4f}   {result['count']:,} images"
        + f"  ({result['bad']} bad images left out)" * bool(result["bad"]))
  if jax.process_index() == 0:
    path = os.path.join(workdir, "eval.json")
    with log_write_errors(path), tf.io.gfile.GFile(path, "w") as f:
      about = {"step": step, "weights": weights}
      f.write(json.dumps({name: result | about for name, result in results.items()}, indent=2) + "\n")


# --- Processes and signals ------------------------------------------------------------------------


def start_processes(coordinator, num_processes, process_id):
  """Joins the other processes: on TPU pods and under srun JAX finds them, else the flags name them."""
  if coordinator:
    if num_processes is None or process_id is None:
      raise UserError("--coordinator needs --num_processes and --process_id")
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=30)
    return
  under_srun = "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
  if under_srun or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    jax.distributed.initialize()


def handle_signal(number, _):
  """SIGTERM and Ctrl-C end the run after a checkpoint; a second one ends it at once."""
  global received_signal
  received_signal = number
  signal.signal(number, signal.SIG_DFL)
  print(f"\n{signal.Signals(number).name}: saving a checkpoint and stopping; once more to stop at "
        "once.", flush=True)


# --- Checkpoints ----------------------------------------------------------------------------------


def make_workdir(workdir):
  """Makes a workdir; UserError if it cannot be written."""
  try:
    tf.io.gfile.makedirs(workdir)
    write_npz(os.path.join(workdir, "writable"), {})
    tf.io.gfile.remove(os.path.join(workdir, "writable"))
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f"--workdir={workdir} cannot be written: {error}") from None


def write_npz(path, arrays):
  """Writes {name: array} so that `path` is always either the old file or the new one, whole."""
  temporary, buffer = f"{path}.tmp", io.BytesIO()
  np.savez(buffer, **arrays)  # numpy does not know bfloat16: its bytes are stored, as type V2
  try:
    with tf.io.gfile.GFile(temporary, "wb") as f:
      f.write(buffer.getvalue())
    if os.path.exists(temporary):  # on this machine's disk: there before it replaces the old one
      with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    tf.io.gfile.rename(temporary, path, overwrite=True)
  except (OSError, tf.errors.OpError):
    if tf.io.gfile.exists(temporary):  # else a full disk stays full
      tf.io.gfile.remove(temporary)
    raise


def checkpoint_path(workdir, step):
  """The file of a step's checkpoint."""
  return os.path.join(workdir, f"checkpoint_{step:08}.npz")


def checkpoints(workdir):
  """[(step, path)] of the checkpoints in a workdir, oldest first."""
  names = tf.io.gfile.listdir(workdir) if tf.io.gfile.isdir(workdir) else []
  steps = sorted(int(name[11:-4]) for name in names if re.fullmatch(r"checkpoint_\d+\.npz", name))
  return [(step, checkpoint_path(workdir, step)) for step in steps]


def save_checkpoint(workdir, state, keep_every=0, last=False):
  """Writes a checkpoint, then deletes all but it, the last two and the multiples of `keep_every`.

  state: a nested dict of arrays. That it cannot be written is an error only if it is the last one.
  """
  if jax.process_index() != 0:
    return
  written = checkpoint_path(workdir, int(state["step"]))
  try:
    write_npz(written, model.flatten(state))
    for step, path in checkpoints(workdir)[:-2]:
      if path != written and not (keep_every and step % keep_every == 0):
        tf.io.gfile.remove(path)
  except (OSError, tf.errors.OpError) as error:
    message = f"A checkpoint could not be written to {workdir} ({error}); the previous one is kept"
    if last:
      raise UserError(message) from None
    log(f"{message}, and the run goes on.")


def restore_checkpoint(workdir, state, recipe, defaults, allow_changes=False):
  """The newest state in a workdir, or `state` if there is none; damaged files are named and skipped.

  Args:
    workdir: any path that tf.io.gfile handles; all processes must see the same one.
    state: a state with the names, shapes and dtypes to expect.
    recipe: {flag: value} of this run.
    defaults: {flag: value} for what a checkpoint does not say, as its code did not know it.
    allow_changes: resume although the recipe is not the checkpoint's.

  Raises:
    UserError: there are checkpoints, but none can be read, or the newest is of another recipe or
      model, or the processes found different ones.
  """
  found, expected = checkpoints(workdir)[::-1], model.flatten(jax.device_get(state))
  newest = None
  for _, path in found:
    try:
      arrays = model.read_npz(path)
      before = defaults | json.loads(arrays["flags"].item())
      newest = path
      break
    except (KeyError, ValueError, TypeError) as error:
      log(f"{path}: {error!r}. Trying the previous one.")
  if found and not newest:
    raise UserError(f"No checkpoint in {workdir} can be read; remove them to start again.")
  if newest:
    changes = [f"--{name}={before.get(name)} (now {recipe.get(name, 'unknown')})"
               for name in sorted((before | recipe).keys() - NOT_RECIPE)
               if name not in recipe or before[name] != recipe[name]]
    if changes and not allow_changes:
      raise UserError(f"{newest} was trained with {', '.join(changes)}. Give the same flags, or "
                      "another --workdir, or --allow_changes to go on with the new ones.")
    wrong = [name for name, x in expected.items() if name not in arrays
             or (arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype)]
    if wrong:
      raise UserError(f"{newest} does not fit the model: {', '.join(wrong[:3])} missing, or of "
                      "another shape or type; give another --workdir")
    log(f"Resuming after step {int(arrays['step'])} from {newest}.")
    expected = {name: arrays[name] for name in expected}
  if np.ptp(multihost_utils.process_allgather(np.int32(expected["step"]))):
    raise UserError(f"the processes do not see the same checkpoints: --workdir={workdir} must be one "
                    "that all share")
  return jax.tree.unflatten(jax.tree.structure(state), expected.values())


# --- Instead of training --------------------------------------------------------------------------


def instead_of_training(argv, weights, info, config, replicated, split):
  """What --benchmark, --eval_only, --predict and --export_timm ask for."""
  if argv[1:] and not FLAGS.predict:
    raise UserError(f"{' '.join(argv[1:])}: expected flags only, such as --epochs=90")
  if FLAGS.benchmark:
    config = config._replace(num_classes=1000)
    settings = dict(warmup_steps=FLAGS.warmup_steps, lr=FLAGS.lr, weight_decay=FLAGS.weight_decay,
                    grad_clip_norm=FLAGS.grad_clip_norm, grad_accum=FLAGS.grad_accum,
                    remat=FLAGS.remat)
    if FLAGS.topology:
      return benchmark_topology(FLAGS.topology, config, FLAGS.batch_size, settings)
    return benchmark(config, FLAGS.batch_size, replicated, split, settings)
  if not weights:
    raise UserError("--eval_only, --predict and --export_timm need --init=FILE.npz")
  if not config.num_classes:
    raise UserError(f"--init={FLAGS.init} has no head, so it can only be trained from")
  weights = model.fit(weights, info.config, config)
  if not np.any(weights["head"]["kernel"]):
    log(f"--init={FLAGS.init}: the head is all zeros, that is, untrained.")
  if FLAGS.export_timm:
    export_timm(model.flatten(weights), config, FLAGS.export_timm)
  params = jax.make_array_from_process_local_data(replicated, weights)
  if FLAGS.predict:
    predict(params, config, info.label_names, FLAGS.predict + argv[1:], FLAGS.workdir)
  if FLAGS.eval_only:
    make_workdir(FLAGS.workdir)
    name = FLAGS.dataset if FLAGS["dataset"].present else info.recipe.get("dataset", FLAGS.dataset)
    dataset = input_pipeline.open_dataset(name, FLAGS.data_dir)
    evals = open_evals(FLAGS.eval, dataset, FLAGS.data_dir, FLAGS.batch_size, config,
                       info.label_names, FLAGS.skip_bad_images)
    results, _ = evaluate(params, evals, make_eval_step(config, replicated, split), split)
    show(results, FLAGS.workdir, info.step, FLAGS.init)


def export_timm(params, config, path):
  """Writes parameters {name: array} as timm's VisionTransformer.load_pretrained reads them."""
  if config.posemb == "sincos2d":  # timm knows learned ones only
    P, D, *_ = config.sizes
    side = config.image_size // P
    params = params | {"pos_embedding": model.sincos2d(side, side, D)[None]}
  try:
    write_npz(path, {f"params/{name}": array for name, array in params.items()})
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f"--export_timm={path} cannot be written: {error}") from None
  log(f"Wrote {path}." + " It has an MLP head, of which timm reads the last layer only: copy both "
      "layers, as README.md shows." * (config.head == "mlp"))


def pictures_in(paths):
  """The files that paths, patterns such as *.jpg, and folders stand for."""
  files = []
  for path in paths:
    if tf.io.gfile.isdir(path):
      path = os.path.join(path, "*")
    found = sorted(tf.io.gfile.glob(path)) if "*" in path else [path]
    files += [name for name in found if name.lower().endswith(input_pipeline.ENDINGS)
              or name in paths]
    if not files:
      raise UserError(f"--predict={path}: no picture there")
  return files


def upright(path):
  """The bytes of a picture, turned as its camera says in the Exif data: a PNG if that is needed."""
  from PIL import Image, ImageOps  # comes with tensorboard; pylint: disable=g-import-not-at-top
  with tf.io.gfile.GFile(path, "rb") as file:
    encoded = file.read()
  with Image.open(io.BytesIO(encoded)) as image:
    if image.getexif().get(0x0112, 1) != 1:  # the orientation
      turned = io.BytesIO()
      ImageOps.exif_transpose(image).save(turned, "PNG")
      encoded = turned.getvalue()
  return encoded


def predict(params, config, label_names, paths, workdir):
  """Prints the five most probable classes of pictures, and draws where the model looked.

  paths: of pictures, patterns of paths such as *.jpg, or folders of pictures.
  """
  make_workdir(workdir)
  out, pictures, captions = os.path.join(workdir, "predictions.png"), [], []
  for path in pictures_in(paths):
    try:
      image = input_pipeline.eval_image(upright(path), config.image_size)
    except (tf.errors.OpError, OSError) as error:
      raise UserError(f"--predict={path}: not a picture that can be read ({error})") from None
    images = input_pipeline.scale(image)[None].numpy()  # [1, I, I, 3]
    probs = np.asarray(jax.nn.softmax(model.forward(params, images, config)))[0]  # [C]
    best = probs.argsort()[::-1][:5]
    log(f"{path}: " + ", ".join(f"{label_names[c]} {probs[c]:.1%}" for c in best))
    heat = np.asarray(model.attention_map(params, images, config))[0, ..., None]  # [I/P, I/P, 1]
    heat = tf.image.resize(heat / heat.max(), image.shape[:2]).numpy()
    pictures += [image.numpy(), np.uint8(image.numpy() * (0.2 + 0.8 * heat))]
    captions += [f"{os.path.basename(path)}: {label_names[best[0]]} {probs[best[0]]:.0%}",
                 "attention of the last block"]
  augment.draw_grid(out, pictures, captions, columns=2 * min(4, len(pictures) // 2))
  log(f"Wrote {out}.")


def compile_step(config, batch_size, replicated, split, **settings):
  """The training step, compiled from shapes alone, for whatever devices the shardings name.

  Returns:
    The compiled step, the GiB that it takes on each device, and the shapes of a batch.
  """
  check_batch_size(batch_size, split.num_devices, settings["grad_accum"])
  init, step = make_training(config, replicated, split, 10 ** 6, **settings)
  state = jax.eval_shape(lambda: init(model.init_params(0, config)))
  B, I, C = batch_size, config.image_size, config.num_classes
  batch = {"images": jax.ShapeDtypeStruct((B, I, I, 3), config.dtype),
           "labels": jax.ShapeDtypeStruct((B, C), jnp.float32),
           "bad": jax.ShapeDtypeStruct((B,), bool), "stop": jax.ShapeDtypeStruct((B,), jnp.int32)}
  compiled = step.lower(state, batch).compile()
  m = compiled.memory_analysis()
  return compiled, (m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
                    - m.alias_size_in_bytes) / 2 ** 30, batch


GIB = {"v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # of a device, which no compiler says


def benchmark_topology(topology, config, batch_size, settings):
  """Compiles the step for TPUs that are not here, and prints what it takes; exit code 1: too large."""
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  kind = topology.split(":")[0]
  # JAX shows the two halves of a chip of v4 as one device.
  options = {"chip_config_name": "megacore"} if kind == "v4" else {}
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    have = GIB[kind]
  except (RuntimeError, KeyError) as error:
    raise UserError(f"--topology={topology}: {error}; expected one of {', '.join(GIB)} with a shape, "
                    "such as v3:2x2 or v5e:2x4, and pip install \"jax[tpu]\"") from None
  mesh = Mesh(np.array(devices), ("data",))
  shardings = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
  given = settings.pop("grad_accum")
  for parts in (given, *(n for n in (2, 4, 8) if n > given)):
    log(f"Compiling for {len(devices)} x {kind}, --grad_accum={parts}; this takes a minute or more.")
    try:
      compiled, need, _ = compile_step(config, batch_size, *shardings, grad_accum=parts, **settings)
      break
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from None
      log(str(error).splitlines()[0])
  else:
    raise UserError(f"--batch_size={batch_size} does not fit {topology}, nor with --grad_accum=8")
  cost = compiled.cost_analysis()
  log(f"{config.variant} at {config.image_size}, {config.dtype}, batch {batch_size} on {len(devices)} "
      f"x {kind}: {need:.2f} of {have} GiB a device, {cost['bytes accessed'] / 1e9:.1f} GB moved a "
      "step" + f", the compiler's estimate {1000 * cost['optimal_seconds']:.0f} ms" * (kind == "v3"))
  if parts > given:
    raise UserError(f"--batch_size={batch_size} does not fit {topology}; --grad_accum={parts} does")


def benchmark(config, batch_size, replicated, split, settings, rounds=5):
  """Prints the speed of the step on random data, against the best matrix product of the device."""

  def seconds(function, repeats):  # of one call, when calls follow each other as steps do
    jax.block_until_ready(function())
    started = time.perf_counter()
    for _ in range(repeats):
      out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / repeats

  started = time.perf_counter()
  log("Compiling the step ...")
  step, need, shapes = compile_step(config, batch_size, replicated, split, **settings)
  rng, b = np.random.default_rng(0), batch_size // jax.process_count()
  batch = {"images": rng.uniform(-1, 1, (b, *shapes["images"].shape[1:])).astype(config.dtype),
           "labels": np.eye(config.num_classes, dtype=np.float32)[rng.integers(0, 1000, b)],
           "bad": np.zeros(b, bool)}
  batch, params = put(batch, split), model.init_params(0, config)
  init, _ = make_training(config, replicated, split, 10 ** 6, **settings)
  state = jax.make_array_from_process_local_data(replicated, jax.device_get(init(params)))
  compiled = time.perf_counter()
  state, metrics = step(state, batch)
  jax.block_until_ready(metrics)
  log(f"Compiled in {compiled - started:.1f} s, first step {time.perf_counter() - compiled:.1f} s.")

  def next_step():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics

  multiply, repeats = jax.jit(jnp.matmul), 2 if jax.default_backend() == "cpu" else 20
  factors = [[jax.make_array_from_process_local_data(replicated, np.ones(shape, config.dtype))
              for shape in shapes] for shapes in ([(4096, 4096)] * 2, [(3136, 1536), (1536, 1536)])]
  rates, times = [], []
  for _ in range(rounds):
    rates += [2 * len(x) * w.size * jax.device_count() / seconds(lambda: multiply(x, w), 2 * repeats)
              for x, w in factors]
    times.append(seconds(next_step, repeats))
  best, took = max(statistics.median(rates[i::2]) for i in (0, 1)), statistics.median(times)
  flops = 3 * batch_size * model.flops(config)
  log(f"{config.variant} at {config.image_size}, {config.dtype}, batch {batch_size} on "
      f"{jax.device_count()} x {jax.devices()[0].device_kind}: {batch_size / took:.2f} images/s, "
      f"{flops / took / 1e9:,.0f} GFLOP/s, {flops / took / best:.2f} of the best matrix product's "
      f"{best / 1e9:,.0f}; {need:.1f} GiB a device.")


# --- Start ----------------------------------------------------------------------------------------


def run(argv):
  """`main`, with a line instead of a traceback for what the user can fix."""
  logging.set_verbosity(logging.WARNING)  # TFDS and JAX have much to say
  if FLAGS.topology:  # libtpu need not look for TPUs here
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
  try:
    return main(argv)
  except (UserError, model.WeightsError, input_pipeline.DatasetError, input_pipeline.BadImage) as error:
    message = f"Error: {error}"
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    message = (f"Error: {str(error).splitlines()[0]}. If another process of this run was lost, start "
               "all of them again with the same commands to go on from the last checkpoint.")
  if jax.process_count() > 1:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # a regular exit would wait for the others, which wait for this one
  sys.exit(message)


if __name__ == "__main__":
  app.run(run)
