"""Trains and evaluates the plain ViT of "Better plain ViT baselines for ImageNet-1k" (2205.01580).

    python train.py                                          # the report's first row: 90 epochs
    python train.py --eval_only --init=vit_s16_i1k_90ep.npz  # evaluates published or own weights
    python train.py --init=FILE.npz --predict a.jpg b.png    # names what is in pictures
    python train.py --benchmark [--topology=v3:2x2]          # the speed of a step, here or on a TPU

The default of every flag is the published run. First comes the method, then `main`, then what it
stands on. Only what a command line starts reads flags; all other functions take arguments.

Shapes: B batch, b this process's share of it, I image side, C classes; [] is a number.
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

import input_pipeline  # before tensorflow, which it tells to be quiet
import tensorflow as tf

import augment
import model

FLAGS = flags.FLAGS

# The recipe: a run resumes only with the same values.
flags.DEFINE_float("epochs", 90, "Passes over the training split: 90, 150 or 300 in the report.", 0)
flags.DEFINE_integer("batch_size", 1024, "Images per step, over all devices and processes.", 1)
flags.DEFINE_string("dataset", "imagenet2012", "TFDS name, patterns (the demo), or a folder.")
flags.DEFINE_string("train_split", "train[:99%]", "What to train on.")
flags.DEFINE_string("variant", "S/16", "Size / patch side; sizes: demo, mu, Ti, S, M, B, L, H.")
flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
flags.DEFINE_enum("posemb", "sincos2d", model.CHOICES["posemb"], "Position embedding.")
flags.DEFINE_enum("pool", "gap", model.CHOICES["pool"], "Classify the mean or a [cls] token.")
flags.DEFINE_enum("head", "mlp", model.CHOICES["head"], "One hidden tanh layer, or none.")
flags.DEFINE_integer("randaug_layers", 2, "RandAugment's operations on each image; 0: off.", 0)
flags.DEFINE_float("randaug_magnitude", 10, "Magnitude of RandAugment's operations.", 0, 20)
flags.DEFINE_float("mixup", 0.2, "p of Mixup's Beta(p, p); 0: off.", 0)
flags.DEFINE_float("lr", 1e-3, "Peak learning rate.", 0)
flags.DEFINE_float("weight_decay", 1e-4, "Of kernels, in a step at the peak; not times --lr.", 0)
flags.DEFINE_integer("warmup_steps", 10_000, "Steps of linear warm-up; 0: off.", 0)
flags.DEFINE_float("grad_clip_norm", 1.0, "Largest global norm of the gradients; 0: off.", 0)
flags.DEFINE_enum("dtype", "bfloat16", model.CHOICES["dtype"],
                  "Of products and activations in a block. float32 is never rounded to less, so on "
                  "a GPU it takes three times as long as TF32 would.")
flags.DEFINE_integer("seed", 0, "Seeds parameters, order of the data and augmentations.", 0)
flags.DEFINE_string("init", None, "Start from the weights in this .npz: published ones or ours.")

# The other flags may differ when a run resumes (--grad_accum and --remat change the rounding only).
NOT_RECIPE = {flag.name for flag in (
    flags.DEFINE_string("workdir", "workdir", "For checkpoints and logs; the same one resumes."),
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets (default: TFDS' own)."),
    flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1),
    flags.DEFINE_integer("eval_every", 2500, "Steps between evaluations.", 1),
    flags.DEFINE_integer("checkpoint_every", 1000, "Steps between checkpoints, which evaluations "
                         "write, too; two are kept.", 1),
    flags.DEFINE_integer("keep_every", 0, "Also keep every so many steps' checkpoint.", 0),
    flags.DEFINE_list("eval", ["minival", "val"], "minival, val, real, v2, splits of --dataset."),
    flags.DEFINE_bool("skip_bad_images", False, "Leave out records that cannot be used."),
    flags.DEFINE_bool("allow_changes", False, "Resume although the recipe has changed."),
    flags.DEFINE_integer("grad_accum", 1, "Take a batch in so many parts, to save memory.", 1),
    flags.DEFINE_bool("remat", False, "Compute blocks twice, to save memory (not a CPU's)."),
    flags.DEFINE_string("coordinator", None, "host:port of process 0, if JAX cannot find it."),
    flags.DEFINE_integer("num_processes", None, "With --coordinator: how many there are."),
    flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is."),
    # What to do instead of training
    flags.DEFINE_bool("eval_only", False, "Evaluate --init on --eval."),
    flags.DEFINE_list("predict", [], "Classify pictures, or folders of them, with --init."),
    flags.DEFINE_bool("benchmark", False, "Measure the update step on random data."),
    flags.DEFINE_string("topology", None, "Instead, ask a TPU's compiler about it, as v3:2x2."))}

for _name in ("epochs", "randaug_magnitude", "mixup", "lr", "weight_decay", "grad_clip_norm"):
  flags.register_validator(_name, math.isfinite, "expected a finite number")

# What --eval can name besides splits of --dataset: data set (None is --dataset), split, label.
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
  kernels = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
  return optax.chain(
      optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity(),
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.bfloat16),  # half the memory
      optax.scale(lr),
      # After the learning rate, hence not multiplied by it: 1e-4 here is 0.1 in other AdamWs.
      optax.add_decayed_weights(weight_decay, mask=kernels),
      optax.scale_by_schedule(schedule),
      optax.scale(-1.0))


def loss_fn(params, batch, config, remat=False):
  """Softmax cross-entropy with the (mixed) labels, the mean over a batch: float32 []."""
  logits = model.forward(params, batch["images"], config, remat)
  return optax.softmax_cross_entropy(logits, batch["labels"]).mean()


def loss_and_grads(params, batch, config, remat=False, grad_accum=1):
  """The loss and its gradients, from `grad_accum` equal parts of a batch one after the other."""
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


def put(batch, by_rows):
  """This process's rows, {name: array [b, ...]}, as arrays [B, ...] split over all devices.

  With them goes "stop", the signal that this process received, or 0: so all stop in one step.
  """
  stop = np.full(len(batch["images"]), received_signal, np.int32)
  return jax.make_array_from_process_local_data(by_rows, batch | {"stop": stop})


def host_metrics(batch):
  """What processes tell each other: how many rows could not be used, and a signal, or 0."""
  return {"bad": batch["bad"].sum(), "stop": batch["stop"].max()}


def make_eval_step(config, replicated, by_rows):
  """function(params, batch) -> sums over rows: "count", "top1", "top5", "loss", `host_metrics`.

  A prediction is right if it is in the set of labels of its row; the loss is against the labels in
  equal parts. Only rows of the batch's mask count, and, as in ReaL, only those that have a label.
  """

  @jax.jit(in_shardings=(replicated, by_rows), out_shardings=replicated)
  def eval_step(params, batch):
    labels, logits = batch["labels"], model.forward(params, batch["images"], config)
    counts = batch["mask"] & labels.any(1)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
    right = jnp.take_along_axis(labels, best, 1) * counts[:, None]
    loss = optax.softmax_cross_entropy(logits, labels / labels.sum(1, keepdims=True).clip(1))
    return {"count": counts.sum(), "top1": right[:, 0].sum(), "top5": right.any(1).sum(),
            "loss": jnp.where(counts, loss, 0).sum()} | host_metrics(batch)

  return eval_step


def evaluate(params, evals, eval_step, by_rows, prefix=""):
  """Evaluates parameters.

  evals: {name: (function() -> batches, what the results are to say of them)}, of `open_evals`.

  Returns:
    {prefix + name: {"count", "top1" and "top5" in percent, "loss", "bad", ...}}, each image counted
    exactly once, and the number of a signal that ended it, or 0.
  """
  results = {}
  for name, (batches, source) in evals.items():
    sums = collections.Counter()
    for batch in batches():
      metrics = eval_step(params, put(batch, by_rows))
      sums.update({key: value.item() for key, value in metrics.items()})
      if sums["stop"]:
        return results, int(sums["stop"])
    if not sums["count"]:
      raise UserError(f"--eval: no image of {name} can be used; look at what is in the data set")
    results[prefix + name] = source | {
        "count": sums["count"], "bad": sums["bad"], "loss": sums["loss"] / sums["count"],
        **{key: 100 * sums[key] / sums["count"] for key in ("top1", "top5")}}
  return results, 0


# --- Training -------------------------------------------------------------------------------------


def check_run(total_steps, warmup_steps, batch_size, grad_accum, devices):
  """UserError for what can be known to be wrong with a run before any work."""
  if batch_size % (devices * grad_accum):
    raise UserError(f"--batch_size={batch_size}: expected a multiple of {devices} devices times "
                    f"--grad_accum={grad_accum}")
  if not total_steps:
    raise UserError(f"--epochs is less than one step of --batch_size={batch_size}")
  if total_steps <= warmup_steps:
    raise UserError(f"--warmup_steps={warmup_steps} is not shorter than the run of {total_steps} "
                    f"steps: pass --warmup_steps={total_steps // 10} or more --epochs")


def make_training(config, replicated, by_rows, total_steps, *, warmup_steps=10_000, lr=1e-3,
                  weight_decay=1e-4, grad_clip_norm=1.0, grad_accum=1, remat=False):
  """What is trained, and the step that does it.

  Args:
    config: a model.Config.
    replicated, by_rows: the shardings over the devices of the state, and of the rows of a batch.
    The rest are the flags of the same names.

  Returns:
    init: function(params) -> state, a dict of all that training changes and checkpoints hold.
    step: function(state, batch of `put`) -> (state, metrics), jitted; it reuses the memory of the
      old state. metrics, all []: "loss", "learning_rate", "grad_norm" (before clipping),
      "param_norm" (after the update), and those of `host_metrics`.
  """
  # From 0, for the first update, in a line to 1, then in a cosine to 0.
  schedule = optax.warmup_cosine_decay_schedule(0, 1, warmup_steps, total_steps)
  optimizer = make_optimizer(schedule, lr, weight_decay, grad_clip_norm)

  def init(params):
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

  @jax.jit(in_shardings=(replicated, by_rows), out_shardings=replicated, donate_argnums=0)
  def step(state, batch):
    # The loss is a mean over rows that are split: hence XLA adds up the gradients of all devices.
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
  replicated, by_rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

  # The model is as the flags say, or with --init as its file does.
  weights, info = model.load(FLAGS.init) if FLAGS.init else ({}, model.Info())
  config = info.config._replace(
      attention="cudnn" if mesh.devices.flat[0].platform == "gpu" else "xla",
      **{field: FLAGS[field].value for field in model.Config._fields
         if field in FLAGS and (FLAGS[field].present or not FLAGS.init)})
  settings = {name: FLAGS[name].value for name in (
      "warmup_steps", "lr", "weight_decay", "grad_clip_norm", "grad_accum", "remat")}
  input_args = dict(image_size=config.image_size, dtype=config.dtype,
                    process_index=jax.process_index(), process_count=jax.process_count(),
                    skip_bad_images=FLAGS.skip_bad_images)
  if FLAGS.benchmark or FLAGS.topology or FLAGS.eval_only or FLAGS.predict or argv[1:]:
    return instead_of_training(argv, weights, info, config, replicated, by_rows, settings,
                               input_args)

  # Data
  dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir)
  for note in input_pipeline.notes(dataset):
    log(note)
  if input_pipeline.is_set(dataset):  # a fork whose loss takes sets of labels can delete this
    raise UserError(f"--dataset={FLAGS.dataset}: its label is a set; the loss needs exactly one")
  weights, label_names = fit_weights(weights, info, config, dataset)
  num_examples = input_pipeline.split_size(dataset, FLAGS.train_split)
  total_steps = round(FLAGS.epochs * num_examples / FLAGS.batch_size)
  check_run(total_steps, FLAGS.warmup_steps, FLAGS.batch_size, FLAGS.grad_accum, mesh.size)
  input_args["label_names"] = label_names
  train_batches = functools.partial(
      input_pipeline.train_batches, dataset, FLAGS.train_split, FLAGS.batch_size, seed=FLAGS.seed,
      randaug_layers=FLAGS.randaug_layers, randaug_magnitude=FLAGS.randaug_magnitude,
      mixup_p=FLAGS.mixup, **input_args)
  evals = open_evals(FLAGS.eval, dataset, FLAGS.data_dir, FLAGS.batch_size, mesh.size, input_args)

  # Parameters, optimiser, step
  config = config._replace(num_classes=len(label_names))
  params = model.init_params(FLAGS.seed, config) | weights
  init, train_step = make_training(config, replicated, by_rows, total_steps, **settings)
  eval_step = make_eval_step(config, replicated, by_rows)
  recipe_flags = [flag for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__])
                  if flag.name not in NOT_RECIPE]
  defaults = {flag.name: flag.default for flag in recipe_flags}
  recipe = {flag.name: getattr(config, flag.name, flag.value) for flag in recipe_flags}
  recipe["data_order"] = input_pipeline.ORDER
  state, path = restore_checkpoint(FLAGS.workdir, init(params), recipe, defaults,
                                   FLAGS.allow_changes)
  step = int(state["step"])
  state = jax.make_array_from_process_local_data(replicated, state)

  # Loop
  run_log = RunLog(FLAGS.workdir, total_steps, FLAGS.batch_size, num_examples, FLAGS.log_every)
  log(f"{config.variant} with {sum(x.size for x in jax.tree.leaves(params)):,} parameters on "
      f"{mesh.size} x {jax.devices()[0].device_kind}: {total_steps:,} steps of {FLAGS.batch_size}, "
      f"{num_examples:,} images an epoch. Checkpoints and logs go to {FLAGS.workdir}.")
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle_signal)
  described = {"label_names": np.array(label_names), "flags": np.array(json.dumps(recipe)),
               "config": np.array(json.dumps(config._replace(attention="xla")._asdict()))}
  background = futures.ThreadPoolExecutor(1)
  saved = background.submit(lambda: path)  # the last checkpoint, once it is written
  periods = FLAGS.eval_every, FLAGS.checkpoint_every, FLAGS.keep_every or total_steps
  batches, stop = train_batches(start_step=step), 0  # stop: the number of a signal
  while not stop:
    if step >= total_steps or step and step % FLAGS.eval_every == 0:
      results, stop = evaluate(state["params"], evals, eval_step, by_rows)
      if not stop:  # else they are of a part only
        run_log.evaluation(step, results)
      if stop or step >= total_steps:
        break
    batch = run_log.wait_for(batches)
    state, metrics = train_step(state, put(batch, by_rows))
    step += 1
    due = step == total_steps or any(step % period == 0 for period in periods)
    stop = run_log.step(step, metrics, wait=due)  # raises before what is not finite is saved
    if due or stop:
      saved.result()  # until the checkpoint before is written
      copy = jax.tree.map(np.array, state)  # as the next step reuses the state's memory
      saved = background.submit(save_checkpoint, FLAGS.workdir, copy | described, FLAGS.keep_every,
                                last=bool(stop) or step == total_steps)
  path = saved.result()
  if stop:
    log(f"Stopped after step {step}; the same command goes on from the last checkpoint.")
    sys.exit(128 + stop)
  log(f"Done: {path}. Next: python train.py --init={path} --predict PICTURE.jpg")


# --- The data and the weights of a run ------------------------------------------------------------


def fit_weights(weights, info, config, dataset):
  """The weights of `model.load` as a model and a data set can use them, and the model's classes.

  Other classes leave the head out. The same ones in another order stay in the order of the weights,
  which the data's labels then follow.
  """
  label_names = input_pipeline.class_names(dataset)
  if not weights:
    return {}, label_names
  weights = model.fit(weights, info.config, config)
  if "pos_embedding" in weights and info.config.image_size != config.image_size:
    log(f"Resampling the position embedding for images of {config.image_size} pixels.")
  try:
    input_pipeline.label_positions(dataset, info.label_names)
  except input_pipeline.DatasetError as error:
    log(f"Starting with a new head: {error}.")
    weights.pop("head", None)
  same = set(label_names) == set(info.label_names)
  return weights, info.label_names if same else label_names


def open_evals(names, dataset, data_dir, batch_size, devices, input_args):
  """{name: (function() -> batches, {"dataset", "split", "image_size", "dtype"})} of --eval.

  What is not available is said and left out; UserError if that is all.

  Args:
    batch_size: is rounded up to what the devices can share.
    input_args: further arguments of `input_pipeline.eval_batches`.
  """
  evals, batch_size = {}, -(-batch_size // devices) * devices
  for name in names:
    other, split, label = EVALS.get(name, (None, name, "label"))
    try:
      data = input_pipeline.open_dataset(other, data_dir) if other else dataset
      split = name if name in data.info.splits else split  # a folder may have a split "val"
      if input_pipeline.split_size(data, split) < 100:
        log(f"  {name:10} has fewer than 100 images: its percentages are coarse.")
      input_pipeline.label_positions(data, input_args["label_names"], label)
    except input_pipeline.DatasetError as error:
      log(f"  {name:10} not available: {error}")
      continue
    source = {"dataset": data.name, "split": split}
    evals[name] = functools.partial(
        input_pipeline.eval_batches, data, split, batch_size, label=label, **input_args), source | {
            key: input_args[key] for key in ("image_size", "dtype")}
  if not evals:
    raise UserError(f"--eval={','.join(names)}: none of these is available; expected minival, val, "
                    f"real, v2 or splits of {dataset.name}: {', '.join(dataset.info.splits)}")
  return evals


# --- The log --------------------------------------------------------------------------------------


class RunLog:
  """Lines on the screen; the same as JSON in log.jsonl, and TensorBoard events, in the workdir."""

  def __init__(self, workdir, total_steps=0, batch_size=0, num_examples=1, log_every=1):
    self.workdir, self.total_steps, self.log_every = workdir, total_steps, log_every
    self.batch_size, self.num_examples = batch_size, num_examples
    self.bad, self.unread, self.speed = 0, [], {}
    self.restart(None)
    if jax.process_index() == 0:
      make_workdir(workdir)
      self.events = tf.summary.create_file_writer(workdir)
      self.path = os.path.join(workdir, "log.jsonl")
      with log_write_errors(self.path):
        text = tf.io.gfile.GFile(self.path).read() if tf.io.gfile.exists(self.path) else ""
        if text[-1:] not in ("", "\n"):  # half a line, of a full disk or a power cut
          with tf.io.gfile.GFile(self.path, "w") as f:
            f.write(text[:text.rfind("\n") + 1])

  def restart(self, step):
    """Measures speed from this step on; None: from the first step on, which is compiled first."""
    self.since, self.started, self.waited = step, time.perf_counter(), 0.0

  def wait_for(self, batches):
    """The next batch; measures the wait."""
    started = time.perf_counter()
    batch = next(batches)
    self.waited += time.perf_counter() - started
    return batch

  def step(self, step, metrics, wait):
    """Takes the metrics of a step, but reads those of the one before, so that the device has work.

    Reads these, too, if `wait`, or if it is time to stop. Returns the number of a signal that some
    process received, or 0. UserError: loss, gradients or new parameters are not finite.
    """
    self.unread.append((step, metrics))
    stop = 0
    while len(self.unread) > 1 or self.unread and (wait or stop):
      stop = self._read(*self.unread.pop(0)) or stop
    return stop

  def _read(self, step, metrics):
    metrics = {name: value.item() for name, value in metrics.items()}  # waits for the device
    if not all(map(math.isfinite, metrics.values())):
      raise UserError(f"not finite at step {step}: {metrics}. The last checkpoint in {self.workdir}"
                      " is from before; try a lower --lr or a longer --warmup_steps")
    stop, self.bad, first = metrics.pop("stop"), self.bad + metrics.pop("bad"), self.since is None
    if not first and step % self.log_every and step < self.total_steps:
      return stop
    took = time.perf_counter() - self.started
    # The last interval may be too short to tell a speed.
    if not first and (not self.speed or step - self.since >= self.log_every):
      self.speed = {"images_per_second": (step - self.since) * self.batch_size / took,
                    "data_wait": self.waited / took}
    line = {"step": step, "epoch": step * self.batch_size / self.num_examples,
            "bad_images": self.bad} | metrics | self.speed
    text = ("step {step}/{total}  epoch {epoch:.2f}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            "grad {grad_norm:.3f}  ").format(total=self.total_steps, **line)
    if first:
      text += f"compiled and done after {took:.1f} s"
    else:
      left = (self.total_steps - step) * self.batch_size / line["images_per_second"]
      text += ("{images_per_second:.0f} images/s  waiting for data {data_wait:.0%}  {left} left"
               .format(left=datetime.timedelta(seconds=round(left)), **line))
    log(text + f"  {self.bad} bad images left out" * bool(self.bad))
    self.write(line)
    self.restart(step)
    return stop

  def evaluation(self, step, results, weights=None):
    """Logs the results of `evaluate`, and writes them to eval.json.

    weights: the file that was evaluated; None: the step's checkpoint.
    """
    log(f"Evaluation of {weights}:" if weights else f"Evaluation at step {step}:")
    for name, result in results.items():
      bad = f"  ({result['bad']} bad images left out)" * bool(result["bad"])
      log("  {:10} top-1 {top1:6.2f} %   top-5 {top5:6.2f} %   loss {loss:.4f}   {count:,} images{}"
          .format(name, bad, **result))
    self.write({"step": step} | {f"{name}/{key}": result[key] for name, result in results.items()
                                 for key in ("count", "top1", "top5", "loss")})
    self.restart(None if self.since is None else step)  # nothing is compiled yet after resuming
    if jax.process_index() == 0:
      path = os.path.join(self.workdir, "eval.json")
      source = {"step": step, "weights": weights or checkpoint_path(self.workdir, step)}
      with log_write_errors(path), tf.io.gfile.GFile(path, "w") as f:
        f.write(json.dumps({name: result | source for name, result in results.items()}, indent=2))

  def write(self, line):
    """Appends {name: number} to log.jsonl and to TensorBoard's events."""
    if jax.process_index() == 0:
      with log_write_errors(self.path), self.events.as_default(line["step"] or 0):
        with tf.io.gfile.GFile(self.path, "a") as f:
          f.write(json.dumps(line) + "\n")
        for name in line.keys() - {"step"}:
          tf.summary.scalar(name, line[name])
        self.events.flush()


