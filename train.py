"""Trains and evaluates the plain ViT of "Better plain ViT baselines for ImageNet-1k" (2205.01580).

    python train.py  # the report's first row: 90 epochs
    python train.py --eval_only --init=vit_s16_i1k_90ep.npz  # evaluates published or own weights

The default of every flag is the published run. First comes the method, then `main`, then what it
stands on. Only `main` and `run` read flags.

Shapes: B batch, I image side, C classes; [] is a number.
"""

import collections
from concurrent import futures
import fcntl
import functools
import io
import json
import math
import os
import re
import signal
import sys
import time
from typing import NamedTuple

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

# The recipe: a run resumes only with the same values. The last arguments are bounds.
flags.DEFINE_float("epochs", 90, "Passes over the training split.", 0)
flags.DEFINE_integer("batch_size", 1024, "Images per step, over all devices.", 1)
flags.DEFINE_string("dataset", "imagenet2012", "TFDS name, patterns (the demo), or a folder.")
flags.DEFINE_string("train_split", "train[:99%]", "What to train on.")
flags.DEFINE_string("variant", "S/16", "Size / patch side; sizes: demo, mu, Ti, S, M, B, L, H.")
flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
flags.DEFINE_enum("posemb", "sincos2d", model.CHOICES["posemb"], "Position embedding.")
flags.DEFINE_enum("pool", "gap", model.CHOICES["pool"], "Classify the mean or a [cls] token.")
flags.DEFINE_enum("head", "mlp", model.CHOICES["head"], "One hidden tanh layer, or none.")
flags.DEFINE_integer("randaug_layers", 2, "RandAugment's operations on an image; 0: off.", 0)
flags.DEFINE_float("randaug_magnitude", 10, "Their magnitude.", 0, 20)
flags.DEFINE_float("mixup", 0.2, "p of Mixup's Beta(p, p); 0: off.", 0)
flags.DEFINE_float("lr", 1e-3, "Peak learning rate.", 0)
flags.DEFINE_float("weight_decay", 1e-4, "Of kernels; not multiplied by --lr.", 0)
flags.DEFINE_integer("warmup_steps", 10_000, "Steps of linear warm-up; 0: off.", 0)
flags.DEFINE_float("grad_clip_norm", 1.0, "Largest global norm of the gradients; 0: off.", 0)
flags.DEFINE_enum("dtype", "bfloat16", model.CHOICES["dtype"], "Of products and between them.")
flags.DEFINE_integer("seed", 0, "Of parameters, order of data, augmentations.", 0, 2 ** 32 - 1)
flags.DEFINE_string("init", None, "The .npz file of weights to start from.")

# These may differ on resuming. A new flag is of the recipe unless it is named here.
NOT_RECIPE = {"workdir", "data_dir", "log_every", "eval_every", "checkpoint_every",
              "eval", "eval_only", "allow_changes", "grad_accum", "coordinator", "num_processes",
              "process_id"}
flags.DEFINE_string("workdir", "workdir", "For checkpoints and logs; the same one resumes.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets.")
flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1)
flags.DEFINE_integer("eval_every", 2500, "Steps between evaluations.", 1)
flags.DEFINE_integer("checkpoint_every", 1000, "Steps between checkpoints; two are kept.", 1)
flags.DEFINE_list("eval", ["minival", "val"], "minival, val, real, v2 or other splits.")
flags.DEFINE_bool("eval_only", False, "Evaluate --init on --eval; no training.")
flags.DEFINE_bool("allow_changes", False, "Resume although the recipe has changed.")
flags.DEFINE_integer("grad_accum", 1, "Parts to take a batch in, to save memory.", 1)
flags.DEFINE_string("coordinator", None, "host:port of process 0, if JAX cannot find it.")
flags.DEFINE_integer("num_processes", None, "How many there are.")
flags.DEFINE_integer("process_id", None, "This one, from 0.")

# What --eval can name besides splits of --dataset: data set (None: --dataset), split, label.
EVALS = {
    "minival": (None, "train[99%:]", "label"),
    "val": (None, "validation", "label"),
    "real": ("imagenet2012_real", "validation", "real_label"),  # arXiv 2006.07159
    "v2": ("imagenet_v2", "test", "label"),  # arXiv 1902.10811, matched frequency
}


