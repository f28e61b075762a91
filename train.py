"""Trains and evaluates the plain ViT of "Better plain ViT baselines for ImageNet-1k" (2205.01580).

    python train.py  # the report's first row: 90 epochs
    python train.py --eval_only --init=vit_s16_i1k_90ep.npz  # evaluates published or own weights

The flags' defaults are the published run. Read the method, then `main`; its parts follow.
Shapes: B batch, I image side, C classes; [] is a number.
"""

import collections
from concurrent import futures
import fcntl
import functools
import io
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import NamedTuple
import zlib

from absl import app, flags, logging
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
import numpy as np
import optax
import tensorflow as tf

import augment
import input_pipeline as inputs
import model

FLAGS = flags.FLAGS
WRITER = futures.ThreadPoolExecutor(1)  # of checkpoints, while training goes on

# Each process may have its own. (Numbers behind a text: least and largest value.)
flags.DEFINE_string("workdir", "workdir", "For checkpoints and logs; the same one resumes.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps data sets.")
flags.DEFINE_bool("allow_changes", False, "Resume with another recipe or data.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, if JAX cannot find it.")
flags.DEFINE_integer("num_processes", None, "Number of processes.", 1)
flags.DEFINE_integer("process_id", None, "Number of this one, from 0.", 0)
OWN = frozenset(FLAGS)

# The same on all processes; a resumed run may have others.
flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1)
flags.DEFINE_integer("eval_every", 2500, "Steps between evaluations; the end has one, too.", 1)
flags.DEFINE_integer("checkpoint_every", 1000, "Most steps between checkpoints; two are kept.", 1)
flags.DEFINE_list("eval", ["minival", "val"], "minival, val, real, v2 or other splits.")
flags.DEFINE_bool("eval_only", False, "Only evaluate --init on --eval.")
flags.DEFINE_integer("grad_accum", 1, "Parts of a batch, to save memory.", 1)
NOT_RECIPE = frozenset(FLAGS)

# The recipe, every flag from here on: a run resumes only with the same values.
flags.DEFINE_float("epochs", 90, "Passes over --train_split.", 0)
flags.DEFINE_integer("batch_size", 1024, "Images per step, over all devices.", 1)
flags.DEFINE_string("dataset", "imagenet2012", "TFDS name, patterns (the demo), or a folder.")
flags.DEFINE_string("train_split", "train[:99%]", "What to train on.")
flags.DEFINE_string("variant", "S/16", "Size / patch side; sizes: demo, mu, Ti, S, M, B, L, H.")
flags.DEFINE_integer("image_size", 224, "Side of images in pixels.")
flags.DEFINE_enum("posemb", "sincos2d", model.CHOICES["posemb"], "Position embedding.")
flags.DEFINE_enum("pool", "gap", model.CHOICES["pool"], "Classify the mean or a [cls] token.")
flags.DEFINE_enum("head", "mlp", model.CHOICES["head"], "One hidden tanh layer, or none.")
flags.DEFINE_integer("randaug_layers", 2, "RandAugment's operations; 0: off.", 0)
flags.DEFINE_float("randaug_magnitude", 10, "Their magnitude.", 0, 20)
flags.DEFINE_float("mixup", 0.2, "p of Mixup's Beta(p, p); 0: off.", 0)
flags.DEFINE_float("lr", 1e-3, "Peak learning rate.", 0)
flags.DEFINE_float("weight_decay", 1e-4, "Of kernels; not multiplied by --lr.", 0)
flags.DEFINE_integer("warmup_steps", 10_000, "Steps of linear warm-up; 0: off.", 0)
flags.DEFINE_float("grad_clip_norm", 1.0, "Largest norm of the gradients; 0: off.", 0)
flags.DEFINE_enum("dtype", "bfloat16", model.CHOICES["dtype"], "Of products, see model.py.")
flags.DEFINE_integer("seed", 0, "Of all random numbers.", 0, 2 ** 32 - 1)
flags.DEFINE_string("init", None, "A .npz of weights to start from.")

# Names for --eval besides the splits of --dataset: data set (None: --dataset), split, label.
EVALS = {
    "minival": (None, "train[99%:]", "label"),
    "val": (None, "validation", "label"),
    "real": ("imagenet2012_real", "validation", "real_label"),  # arXiv 2006.07159
    "v2": ("imagenet_v2", "test", "label"),  # arXiv 1902.10811, matched frequency
}