@contextlib.contextmanager
def log_write_errors(path):
  """A full disk is no reason to lose a run: what could not be written is a line in the log."""
  try:
    yield
  except (OSError, tf.errors.OpError) as error:
    log(f"{path} could not be written ({error}); the run goes on.")


# --- Processes and signals ------------------------------------------------------------------------


def start_processes(coordinator, num_processes, process_id):
  """Joins the other processes: on TPU pods and under srun JAX finds them, else flags name them."""
  under_srun = "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
  if coordinator:
    if num_processes is None or process_id is None:
      raise UserError("--coordinator needs --num_processes and --process_id")
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=30)
  elif under_srun or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    jax.distributed.initialize()


def handle_signal(number, _):
  """SIGTERM and Ctrl-C end the run after a checkpoint; a second one ends it at once."""
  global received_signal
  received_signal = number
  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, signal.SIG_DFL)
  text = "saving a checkpoint and stopping; once more to stop at once."
  os.write(1, f"\n{signal.Signals(number).name}: {text}\n".encode())  # print may be busy


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

  state: nested dict of arrays. That it cannot be written is an error only if it is the last one.
  Returns its path.
  """
  written = checkpoint_path(workdir, int(state["step"]))
  try:
    if jax.process_index() == 0:
      write_npz(written, model.flatten(state))
      for step, path in checkpoints(workdir)[:-2]:
        if path != written and not (keep_every and step % keep_every == 0):
          tf.io.gfile.remove(path)
  except (OSError, tf.errors.OpError) as error:
    message = f"A checkpoint could not be written to {workdir} ({error}); the previous one is kept"
    if last:
      raise UserError(message) from None
    log(f"{message}, and the run goes on.")
  return written


def restore_checkpoint(workdir, state, recipe, defaults, allow_changes=False):
  """The newest state in a workdir, and its path; `state` and None if there is none.

  Damaged files are named and skipped.

  Args:
    workdir: all processes must see the same one.
    state: has the names, shapes and dtypes to expect.
    recipe: {flag: value} of this run.
    defaults: {flag: value} of flags that the checkpoint's code did not have.

  Raises:
    UserError: there are checkpoints, but none can be read, or the newest is of another recipe or
      model, or the processes found different ones.
  """
  found, flat = checkpoints(workdir)[::-1], model.flatten(jax.device_get(state))
  for _, path in found:
    try:
      arrays = model.read_npz(path)
      before = {"data_order": 1} | defaults | json.loads(arrays["flags"].item())
    except (KeyError, ValueError, TypeError) as error:
      log(f"{path} is no checkpoint of train.py ({error}). Trying the previous one.")
      continue
    changes = [f"--{name}={before.get(name)} (now {recipe.get(name, 'unknown')})"
               for name in sorted((before | recipe).keys() - NOT_RECIPE)
               if name not in recipe or before.get(name) != recipe[name]]
    if changes and not allow_changes:
      raise UserError(f"{path} was trained with {', '.join(changes)}. Give the same flags, or "
                      "another --workdir, or --allow_changes to go on with the new ones.")
    wrong = [name for name, x in flat.items() if name not in arrays
             or (arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype)]
    if wrong:
      raise UserError(f"{path} does not fit the model: {', '.join(wrong[:3])} missing, or of "
                      "another shape or type; give another --workdir")
    log(f"Resuming after step {int(arrays['step'])} from {path}.")
    flat = {name: arrays[name] for name in flat}
    break
  else:
    path = None
    if found:
      raise UserError(f"No checkpoint in {workdir} can be read; remove them to start again.")
  if np.ptp(multihost_utils.process_allgather(np.int32(flat["step"]))):
    raise UserError("the processes do not see the same checkpoints: all must share --workdir="
                    + workdir)
  return jax.tree.unflatten(jax.tree.structure(state), flat.values()), path


# --- Instead of training --------------------------------------------------------------------------


def instead_of_training(argv, weights, info, config, replicated, by_rows, settings, input_args):
  """What --benchmark, --eval_only and --predict ask for; arguments as in `main`."""
  if argv[1:] and not FLAGS.predict:
    raise UserError(f"{' '.join(argv[1:])}: expected flags only, such as --epochs=90")
  if FLAGS.topology:
    return benchmark_topology(FLAGS.topology, config, FLAGS.batch_size, settings)
  if FLAGS.benchmark:
    return benchmark(config, FLAGS.batch_size, replicated, by_rows, settings)
  if not config.num_classes or not weights:
    raise UserError("--eval_only and --predict need --init=FILE.npz with a head"
                    + f"; {FLAGS.init} has none and can only be trained from" * bool(weights))
  weights = model.fit(weights, info.config, config)
  if not np.any(weights["head"]["kernel"]):
    log(f"The head of --init={FLAGS.init} is all zeros, that is, untrained.")
  if FLAGS.predict and jax.process_index() == 0:
    predict(weights, config, info.label_names, FLAGS.predict + argv[1:], FLAGS.workdir)
  if FLAGS.eval_only:
    run_log, name = RunLog(FLAGS.workdir), info.recipe.get("dataset", FLAGS.dataset)
    name = FLAGS.dataset if FLAGS["dataset"].present else name
    dataset = input_pipeline.open_dataset(name, FLAGS.data_dir)
    evals = open_evals(FLAGS.eval, dataset, FLAGS.data_dir, FLAGS.batch_size, by_rows.num_devices,
                       input_args | {"label_names": info.label_names})
    params = jax.make_array_from_process_local_data(replicated, weights)
    results, _ = evaluate(params, evals, make_eval_step(config, replicated, by_rows), by_rows)
    run_log.evaluation(info.step, results, FLAGS.init)


def predict(params, config, label_names, paths, workdir):
  """Prints the five most probable classes of pictures, and draws where the model looked.

  paths: of pictures, patterns of paths such as *.jpg, or folders of pictures.
  """
  make_workdir(workdir)
  drawn, captions, out = [], [], os.path.join(workdir, "predictions.png")
  for path in paths:
    if tf.io.gfile.isdir(path):
      names = [os.path.join(path, name) for name in sorted(tf.io.gfile.listdir(path))]
    else:
      names = [path] if tf.io.gfile.exists(path) else sorted(tf.io.gfile.glob(path)) or [path]
    endings = input_pipeline.ENDINGS
    names = [name for name in names if name == path or name.lower().endswith(endings)]
    if not names:
      raise UserError(f"--predict={path}: no picture there")
    for name in names:
      try:
        image = input_pipeline.eval_image(upright(name), config.image_size)
      except Exception:  # whatever TensorFlow and Pillow make of something else
        raise UserError(f"--predict={name}: not a picture that can be read") from None
      images = input_pipeline.scale(image)[None].numpy()  # [1, I, I, 3]
      probs = np.asarray(jax.nn.softmax(model.forward(params, images, config)))[0]  # [C]
      best = probs.argsort()[::-1][:5]
      log(f"{name}: " + ", ".join(f"{label_names[c]} {probs[c]:.1%}" for c in best))
      heat = np.asarray(model.attention_map(params, images, config))[0, ..., None]  # [I/P, I/P, 1]
      heat = tf.image.resize(heat / heat.max(), image.shape[:2]).numpy()
      drawn += [image.numpy(), np.uint8(image.numpy() * (0.2 + 0.8 * heat))]
      captions += [f"{os.path.basename(name)}: {label_names[best[0]]} {probs[best[0]]:.0%}",
                   "attention of the last block"]
  augment.draw_grid(out, drawn, captions, columns=min(8, len(drawn)))
  log(f"Wrote {out}.")


def upright(path):
  """The bytes of a picture; those of a turned PNG, if its Exif data say that it is to be turned."""
  from PIL import Image, ImageOps  # comes with tensorboard; pylint: disable=g-import-not-at-top
  encoded, turned = tf.io.read_file(path).numpy(), io.BytesIO()
  with Image.open(io.BytesIO(encoded)) as image:
    if image.getexif().get(0x0112, 1) == 1:  # the orientation
      return encoded
    ImageOps.exif_transpose(image).save(turned, "PNG")
  return turned.getvalue()


# --- Benchmarks -----------------------------------------------------------------------------------


def compile_step(config, batch_size, replicated, by_rows, settings):
  """The training step, compiled from shapes alone, for whatever devices the shardings name.

  Returns:
    `init` of `make_training`, the compiled step, {name: shape} of a batch, the GiB on each device.
  """
  check_run(10 ** 6, 0, batch_size, settings["grad_accum"], by_rows.num_devices)
  init, step = make_training(config, replicated, by_rows, 10 ** 6, **settings)
  state = jax.eval_shape(lambda: init(model.init_params(0, config)))
  B, I, C = batch_size, config.image_size, config.num_classes
  batch = {"images": jax.ShapeDtypeStruct((B, I, I, 3), config.dtype),
           "labels": jax.ShapeDtypeStruct((B, C), np.float32),
           "bad": jax.ShapeDtypeStruct((B,), bool), "stop": jax.ShapeDtypeStruct((B,), np.int32)}
  compiled = step.lower(state, batch).compile()
  m = compiled.memory_analysis()
  size = (m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
          - m.alias_size_in_bytes) / 2 ** 30  # the new state is written over the old one
  return init, compiled, batch, size


GIB = {"v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # of a device: no compiler says it


def benchmark_topology(topology, config, batch_size, settings):
  """Compiles the step for TPUs that are not here and prints what it takes; too much is an error."""
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  kind, given = topology.split(":")[0], settings["grad_accum"]
  try:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology,
        # JAX shows the two halves of a chip of v4 as one device.
        **{"chip_config_name": "megacore"} if kind == "v4" else {}).devices
    mesh, gib = Mesh(np.array(devices), ("data",)), GIB[kind]
  except (RuntimeError, KeyError) as error:
    raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}; expected a shape of "
                    f"{', '.join(GIB)}, such as v3:2x2, pip install \"jax[tpu]\", and no other "
                    "process that uses it") from None
  shardings = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",))]
  more = [n for n in (2, 4, 8) if n > given and batch_size % (n * mesh.size) == 0]
  for parts in (given, *more):
    log(f"Compiling for {mesh.size} x {kind} with --grad_accum={parts}: a minute or more ...")
    settings = settings | {"grad_accum": parts}
    try:
      _, step, _, size = compile_step(config, batch_size, *shardings, settings)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from None
      continue
    if parts > given:
      raise UserError(f"--batch_size={batch_size} is too large for {topology}: --grad_accum={parts}"
                      f" mends it, with {size:.2f} of {gib} GiB a device")
    cost = step.cost_analysis()
    estimate = f", the compiler's estimate is {1000 * cost['optimal_seconds']:.0f} ms"
    return log(f"{config.variant} at {config.image_size}, {config.dtype}, batch {batch_size} on "
               f"{mesh.size} x {kind}: {size:.2f} of {gib} GiB a device, "
               f"{cost['bytes accessed'] / 1e9:.1f} GB moved a step"
               + estimate * (kind == "v3"))  # for others it lacks the costs of some operations
  raise UserError(f"--batch_size={batch_size} is too large for {topology}, as are its parts")


def benchmark(config, batch_size, replicated, by_rows, settings, rounds=5):
  """Prints the speed of the step on random data, beside that of a large matrix product."""
  log("Compiling the step ...")
  started = time.perf_counter()
  init, step, shapes, size = compile_step(config, batch_size, replicated, by_rows, settings)
  log(f"Compiled in {time.perf_counter() - started:.1f} s.")
  b, rng = batch_size // jax.process_count(), np.random.default_rng(0)
  batch = put({name: rng.random((b, *x.shape[1:])).astype(x.dtype) for name, x in shapes.items()},
              by_rows)
  replicate = functools.partial(jax.make_array_from_process_local_data, replicated)
  state = replicate(jax.device_get(init(model.init_params(0, config))))
  x = replicate(np.ones((4096, 4096), config.dtype))
  multiply = functools.partial(jnp.matmul, precision=model.PRECISION[config.dtype])
  multiply = jax.jit(multiply).lower(x, x).compile()
  repeats, times = 2 if jax.default_backend() == "cpu" else 20, []
  for _ in range(rounds):  # in turn, as other work on this machine slows both
    for count in (1, repeats):  # the first is to warm up
      started = time.perf_counter()
      for _ in range(count):
        state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
    middle = time.perf_counter()
    for _ in range(repeats):
      y = multiply(x, x)
    jax.block_until_ready(y)
    times.append((middle - started, time.perf_counter() - middle))
  took, product = np.median(times, 0) / repeats
  rate, best = (flops / 1e9 for flops in (3 * batch_size * model.flops(config) / took,
                                          2 * 4096 ** 3 * jax.device_count() / product))
  log(f"{config.variant} at {config.image_size}, {config.dtype}, batch {batch_size} on "
      f"{jax.device_count()} x {jax.devices()[0].device_kind}: {batch_size / took:.2f} images/s, "
      f"{rate:,.0f} GFLOP/s, {rate / best:.2f} of a matrix product's {best:,.0f}; {size:.1f} GiB "
      "a device.")


# --- Start ----------------------------------------------------------------------------------------


def run(argv):
  """`main`, with a line instead of a traceback for what the user can fix."""
  logging.set_verbosity(logging.WARNING)  # TFDS and JAX have much to say
  if FLAGS.topology:  # a TPU that is not here must not be looked for
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    jax.config.update("jax_platforms", "cpu")
  try:
    return main(argv)
  except (UserError, model.WeightsError, input_pipeline.DatasetError) as error:
    message = f"Error: {error}"
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    message = (f"Error: {str(error).splitlines()[0]}. If another process of this run was lost, "
               "start all of them again: the same commands go on from the last checkpoint.")
  if jax.process_count() > 1:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # a regular exit would wait for the others, which wait for this one
  sys.exit(message)


if __name__ == "__main__":
  app.run(run)