class UserError(Exception):
  """What the user can mend; only its message is printed."""


# --- The method ---


class Settings(NamedTuple):
  """What the optimiser, the loss and the step need. A flag with a field's name is that field."""

  lr: float = 1e-3
  weight_decay: float = 1e-4
  grad_clip_norm: float = 1.0
  warmup_steps: int = 10_000
  grad_accum: int = 1


def make_optimizer(schedule, settings=Settings()):
  """Adam with decoupled weight decay of the kernels, in the order of the published run."""
  kernels = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
  clip = settings.grad_clip_norm
  return optax.chain(
      optax.clip_by_global_norm(clip) if clip else optax.identity(),
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.bfloat16),  # mu in 2 bytes
      optax.scale(settings.lr),
      # After the learning rate, hence not multiplied by it: 1e-4 here is 0.1 in other AdamWs.
      optax.add_decayed_weights(settings.weight_decay, mask=kernels),
      optax.scale_by_schedule(schedule),
      optax.scale(-1.0))


# Of logits and labels [B, C]: float32 [B]; for the loss and evaluations.
cross_entropy = optax.softmax_cross_entropy


def loss_fn(params, batch, config, settings=Settings()):
  """The mean over a batch, with the (mixed) labels: float32 []. settings: for what a fork adds."""
  logits = model.forward(params, batch["images"], config)
  return cross_entropy(logits, batch["labels"]).mean()


def loss_and_grads(params, batch, config, settings=Settings()):
  """The loss and its gradients, from n = `grad_accum` equal parts of a batch, one by one."""
  grad_fn, n = jax.value_and_grad(loss_fn), settings.grad_accum
  if n == 1:
    return grad_fn(params, batch, config, settings)
  # [B, ...] -> [n, B / n, ...], every n-th row in a part, so that all devices share each part.
  parts = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, grad_fn(params, part, config, settings)), None

  zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))  # a loss and gradients
  total, _ = jax.lax.scan(add_part, zeros, parts)
  return jax.tree.map(lambda x: x / n, total)


def make_shardings(devices):
  """Shardings over devices: `replicated`, the same on all, and split `by_rows`."""
  mesh = Mesh(np.array(devices), ("data",))
  return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def make_training(config, replicated, by_rows, total_steps, settings=Settings()):
  """What is trained, and the step that does it; the state is replicated, batches split by rows.

  Returns:
    init: function(params) -> state, a dict of all that training changes and checkpoints hold.
    step: function(state, batch) -> (state, metrics), jitted; it reuses the old state's memory.
      batch: images [B, I, I, 3] and labels [B, C]. metrics, float32 []: loss, learning_rate,
      grad_norm (before clipping) and param_norm (after the update).
  """
  # From 0, for the first update, in a line to 1, then in a cosine to 0.
  schedule = optax.warmup_cosine_decay_schedule(0, 1, settings.warmup_steps, total_steps)
  optimizer = make_optimizer(schedule, settings)

  def init(params):
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

  @jax.jit(in_shardings=(replicated, by_rows), out_shardings=replicated, donate_argnums=0)
  def step(state, batch):
    # The loss is a mean over rows that are split: hence XLA adds up the gradients of all devices.
    loss, grads = loss_and_grads(state["params"], batch, config, settings)
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": loss, "learning_rate": settings.lr * schedule(state["step"]),
               "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

  return init, step


def make_eval_step(config, replicated, by_rows):
  """function(params, batch) -> sums over rows: "count", "top1", "top5" and "loss", all [].

  A prediction is right if it is in the row's set of labels; the loss is against them in equal
  parts. Rows count that are in the batch's mask and, as in ReaL, have a label.
  """

  @jax.jit(in_shardings=(replicated, by_rows), out_shardings=replicated)
  def eval_step(params, batch):
    labels, logits = batch["labels"], model.forward(params, batch["images"], config)
    counts = batch["mask"] & labels.any(1)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
    right = jnp.take_along_axis(labels, best, 1) * counts[:, None]
    loss = cross_entropy(logits, labels / labels.sum(1, keepdims=True).clip(1))
    return {"count": counts.sum(), "top1": right[:, 0].sum(), "top5": right.any(1).sum(),
            "loss": jnp.where(counts, loss, 0).sum()}

  return eval_step