class UserError(Exception):
  """What the user can mend; only its message is printed."""


def require(condition, message):
  if not condition:
    raise UserError(message)


# --- The method ---


class Settings(NamedTuple):
  """What the optimiser, the loss and the step need; each field is the flag of its name."""

  lr: float = 1e-3
  weight_decay: float = 1e-4
  grad_clip_norm: float = 1.0
  warmup_steps: int = 10_000
  grad_accum: int = 1


def make_optimizer(schedule, settings=Settings()):
  """Adam with decoupled weight decay of the kernels, in the published order."""
  kernels = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
  clip = settings.grad_clip_norm
  return optax.chain(
      optax.clip_by_global_norm(clip) if clip else optax.identity(),
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.bfloat16),  # mu in 2 bytes
      optax.scale(settings.lr),
      # After the learning rate, hence not multiplied by it: 1e-4 is 0.1 in other AdamWs.
      optax.add_decayed_weights(settings.weight_decay, mask=kernels),
      optax.scale_by_schedule(schedule),
      optax.scale(-1.0))


def loss_fn(params, batch, config, settings=Settings()):  # settings: for what a fork adds
  """Softmax cross-entropy with the (mixed) labels, the mean over a batch: float32 []."""
  logits = model.forward(params, batch["images"], config)
  return optax.softmax_cross_entropy(logits, batch["labels"]).mean()


def loss_and_grads(params, batch, config, settings=Settings()):
  """The loss and its gradients: the means over n = `grad_accum` equal parts of a batch."""
  grad_fn, n = jax.value_and_grad(loss_fn), settings.grad_accum
  if n == 1:
    return grad_fn(params, batch, config, settings)
  # [B, ...] -> [n, B / n, ...]: every n-th row in a part, so that all devices share each part.
  parts = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)

  def add_part(total, part):
    return jax.tree.map(jnp.add, total, grad_fn(params, part, config, settings)), None

  zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
  total, _ = jax.lax.scan(add_part, zeros, parts)
  return jax.tree.map(lambda x: x / n, total)


def make_shardings(devices):
  """Shardings over devices: `replicated`, the same on all, and split `by_rows`."""
  mesh = jax.sharding.Mesh(devices, ("data",))
  return jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))


def state_shardings(state, replicated, by_rows):
  """How each array of a state lies on the devices: all of it on each. by_rows: for forks."""
  return jax.tree.map(lambda _: replicated, state)


def make_training(config, replicated, by_rows, total_steps, settings=Settings()):
  """init(params) -> state, a dict of all that checkpoints hold, and step(state, batch) -> (state,
  metrics), which reuses the old state's memory.
  batch: images [B, I, I, 3], labels float32 [B, C]. metrics, float32 []: loss, learning_rate,
  grad_norm (before clipping), param_norm (after the update)."""
  # From 0, for the first update, in a line to 1, then in a cosine to 0 at total_steps.
  schedule = optax.warmup_cosine_decay_schedule(0, 1, settings.warmup_steps, total_steps)
  optimizer = make_optimizer(schedule, settings)

  def init(params):
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

  shapes = jax.eval_shape(lambda: init(model.init_params(0, config)))
  sharded = state_shardings(shapes, replicated, by_rows)

  @jax.jit(in_shardings=(sharded, by_rows), out_shardings=(sharded, replicated), donate_argnums=0)
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
  """function(params, batch) -> sums over rows, []: int32 "count", "top1", "top5", float32 "loss".
  batch: images [B, I, I, 3], labels float32 [B, C], 1 for each right class, mask bool [B]. Rows
  count that are in the mask and, as in ReaL, have a label; the loss takes labels in equal parts."""

  @jax.jit(in_shardings=(replicated, by_rows), out_shardings=replicated)
  def eval_step(params, batch):
    labels, logits = batch["labels"], model.forward(params, batch["images"], config)
    counts = batch["mask"] & labels.any(1)
    _, best = jax.lax.top_k(logits, min(5, logits.shape[1]))
    right = jnp.take_along_axis(labels > 0, best, 1) & counts[:, None]
    loss = optax.softmax_cross_entropy(logits, labels / labels.sum(1, keepdims=True).clip(1))
    return {"count": counts.sum(), "top1": right[:, 0].sum(), "top5": right.any(1).sum(),
            "loss": loss.sum(where=counts)}

  return eval_step