def evaluate(params, evals, eval_step, by_rows):
  """Evaluates parameters on {name: function() -> batches}; prints a line for each name.

  Returns {"NAME/count": images with a label, "NAME/top1" and "NAME/top5" in %, "NAME/loss"}.
  """
  results = {}
  for name, batches in evals.items():
    sums = collections.Counter()
    for batch in batches():
      metrics = eval_step(params, jax.make_array_from_process_local_data(by_rows, batch))
      sums.update({key: value.item() for key, value in metrics.items()})
    count = sums["count"]
    top1, top5, loss = (sums[key] / count for key in ("top1", "top5", "loss"))
    log(f"  {name:10} top-1 {top1:7.2%}   top-5 {top5:7.2%}   loss {loss:.4f}   {count:,} images")
    results |= {f"{name}/count": count, f"{name}/top1": 100 * top1, f"{name}/top5": 100 * top5,
                f"{name}/loss": loss}
  return results


# --- Training ---


def log(message):
  """Prints a line, on the first process only. What the screen does never ends a run."""
  if jax.process_index() == 0:
    try:
      print(message, flush=True)
    except OSError:  # `| tee` after Ctrl-C: from now on to nowhere
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check_run(total_steps, batch_size, devices, settings):
  """UserError: what is known to be wrong with a run before any work."""
  if batch_size % (devices * settings.grad_accum):
    raise UserError(f"--batch_size={batch_size}: expected a multiple of {devices} devices times "
                    f"--grad_accum={settings.grad_accum}")
  if total_steps <= settings.warmup_steps:
    raise UserError(f"--warmup_steps={settings.warmup_steps}: expected fewer than the run's "
                    f"{total_steps} steps, such as {total_steps // 10}, or more --epochs, or a "
                    "smaller --batch_size")


def read_metrics(step, metrics):
  """Waits for a step; returns it and its metrics as numbers. UserError: not finite."""
  metrics = {name: value.item() for name, value in metrics.items()}
  if not all(map(math.isfinite, metrics.values())):
    raise UserError(f"not finite at step {step}: {metrics}. The last checkpoint is from before; "
                    "try a lower --lr or more --warmup_steps")
  return step, metrics


received_signal = 0  # SIGTERM or SIGINT, of `handle_signal`


def handle_signal(number, _):
  """SIGTERM and Ctrl-C end the run after a checkpoint; a second one ends it at once."""
  global received_signal
  received_signal = number
  for each in (signal.SIGTERM, signal.SIGINT):
    signal.signal(each, signal.SIG_DFL)


def agreed_signal(step, log_every):
  """The signal that some process received, the same on all of them, or 0."""
  if step % log_every and jax.process_count() > 1:  # to ask is to wait for all
    return 0
  return int(multihost_utils.process_allgather(np.int32(received_signal)).max())