def evaluate(params, evals, eval_step, by_rows, sizes=None):
  """Evaluates parameters on {name: function() -> batches}; prints a line for each name.
  Returns {"NAME/count": images with a label, "NAME/top1" and "NAME/top5" in %, "NAME/loss"}.
  sizes: {name: number of images}, for a line every 30 s. UserError: no image has a label."""
  results = {}
  for name, batches in evals.items():
    sums, seen, started = collections.Counter(), 0, time.perf_counter()
    said = started
    for batch in batches():
      batch = jax.make_array_from_process_local_data(by_rows, batch)
      sums.update({key: value.item() for key, value in eval_step(params, batch).items()})
      seen, now = seen + len(batch["mask"]), time.perf_counter()
      if sizes and seen < sizes[name] and now - said > 30:
        left, said = duration((now - started) * (sizes[name] / seen - 1)), now
        log(f"  {name:10} {seen:,} of {sizes[name]:,} images, {left} left")
    count = sums["count"]
    require(count, f"--eval={name}: none of its images has a label")
    top1, top5, loss = (sums[key] / count for key in ("top1", "top5", "loss"))
    log(f"  {name:10} top-1 {top1:7.2%}   top-5 {top5:7.2%}   loss {loss:.4f}   {count:,} images")
    results |= {f"{name}/count": count, f"{name}/top1": 100 * top1, f"{name}/top5": 100 * top5,
                f"{name}/loss": loss}
  return results


# --- Training ---