def main(_):
  # Devices
  start_processes(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  replicated, by_rows = make_shardings(jax.devices())
  devices, to_devices = by_rows.num_devices, jax.make_array_from_process_local_data
  process = dict(process_index=jax.process_index(), process_count=jax.process_count())

  # The model is as the flags say, or, with --init, as that file does.
  model_flags = [FLAGS[field] for field in model.Config._fields if field in FLAGS]
  config = model.Config(**{flag.name: flag.value for flag in model_flags})
  weights, label_names = {}, ()
  if FLAGS.init:
    given = {flag.name: flag.value for flag in model_flags if flag.present}
    weights, config, label_names = model.load(FLAGS.init, **given)

  # Data
  prepare = jax.process_count() == 1
  dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir, prepare)
  if FLAGS.eval_only and "head" not in weights:
    raise UserError("--eval_only needs --init=FILE.npz with a head")
  if not FLAGS.eval_only:
    classes = input_pipeline.class_names(dataset)
    if FLAGS.init and (len(classes) != config.num_classes or label_names not in ((), classes)):
      log(f"Starting with a new head: --init has {config.num_classes} other classes, "
          f"{label_names or 'unnamed'!s:.200}.")
      weights.pop("head", None)
    label_names, config = classes, config._replace(num_classes=len(classes))
  evals = open_evals(
      FLAGS.eval, dataset, FLAGS.data_dir, label_names, config.num_classes,
      batch_size=-(-FLAGS.batch_size // devices) * devices,  # rounded up
      eval_image=functools.partial(augment.eval_image, image_size=config.image_size),
      dtype=config.dtype, **process)
  eval_step = make_eval_step(config, replicated, by_rows)
  if FLAGS.eval_only:
    evaluate(to_devices(replicated, weights), evals, eval_step, by_rows)
    return

  # Parameters, optimiser, step
  num_examples = input_pipeline.split_size(dataset, FLAGS.train_split)
  total_steps = round(FLAGS.epochs * num_examples / FLAGS.batch_size)
  settings = Settings(**{field: FLAGS[field].value for field in Settings._fields})
  check_run(total_steps, FLAGS.batch_size, devices, settings)
  init, train_step = make_training(config, replicated, by_rows, total_steps, settings)
  state = init(model.init_params(FLAGS.seed, config) | weights)
  recipe_flags = [flag for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__])
                  if flag.name not in NOT_RECIPE]
  window = input_pipeline.window_size(dataset, FLAGS.train_split)
  about = describe_run(recipe_flags, config, label_names, num_examples, window)
  if jax.process_index() == 0:  # it alone reads and writes the workdir
    lock = lock_workdir(FLAGS.workdir)  # until this process ends
    state = restore_checkpoint(FLAGS.workdir, state, about, FLAGS.allow_changes)
  state = multihost_utils.broadcast_one_to_all(state)
  step, state = int(state["step"]), to_devices(replicated, state)

  # Loop
  size, kind = sum(x.size for x in jax.tree.leaves(state["params"])), jax.devices()[0].device_kind
  log(f"{config.variant} with {size:,} parameters on {devices} x {kind}: {total_steps:,} steps of "
      f"{FLAGS.batch_size}, {num_examples:,} images an epoch, into {FLAGS.workdir}.")
  log("Compiling the step ..." if step < total_steps else "This run is already finished.")
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle_signal)
  train_image = functools.partial(
      augment.train_image, image_size=config.image_size, randaug_layers=FLAGS.randaug_layers,
      randaug_magnitude=FLAGS.randaug_magnitude)
  batches = input_pipeline.train_batches(
      dataset, FLAGS.train_split, FLAGS.batch_size, train_image, start_step=step,
      mixup_p=FLAGS.mixup, dtype=config.dtype, seed=FLAGS.seed, **process)
  run_log = RunLog(FLAGS.workdir, step, total_steps, FLAGS.batch_size, num_examples,
                   FLAGS.log_every)
  background = futures.ThreadPoolExecutor(1)
  saved = background.submit(lambda: FLAGS.workdir)  # then a checkpoint, once written
  unread, stop = None, 0  # the last step and its metrics; the number of a signal
  while not stop:
    if step >= total_steps or step and step % FLAGS.eval_every == 0:
      log(f"Evaluation at step {step}:")
      run_log.write(step, evaluate(state["params"], evals, eval_step, by_rows))
    if step >= total_steps:
      break
    state, metrics = train_step(state, to_devices(by_rows, run_log.next_batch(batches)))
    step += 1
    # To read metrics is to wait for their step: for the one before, so that the device has work.
    if unread:
      run_log.step(*read_metrics(*unread))
    unread = step, metrics
    stop = agreed_signal(step, FLAGS.log_every)
    if (stop or step == total_steps or step % FLAGS.eval_every == 0
        or step % FLAGS.checkpoint_every == 0):
      run_log.step(*read_metrics(*unread))  # raises before it is saved
      unread = None
      saved.result()  # until the checkpoint before is written
      if jax.process_index() == 0:
        copy = jax.tree.map(np.array, state)  # as the next step reuses the state's memory
        saved = background.submit(save_checkpoint, FLAGS.workdir, copy, about)
  if stop:
    log(f"Stopped after step {step}; the same command goes on from {saved.result()}.")
    sys.exit(128 + stop)
  log(f"Done: {saved.result()}")


# --- What main stands on ---


def start_processes(coordinator, num_processes, process_id):
  """Joins the other processes: on TPU pods and under srun JAX finds them, else flags name them."""
  given = coordinator, num_processes, process_id
  if given.count(None) in (1, 2):
    raise UserError("--coordinator, --num_processes and --process_id go together")
  count = num_processes or max(int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)),
                               os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1)
  if count > 1:
    print(f"Waiting for all {count} processes ...", flush=True)
    jax.distributed.initialize(*given, heartbeat_timeout_seconds=30)


def open_evals(names, dataset, data_dir, label_names, num_classes, batch_size, **eval_args):
  """{name: function() -> batches} of --eval, for a model whose label_names may be (), unknown.

  UserError or DatasetError: one is missing, or of other classes.
  """
  evals = {}
  for name in names:
    own = name in dataset.info.splits or name not in EVALS  # a folder may have a split "val"
    other, split, label = (None, name, "label") if own else EVALS[name]
    data = dataset if other is None else input_pipeline.open_dataset(
        other, data_dir, eval_args["process_count"] == 1)
    input_pipeline.split_size(data, split)  # an error if it is not there
    classes = input_pipeline.class_names(data, label)
    if len(classes) != num_classes or label_names not in ((), classes):
      raise UserError(f"--eval={name} has {len(classes)} classes, {classes!s:.200}, and the model "
                      f"{num_classes}, {label_names!s:.200}")
    evals[name] = functools.partial(
        input_pipeline.eval_batches, data, split, batch_size, label=label, **eval_args)
  return evals


class RunLog:
  """Lines on the screen; the same as JSON in log.jsonl, and TensorBoard events, in the workdir."""

  def __init__(self, workdir, step, total_steps, batch_size, num_examples, log_every):
    self.workdir, self.total_steps, self.log_every = workdir, total_steps, log_every
    self.batch_size, self.num_examples, self.first = batch_size, num_examples, True
    self.since, self.started, self.waited = step, time.perf_counter(), 0.0
    if jax.process_index() == 0:
      self.events = tf.summary.create_file_writer(workdir)

  def next_batch(self, batches):
    """The next batch; measures the wait for it."""
    started = time.perf_counter()
    batch = next(batches)
    self.waited += time.perf_counter() - started
    return batch

  def step(self, step, metrics):
    """Logs the first and last step, each log_every-th, and one after 30 s without a line."""
    first, took = self.first, time.perf_counter() - self.started
    if not first and step % self.log_every and step < self.total_steps and took < 30:
      return
    line = {"epoch": step * self.batch_size / self.num_examples} | metrics
    text = ("step {}/{}  epoch {epoch:.2f}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            "grad {grad_norm:.3f}".format(step, self.total_steps, **line))
    if first:
      text += f"  compiled and done after {took:.1f} s"
    elif took > 0.1:  # less says little about speed
      rate, waited = (step - self.since) * self.batch_size / took, self.waited / took
      left = (self.total_steps - step) * self.batch_size / rate / 60
      text += f"  {rate:.0f} images/s  waiting for data {waited:.0%}  {left:.0f} min left"
      line |= {"images_per_second": rate, "data_wait": waited}
    self.first = False
    log(text)
    self.write(step, line)

  def write(self, step, line):
    """Writes {name: number} to log.jsonl and for TensorBoard; measures speed from here on."""
    self.since, self.started, self.waited = step, time.perf_counter(), 0.0
    if jax.process_index() == 0:
      with tf.io.gfile.GFile(os.path.join(self.workdir, "log.jsonl"), "a") as f:
        f.write(json.dumps({"step": step} | line) + "\n")
      with self.events.as_default(step):
        for name, value in line.items():
          tf.summary.scalar(name, value)
      self.events.flush()


def lock_workdir(workdir):
  """Makes a workdir; on a local disk, locks it as long as the returned file is open."""
  if "://" not in workdir:
    os.makedirs(workdir, exist_ok=True)
    lock = open(os.path.join(workdir, "lock"), "w")
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"another run uses --workdir={workdir}; give this one its own") from None
    except OSError:  # a disk that knows no locks
      pass
    return lock
  if not tf.io.gfile.isdir(workdir):
    tf.io.gfile.mkdir(workdir)  # makedirs would never end where there is no bucket


def describe_run(recipe_flags, config, label_names, num_examples, window):
  """What a checkpoint says of its run, all of it for JSON: {"flags", "config", "defaults"}."""
  run = {flag.name: flag.value for flag in recipe_flags} | config._asdict() | {
      "label_names": list(label_names), "num_examples": num_examples,
      "process_count": jax.process_count(), "data_order": input_pipeline.ORDER}
  # What earlier versions do not say. The first shuffled 4,096 records at a time, however large.
  earlier = {"num_examples": num_examples, "num_classes": len(label_names), "process_count": 1,
             "data_order": 1 if window == 4096 or window > num_examples else 0}
  defaults = {flag.name: flag.default for flag in recipe_flags} | config._field_defaults | earlier
  return {"flags": run, "config": config._asdict(), "defaults": defaults}