def main(_):
  # Processes and their devices
  start_processes(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
  listen_for_signals()
  if FLAGS.eval_only:
    return evaluate_only()
  alone, devices = jax.process_count() == 1, jax.device_count()
  replicated, by_rows = make_shardings(jax.devices())
  settings = Settings(**{field: FLAGS[field].value for field in Settings._fields})
  require(FLAGS.batch_size % (devices * FLAGS.grad_accum) == 0, f"--batch_size={FLAGS.batch_size}: "
          f"expected a multiple of {devices} devices times --grad_accum={FLAGS.grad_accum}")

  # Data and model
  dataset = inputs.open_dataset(FLAGS.dataset, FLAGS.data_dir, alone, FLAGS.train_split)
  num_examples = inputs.split_size(dataset, FLAGS.train_split)
  total_steps = round(FLAGS.epochs * num_examples / FLAGS.batch_size)
  require(FLAGS.warmup_steps < total_steps,
          f"--warmup_steps={FLAGS.warmup_steps}: expected fewer than the run's {total_steps} "
          f"steps, such as {total_steps // 10}, or more --epochs or a smaller --batch_size")
  weights, config, label_names = open_model(inputs.class_names(dataset))
  evals, eval_sizes, eval_data = open_evals(dataset, config, label_names)
  eval_step = make_eval_step(config, replicated, by_rows)

  # Parameters, optimiser, step
  init, train_step = make_training(config, replicated, by_rows, total_steps, settings)
  state = init(model.init_params(FLAGS.seed, config) | weights)

  # Go on from the newest checkpoint, if there is one
  recipe = flag_values(but=NOT_RECIPE) | config._asdict() | dict(
      label_names=label_names, num_examples=num_examples, process_count=jax.process_count(),
      data=inputs.fingerprint(dataset, FLAGS.train_split), order=inputs.ORDER)
  defaults = config._field_defaults | {name: FLAGS[name].default for name in FLAGS}
  check_agreement(recipe | eval_data)
  if jax.process_index() == 0:  # it alone reads and writes the workdir
    lock = lock_workdir(FLAGS.workdir)  # until this process ends
    with tf.io.gfile.GFile(os.path.join(FLAGS.workdir, "flags.txt"), "w") as f:  # for --flagfile
      f.write("\n".join(FLAGS[name].serialize() for name in flag_values(but=OWN)))
    state = restore_checkpoint(FLAGS.workdir, state, recipe, defaults, FLAGS.allow_changes)
  state = multihost_utils.broadcast_one_to_all(state)
  done = int(state["step"])
  state = jax.device_put(state, state_shardings(state, replicated, by_rows))

  # Loop
  train_image = functools.partial(
      augment.train_image, image_size=config.image_size, randaug_layers=FLAGS.randaug_layers,
      randaug_magnitude=FLAGS.randaug_magnitude)
  batches = inputs.train_batches(
      dataset, FLAGS.train_split, FLAGS.batch_size, train_image, start_step=done,
      mixup_p=FLAGS.mixup, dtype=config.dtype, seed=FLAGS.seed,
      process_index=jax.process_index(), process_count=jax.process_count())
  log(f"{config.variant} with {optax.tree.size(state['params']):,} parameters on {devices} x "
      f"{jax.devices()[0].device_kind}: {total_steps:,} steps of {FLAGS.batch_size}, "
      f"{num_examples:,} images an epoch, into {FLAGS.workdir}.")
  run_log = RunLog(FLAGS.workdir, done, total_steps, FLAGS.batch_size, num_examples)
  unread = saving = stop_signal = None  # metrics of the step before; the last checkpoint's Future
  for step in range(done + 1, total_steps + 1):
    Stop.then = "after this step" if alone else "after the next --log_every-th"
    batch = jax.make_array_from_process_local_data(by_rows, run_log.next_batch(batches))
    state, metrics = train_step(state, batch)
    # To read metrics is to wait for their step: for the one before, so that the device has work.
    if unread:
      run_log.log_step(step - 1, unread, FLAGS.log_every)
    unread = metrics
    if alone or step % FLAGS.log_every == 0:  # to ask the others is to wait for them
      stop_signal = int(multihost_utils.process_allgather(np.int32(Stop.number)).max())
    eval_is_due = step % FLAGS.eval_every == 0 and step < total_steps
    if stop_signal or eval_is_due or step % FLAGS.checkpoint_every == 0 or step == total_steps:
      run_log.log_step(step, unread, FLAGS.log_every)  # raises before it is saved
      unread = None
      saving = save_checkpoint(FLAGS.workdir, state, config, recipe, saving)
    if stop_signal:
      break
    if eval_is_due:
      Stop.then = "after this evaluation and one more step"
      log(f"Evaluation at step {step}:")
      run_log.write(step, evaluate(state["params"], evals, eval_step, by_rows, eval_sizes))
  if saving:
    saving.result()
  if stop_signal:
    log(f"Stopped after step {step}; the same command goes on from there.")
    sys.exit(128 + stop_signal)
  Stop.then, step = "now", int(state["step"])  # all is saved
  log(f"Evaluation at step {step}:")
  run_log.write(step, evaluate(state["params"], evals, eval_step, by_rows, eval_sizes))
  log(f"Done: {checkpoint_path(FLAGS.workdir, step)}")


# --- Parts that read flags ---


def flag_values(but=()):
  """{name: value} of this file's flags, but for some."""
  return {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(__name__)
          if flag.name not in but}


def open_model(label_names=()):
  """(weights, Config, label_names) of --init, or else of the flags. Where label_names are given, a
  head for others is left out."""
  fields = {name: FLAGS[name].value for name in model.Config._fields
            if name in FLAGS and (FLAGS[name].present or not FLAGS.init)}
  if not FLAGS.init:
    return {}, model.Config(**fields, num_classes=len(label_names)), label_names
  weights, config, known = model.load(FLAGS.init, **fields)
  label_names = label_names or known
  if known not in ((), label_names) or len(label_names) not in (0, config.num_classes):
    if not checkpoints(FLAGS.workdir):
      log(f"Starting with a new head: --init has {config.num_classes} other classes, {known!s:.99}")
    weights.pop("head", None)
    config = config._replace(num_classes=len(label_names))
  return weights, config, label_names


def open_evals(dataset, config, label_names):
  """By the names in --eval: functions () -> batches, numbers of images, fingerprints. UserError,
  DatasetError: one is missing, or of other classes than label_names, unless these are ()."""
  evals, sizes, data, devices = {}, {}, {}, jax.device_count()
  rows = max(1, min(FLAGS.batch_size // devices, 64))  # on each, so that lines come often
  eval_image = functools.partial(augment.eval_image, image_size=config.image_size)
  for name in FLAGS.eval:
    source, split, label = dataset, name, "label"
    if name in EVALS and name not in dataset.info.splits:  # a folder may have its own "val"
      other, split, label = EVALS[name]
      if other:
        source = inputs.open_dataset(other, FLAGS.data_dir, jax.process_count() == 1)
    sizes[name] = inputs.split_size(source, split)
    data[f"--eval={name}"] = inputs.fingerprint(source, split)
    classes = inputs.class_names(source, label)
    require(len(classes) == config.num_classes and label_names in ((), classes),
            f"--eval={name} has {len(classes)} classes, {classes!s:.200}, and the model "
            f"{config.num_classes}, {label_names!s:.200}")
    next(inputs.eval_batches(source, split, 1, eval_image, label=label))  # can it be read?
    evals[name] = functools.partial(
        inputs.eval_batches, source, split, rows * devices, eval_image, label=label,
        dtype=config.dtype, process_index=jax.process_index(), process_count=jax.process_count())
  return evals, sizes, data


def evaluate_only():
  """Evaluates the weights of --init on --eval."""
  weights, config, label_names = open_model()
  require("head" in weights, "--eval_only needs --init=FILE.npz with a head")
  if recipe := model.read_npz(FLAGS.init).get("recipe"):
    log(f"--init was trained on --dataset={json.loads(recipe.item())['dataset']}")
  dataset = inputs.open_dataset(FLAGS.dataset, FLAGS.data_dir, jax.process_count() == 1)
  evals, sizes, data = open_evals(dataset, config, label_names)
  check_agreement(config._asdict() | data)
  log(f"{config.variant} of {FLAGS.init} on {sizes} images:")
  replicated, by_rows = make_shardings(jax.devices())
  params = jax.device_put(multihost_utils.broadcast_one_to_all(weights), replicated)
  evaluate(params, evals, make_eval_step(config, replicated, by_rows), by_rows, sizes)


def check_agreement(about):
  """UserError: flags, code or `about`, {name: value}, are not the same on all processes."""
  files = __file__, model.__file__, inputs.__file__, augment.__file__
  about = flag_values(but=OWN) | about | {"code": [open(file, "rb").read() for file in files]}
  items = [f"{name}={value}" for name, value in about.items()]
  sums = np.zeros(1024, np.uint32)  # of one size: to gather others is to wait for ever
  sums[:len(items)] = [zlib.crc32(item.encode()) for item in items]
  everyones = multihost_utils.process_allgather(sums)  # [processes, 1024]
  differs = [f"{item:.99}" for item, x in zip(items, sums) if not (everyones == x).any(1).all()]
  require(not differs, f"processes must agree, but only some have {'; '.join(differs)}")


# --- Processes, log, checkpoints, errors ---


def start_processes(*given):
  """Joins the other processes, if there are any. given: coordinator, num_processes, process_id."""
  # Where there are none, JAX's own search may warn, raise or wait. Google's TPU VMs set none of
  # these variables: the TPU's runtime joins them.
  hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")  # on Kaggle, a sentence
  count = given[1] or max(1 if " " in hosts else hosts.count(",") + 1, *(
      int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")))
  if count > 1 or any(given):
    print(f"Waiting for all {count} processes ...", flush=True)
    try:
      jax.distributed.initialize(*given, heartbeat_timeout_seconds=30)
    except Exception as e:
      raise UserError(f"--coordinator=HOST:PORT, --num_processes and --process_id go together: {e}")


def log(message, everywhere=False):
  """Prints a line, on the first process or everywhere. What the screen does never ends a run."""
  if everywhere or jax.process_index() == 0:
    try:
      print(message, flush=True)
    except OSError:  # `| tee` after Ctrl-C: from now on to nowhere
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Stop:
  """The first signal that asks a run to stop, and when it does so."""
  number, then = 0, "now"


def listen_for_signals():
  """Hears SIGTERM, Ctrl-C, SIGUSR1 and, but for nohup, SIGHUP, whatever the process waits for.
  A second SIGTERM or Ctrl-C ends it at once; the others often come twice, or before these."""
  # Python's own handlers run when a wait is over, but before, C code writes to this pipe.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer)
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, lambda *_: None)

  def listen():
    urgent = 0
    while True:
      number, = os.read(reader, 1)
      urgent += number in (signal.SIGTERM, signal.SIGINT)
      then = "now" if urgent == 2 else Stop.then
      log(f"{signal.Signals(number).name}: stopping {then}", everywhere=True)
      if then == "now":
        os._exit(128 + number)
      Stop.number = Stop.number or number

  threading.Thread(target=listen, daemon=True).start()


def duration(seconds):
  return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class RunLog:
  """Lines on the screen; as JSON in log.jsonl and for TensorBoard, in the workdir."""

  def __init__(self, workdir, done, total_steps, batch_size, num_examples):
    self.total_steps, self.batch_size, self.num_examples = total_steps, batch_size, num_examples
    self.started, self.last_step, self.waited = None, None, 0.0
    if jax.process_index() == 0:
      path = os.path.join(workdir, "log.jsonl")
      self.events, self.lines = tf.summary.create_file_writer(workdir), tf.io.gfile.GFile(path, "a")
      if tf.io.gfile.exists(path) and tf.io.gfile.GFile(path).read()[-1:] not in "\n":
        self.lines.write("\n")  # behind half a line, of a disk that was full
    if done >= total_steps:
      log("This run is already finished.")
    elif past := done * batch_size % num_examples:
      log(f"Reading past {past:,} images of this epoch ...")

  def next_batch(self, batches):
    """The next batch; measures the wait for it."""
    asked = time.perf_counter()
    batch = next(batches)
    now = time.perf_counter()
    self.waited += now - asked
    if not self.started:
      log("Compiling the step ...")
      self.started = now
    return batch

  def log_step(self, step, metrics, log_every):
    """Waits for a step; logs the first, the last, each log_every-th, and one after 30 silent s.
    UserError: its metrics are not finite."""
    metrics = {name: value.item() for name, value in metrics.items()}
    require(np.isfinite([*metrics.values()]).all(),
            f"not finite at step {step}: {metrics}; try a lower --lr or more --warmup_steps")
    took, first = time.perf_counter() - self.started, self.last_step is None
    if step % log_every and step < self.total_steps and took < 30 and not first:
      return
    line = {"epoch": step * self.batch_size / self.num_examples} | metrics
    text = ("step {}/{}  epoch {epoch:.2f}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            "grad {grad_norm:.3f}".format(step, self.total_steps, **line))
    if first:
      text += f"  compiled and done after {took:.1f} s"
    else:
      rate, waited = (step - self.last_step) * self.batch_size / took, self.waited / took
      left = duration((self.total_steps - step) * self.batch_size / rate)
      text += (f"  {rate:.{0 if rate > 10 else 1}f} images/s  waiting for data {waited:.0%}"
               f"  {left} left")
      line |= {"images_per_second": rate, "data_wait": waited}
    log(text)
    self.write(step, line)

  def write(self, step, numbers):
    """Writes {name: number} to log.jsonl and for TensorBoard; measures speed from here on."""
    self.last_step, self.started, self.waited = step, time.perf_counter(), 0.0
    if jax.process_index() == 0:
      self.lines.write(json.dumps({"step": step} | numbers) + "\n")
      self.lines.flush()
      with self.events.as_default(step):
        for name, value in numbers.items():
          tf.summary.scalar(name, value)
      self.events.flush()


def lock_workdir(workdir):
  """Makes a local workdir and locks it, as long as the returned file is open.
  UserError: another run has locked it. OSError: it cannot be made."""
  if "://" in workdir:  # made with its files
    return None
  os.makedirs(workdir, exist_ok=True)
  lock = open(f"{workdir}/lock", "w")
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise UserError(f"another run uses --workdir={workdir}; give this one its own")
  except OSError:  # a disk that knows no locks
    pass
  return lock


def checkpoint_path(workdir, step):
  return os.path.join(workdir, f"checkpoint_{step:08}.npz")


def checkpoints(workdir):
  """The checkpoints in a workdir, oldest first."""
  names = sorted(tf.io.gfile.listdir(workdir)) if tf.io.gfile.isdir(workdir) else ()
  return [os.path.join(workdir, x) for x in names if re.fullmatch(r"checkpoint_\d{8}\.npz", x)]


def save_checkpoint(workdir, state, config, recipe, before):
  """Gathers a state on all processes; the first one returns a Future of writing it, others None.
  Waits for the Future `before`, of the last checkpoint, which raises what went wrong."""
  state = jax.tree.map(np.array, multihost_utils.process_allgather(state, tiled=True))
  path, temporary = checkpoint_path(workdir, state["step"]), os.path.join(workdir, "checkpoint.tmp")

  def write():
    buffer = io.BytesIO()
    np.savez(buffer, **model.flatten(state), label_names=recipe["label_names"],
             config=json.dumps(config._asdict()), recipe=json.dumps(recipe))
    with tf.io.gfile.GFile(temporary, "wb") as f:
      f.write(buffer.getvalue())
    if "://" not in workdir:  # on the disk before it has its name
      with open(temporary) as f:
        os.fsync(f)
    tf.io.gfile.rename(temporary, path, overwrite=True)
    for old in [old for old in checkpoints(workdir) if old <= path][:-2]:  # it and one are kept
      tf.io.gfile.remove(old)

  if before:
    before.result()
  return WRITER.submit(write) if jax.process_index() == 0 else None


def restore_checkpoint(workdir, state, recipe, defaults, allow_changes=False):
  """The newest state in a workdir, or `state` if there is none. Its recipe must be `recipe`, {name:
  value}; what it lacks counts at its default, or is not compared if it has none.
  UserError: damaged, misnamed, another recipe, arrays of other shapes."""
  if not checkpoints(workdir):
    return state
  path = checkpoints(workdir)[-1]
  try:
    arrays = model.read_npz(path)
    stored, step = json.loads(arrays["recipe"].item()), int(arrays["step"])
  except (model.DamagedError, LookupError, TypeError, json.JSONDecodeError):
    raise UserError(f"{path} is damaged; delete it to go on from the one before")
  require(path == checkpoint_path(workdir, step), f"{path} holds step {step}: rename or delete it")
  recipe = json.loads(json.dumps(recipe))  # tuples are lists there
  if unsaid := sorted(recipe.keys() - stored.keys() - defaults.keys()):
    log(f"{path} does not say its {', '.join(unsaid)}: not compared.")
  before = {name: defaults.get(name, value) for name, value in recipe.items()} | stored
  now = dict.fromkeys(stored, "unknown") | recipe
  changes = [f"{name}={before[name]!s:.200} (now {now[name]!s:.200})"
             for name in now if now[name] != before[name]]
  require(allow_changes or not changes, f"{path} has {'; '.join(changes)}; give the same, "
          "another --workdir or --allow_changes")
  for name, x in model.flatten(state).items():
    require(name in arrays and arrays[name].shape == x.shape,
            f"{path} has no {name} of shape {x.shape}; give another --workdir")
  log(f"Resuming after step {step} from {path}.")
  return jax.tree.unflatten(jax.tree.structure(state), map(arrays.get, model.flatten(state)))


def run(argv):
  """`main`, with a line instead of a traceback for what the user can mend."""
  logging.set_verbosity(logging.WARNING)  # TFDS and JAX have much to say
  try:
    require(not argv[1:], f"{argv[1:]}: expected flags only, such as --epochs=90")
    for name, value in flag_values().items():
      require(str(value) not in ("", "[]", "nan", "inf"),
              f"--{name}={value}: expected a (finite) value")
      if isinstance(value, str):  # after "=", no shell does it
        FLAGS[name].value = os.path.expanduser(value)
    return main(argv)
  except Exception as error:
    together = jax.distributed.is_initialized()
    text = " ".join(re.sub("{{.*?}} ?", "", str(error)).split())
    if isinstance(error, (OSError, tf.errors.OpError)):  # of files and disks
      text += ". Mend this and start again"
    elif "RESOURCE_EXHAUSTED" in text:
      text = f"{text:.200}; give a larger --grad_accum or a smaller --batch_size"
    elif isinstance(error, jax.errors.JaxRuntimeError) and together:
      text += ". If another process was lost, start all again"
    elif not isinstance(error, (UserError, model.WeightsError, inputs.DatasetError)):
      traceback.print_exc()
  if not together:
    sys.exit(f"Error: {text}")
  print(f"Error: {text}", file=sys.stderr, flush=True)
  time.sleep(1)  # as process 0 serves the others, who have their say, too
  os._exit(1)  # a regular exit waits for the others, who may wait for this one


if __name__ == "__main__":
  sys.stdout.reconfigure(errors="backslashreplace")  # what a screen cannot show ends no run
  app.run(run)