def checkpoints(workdir):
  """The checkpoints in a workdir, oldest first."""
  return [os.path.join(workdir, name) for name in sorted(tf.io.gfile.listdir(workdir))
          if re.fullmatch(r"checkpoint_\d{8}\.npz", name)]


def save_checkpoint(workdir, state, about):
  """Writes a checkpoint, which is whole before it has its name; keeps the last two."""
  path, buffer = os.path.join(workdir, f"checkpoint_{state['step']:08}.npz"), io.BytesIO()
  np.savez(buffer, **model.flatten(state), label_names=about["flags"]["label_names"], **{
      name: np.array(json.dumps(part)) for name, part in about.items()})
  temporary = os.path.join(workdir, "checkpoint.tmp")
  with tf.io.gfile.GFile(temporary, "wb") as f:
    f.write(buffer.getvalue())
  if "://" not in workdir:  # on the disk before it has its name
    with open(temporary, "rb") as f:
      os.fsync(f.fileno())
  tf.io.gfile.rename(temporary, path, overwrite=True)
  for old in checkpoints(workdir)[:-2]:
    tf.io.gfile.remove(old)
  return path


def restore_checkpoint(workdir, state, about, allow_changes=False):
  """The newest state in a workdir; `state`, which it must resemble, if there is none.

  What only one side says must have the other's default. UserError: damaged, or of another run.
  """
  path = (checkpoints(workdir) or [None])[-1]
  if path is None:
    return state
  try:
    arrays = model.read_npz(path)
    before = about["defaults"] | {"label_names": arrays["label_names"].tolist()} | json.loads(
        arrays["flags"].item())
  except (model.WeightsError, LookupError):
    raise UserError(f"{path} is damaged; delete it to go on from the one before") from None
  now = json.loads(arrays["defaults"].item() if "defaults" in arrays else "{}") | about["flags"]
  changes = [f"{name}={before.get(name)!s:.200} (now {now.get(name)!s:.200})"
             for name in sorted((before.keys() | now.keys()) - NOT_RECIPE)
             if before.get(name) != now.get(name)]
  if changes and not allow_changes:
    raise UserError(f"{path} is of a run with {'; '.join(changes)}. Give the same flags and data, "
                    "or another --workdir, or --allow_changes")
  flat = model.flatten(state)
  for name, x in flat.items():
    if name not in arrays or arrays[name].shape != x.shape:
      raise UserError(f"{path} has no {name} of shape {x.shape}; give another --workdir")
  log(f"Resuming after step {arrays['step']} from {path}.")
  return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in flat])


def run(argv):
  """`main`, with a line instead of a traceback for what the user can fix."""
  logging.set_verbosity(logging.WARNING)  # TFDS and JAX have much to say
  try:
    if argv[1:]:
      raise UserError(f"{' '.join(argv[1:])}: expected flags only, such as --epochs=90")
    for flag in FLAGS.get_key_flags_for_module(sys.modules[__name__]):
      if flag.value in ("", []) or isinstance(flag.value, float) and not math.isfinite(flag.value):
        raise UserError(f"--{flag.name}={flag.value}: expected a (finite) value")
      if isinstance(flag.value, str):  # after "=", no shell does it
        flag.value = os.path.expanduser(flag.value)
    return main(argv)
  except (UserError, model.WeightsError, input_pipeline.DatasetError) as error:
    message = str(error)
  except (OSError, tf.errors.OpError) as error:  # of files and disks
    message = f"{error}. Mend this and start again; checkpoints in --workdir are whole"
  except jax.errors.JaxRuntimeError as error:
    if not jax.distributed.is_initialized():
      raise
    message = f"{error}. If another process was lost, start all again"
  message = f"Error: {' '.join(message.split())}"
  if not jax.distributed.is_initialized():
    sys.exit(message)
  print(message, file=sys.stderr, flush=True)
  os._exit(1)  # a regular exit waits for the others


if __name__ == "__main__":
  app.run(run)
