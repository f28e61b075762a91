"""Trains and evaluates the plain ViT of "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580).

    python train.py                                             # the report's first row: ViT-S/16, 90 epochs of ImageNet
    python train.py --dataset=patterns ...                      # the demo; README.md has the whole line
    python train.py --eval_only --init=vit_s16_i1k_90ep.npz     # evaluates published or own weights
    python train.py --predict=a.jpg,b.png --init=FILE.npz       # names what is in pictures
    python train.py --benchmark                                 # the update step's speed

The default of every flag is the published run. `main` is the method section: data, parameters, optimiser, step, loop.
What it calls are functions of this file, to be imported by tests and forks.

Shapes: B batch, I image side, C classes.
"""

import collections
from concurrent import futures
import functools
import json
import math
import os
import signal
import statistics
import sys
import time
import types
import zipfile
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only reads data here; spare the reader its greetings

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
flags.DEFINE_float("epochs", 90, "Passes over the training split: 90, 150 or 300 in the report.")
flags.DEFINE_integer("batch_size", 1024, "Images per step, over all devices and processes.")
flags.DEFINE_string("dataset", "imagenet2012", "TFDS name, patterns (the demo), or the path of a folder split/class/image.jpg.")
flags.DEFINE_string("train_split", "train[:99%]", "What to train on; the last percent of ImageNet's is 'minival'.")
flags.DEFINE_string("variant", "S/16", "Model size and patch size: mu, Ti, S, M, B, L or H (or demo) / pixels.")
flags.DEFINE_integer("image_size", 224, "Side of the images in pixels.")
flags.DEFINE_enum("posemb", "sincos2d", ["sincos2d", "learned"], "Position embedding.")
flags.DEFINE_enum("pool", "gap", ["gap", "cls"], "Classify the mean of all tokens, or a [cls] token.")
flags.DEFINE_enum("head", "mlp", ["mlp", "linear"], "Classifier: one hidden tanh layer, or none.")
flags.DEFINE_integer("randaug_layers", 2, "Operations of RandAugment on each image; 0 turns it off.", 0)
flags.DEFINE_float("randaug_magnitude", 10, "Magnitude of RandAugment's operations.", 0, 20)
flags.DEFINE_float("mixup", 0.2, "p of Mixup's Beta(p, p); 0 turns it off.", 0, 1e3)
flags.DEFINE_float("lr", 1e-3, "Peak learning rate.", 0, 1e9)
flags.DEFINE_float("weight_decay", 1e-4, "Decay of kernels per step at the peak; not multiplied by --lr.", 0, 1e9)
flags.DEFINE_integer("warmup_steps", 10_000, "Steps of linear warm-up; 0 turns it off.", 0)
flags.DEFINE_float("grad_clip_norm", 1.0, "Largest global norm of the gradients; 0 turns clipping off.", 0, 1e9)
flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "What matrix products read; they accumulate in float32.")
flags.DEFINE_integer("seed", 0, "Of the initial parameters, the order of the data and the augmentations.", 0)
flags.DEFINE_string("init", None, "Start from the weights in this .npz: published ones or a checkpoint of ours.")

# The run
flags.DEFINE_string("workdir", "workdir", "Checkpoints, TensorBoard events and eval.json go here; the same command resumes.")
flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets (default: TFDS' own, ~/tensorflow_datasets).")
flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1)
flags.DEFINE_integer("eval_every", 2500, "Steps between evaluations.", 1)
flags.DEFINE_integer("checkpoint_every", 1000, "Steps between checkpoints; the last two are kept.", 1)
flags.DEFINE_integer("keep_every", 0, "Keep the checkpoints of multiples of this many steps; 0 keeps none.", 0)
flags.DEFINE_list("eval", ["minival", "val"], "What to evaluate: minival, val, real, v2, or splits of --dataset.")
flags.DEFINE_bool("skip_bad_images", False, "Leave out records that cannot be used, rather than stop.")
flags.DEFINE_bool("allow_changes", False, "Resume although flags of the recipe have changed.")
flags.DEFINE_integer("grad_accum", 1, "Take the gradients of a batch in this many parts, to save memory.", 1)
flags.DEFINE_bool("remat", False, "Recompute the blocks in the backward pass, to save memory; not on a CPU.")
flags.DEFINE_string("coordinator", None, "With several processes not found by themselves: host:port of process 0.")
flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is.")

# What to do instead of training
flags.DEFINE_bool("eval_only", False, "Evaluate --init on --eval and stop.")
flags.DEFINE_list("predict", [], "Classify these pictures with --init and stop.")
flags.DEFINE_string("export_timm", None, "Write --init to this .npz for timm and stop.")
flags.DEFINE_bool("benchmark", False, "Measure the update step on random data and stop.")

# The flags that make the experiment: a run resumes only with the same ones.
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
  """Something the user can mend; the message says how, and is all that is printed."""


def log(message):
  """Prints a line, on the first process only."""
  if jax.process_index() == 0:
    print(message, flush=True)


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
  is_kernel = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel")
  return optax.chain(
      optax.clip_by_global_norm(grad_clip_norm) if grad_clip_norm else optax.identity(),
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.bfloat16),  # half the memory of the first moment
      optax.scale(lr),
      # After the learning rate, hence not multiplied by it: 1e-4 here is what 1e-4 / 1e-3 = 0.1 is in other AdamWs.
      optax.add_decayed_weights(weight_decay, mask=is_kernel),
      optax.scale_by_schedule(schedule),
      optax.scale(-1.0))


def make_update(tx, dtype=jnp.bfloat16, grad_accum=1, remat=False):
  """The training step: function(state, batch) -> (state, metrics), to be compiled; the old state is given up.

  state: {"params", "opt_state", "step" int32 []}; batch: {"images" [B, I, I, 3], "labels" [B, C], "signals" [any, 2]}.
  metrics: "loss", "grad_norm" (before clipping) and "param_norm" (after the update) float32 [], and those of `read_signals`.
  """

  def loss_fn(params, images, labels):
    return optax.softmax_cross_entropy(model.forward(params, images, dtype, remat), labels).mean()

  grad_fn = jax.value_and_grad(loss_fn)

  def accumulate(params, *batch):  # the mean over parts of equal size is the mean over the batch
    parts = [x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1) for x in batch]
    add = lambda total, part: (jax.tree.map(jnp.add, total, grad_fn(params, *part)), None)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (jnp.float32(0), params)), parts)
    return jax.tree.map(lambda x: x / grad_accum, total)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch):
    compute = accumulate if grad_accum > 1 else grad_fn
    loss, grads = compute(state["params"], batch["images"], batch["labels"])
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics | read_signals(batch)

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
            "loss": jnp.where(mask, loss, 0).sum()} | read_signals(batch)

  return eval_step


# --- Devices, processes and signals -----------------------------------------------------------------------------------


def start_processes():
  """Joins the other processes: on TPU pods and Slurm JAX finds them, elsewhere the flags name them."""
  if FLAGS.coordinator:
    jax.distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, heartbeat_timeout_seconds=30)
  elif "SLURM_JOB_ID" in os.environ or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    jax.distributed.initialize()


def on_devices(spec):
  """The sharding over one axis of all devices: PartitionSpec("data") splits a batch, PartitionSpec() replicates."""
  return NamedSharding(Mesh(jax.devices(), ("data",)), spec)


def put_replicated(tree):
  """The same arrays on all devices of all processes."""
  sharding = on_devices(PartitionSpec())
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda _: x), jax.device_get(tree))


received_signal = 0


def handle_signal(number, _):
  """SIGTERM and Ctrl-C end the run after a checkpoint; the same one again ends it at once."""
  global received_signal
  received_signal = number
  signal.signal(number, signal.SIG_DFL)
  print(f"\n{signal.Signals(number).name}: saving a checkpoint and stopping; once more to stop at once.", flush=True)


def put_batch(batch):
  """This process's rows -> global arrays, split over all devices.

  What only one process knows travels with its rows, as "signals" [devices, 2]: its bad images and the number of the
  signal it got. So all processes learn of them from the metrics of the same step, and stop after the same one.
  """
  sharding = on_devices(PartitionSpec("data"))
  signals = np.zeros([jax.local_device_count(), 2], np.int32)
  signals[0] = batch["bad"], received_signal
  batch = {"images": batch["images"], "labels": batch["labels"], "signals": signals}
  return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def read_signals(batch):
  """{"bad": how many images, "stop": number of a signal or 0} of all processes."""
  return {"bad": batch["signals"][:, 0].sum(), "stop": batch["signals"][:, 1].max()}


# --- Evaluation -------------------------------------------------------------------------------------------------------


def open_evals(dataset):
  """{name: (builder, split, label feature)} of --eval. What is not prepared is reported and left out.

  Raises:
    UserError: none is left.
  """
  evals = {}
  for name in FLAGS.eval:
    other, split, label = EVALS.get(name, (None, name, "label"))
    try:
      builder = input_pipeline.open_dataset(other, FLAGS.data_dir) if other else dataset
      split = name if name in builder.info.splits else split
      input_pipeline.split_size(builder, split)
      evals[name] = builder, split, label
    except input_pipeline.DatasetError as error:
      log(f"  {name:10} not available: {error}")
  if not evals:
    raise UserError(f"--eval={','.join(FLAGS.eval)}: none of these is available; expected minival, val, real, v2 or "
                     f"splits of --dataset={FLAGS.dataset}: {', '.join(dataset.info.splits)}")
  return evals


def evaluate(params, eval_step, evals, dtype):
  """Evaluates {name: (builder, split, label feature)}; every image counts once, on any number of devices and processes.

  Returns:
    {name: {"count", "top1" and "top5" in percent, "loss", "bad"}}, and the number of a signal that ended it, or 0.
  """
  results = {}
  for name, (builder, split, label) in evals.items():
    sums, last = collections.Counter(), {}
    for batch in input_pipeline.eval_batches(
        builder, split, FLAGS.batch_size, label=label, image_size=FLAGS.image_size, dtype=dtype,
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
    with tf.io.gfile.GFile(os.path.join(FLAGS.workdir, "eval.json"), "w") as f:
      f.write(json.dumps(results, indent=2) + "\n")


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def write_npz(path, arrays):
  """Writes {name: array} so that `path` is always either the old file or the new one, whole."""
  temporary = f"{path}.tmp"
  with tf.io.gfile.GFile(temporary, "wb") as f:
    # GFile has a seek that fails; without one, zipfile writes straight on. bfloat16 is not a type that numpy knows: its
    # bytes are stored, as type V2.
    np.savez(types.SimpleNamespace(read=None, write=lambda x: f.write(x) or len(x), flush=f.flush), **arrays)
  if os.path.exists(temporary):  # on this machine's disk: make sure that it is there before it replaces the old one
    with open(temporary, "rb") as f:
      os.fsync(f.fileno())
  tf.io.gfile.rename(temporary, path, overwrite=True)


def open_npz(path):
  """{name: (shape, dtype, function that reads the array)} of an .npz file, whatever is in it.

  Never unpickles, and reads nothing but headers until asked to, so that a file that declares 100 GB costs nothing.

  Raises:
    UserError: the file is not there, is damaged, or holds something else than arrays of numbers and strings.
  """
  readable = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error,
              tf.errors.OpError, RuntimeError)

  def read(info):
    try:
      with archive.open(info) as f:
        array = np.lib.format.read_array(f, allow_pickle=False)
        f.read(1)  # the end of the file: here the checksum is compared
      return array.view(jnp.bfloat16) if array.dtype == "V2" else array
    except readable as error:
      raise UserError(f"{path} is damaged at {info.filename}: {error}") from None

  entries = {}
  try:
    archive = zipfile.ZipFile(tf.io.gfile.GFile(path, "rb"))
    for info in archive.infolist():
      with archive.open(info) as f:
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = headers[np.lib.format.read_magic(f)](f)
        if dtype.hasobject or info.file_size != f.tell() + math.prod(shape) * dtype.itemsize:
          raise ValueError(f"{info.filename} is not a plain array")
      entries[info.filename.removesuffix(".npy")] = shape, dtype, functools.partial(read, info)
  except readable as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(f"{path} is not a checkpoint that can be read ({reason}); expected an .npz file of arrays") from None
  return entries


def checkpoints(workdir):
  """[(step, path)] of the checkpoints in a workdir, oldest first."""
  paths = tf.io.gfile.glob(os.path.join(workdir, "checkpoint_*.npz"))
  return sorted((int(path.rsplit("_", 1)[1].removesuffix(".npz")), path) for path in paths)


def save_checkpoint(workdir, arrays, keep_every=0):
  """Writes checkpoint_STEP.npz, then deletes all but the last two and the multiples of `keep_every`."""
  write_npz(os.path.join(workdir, f"checkpoint_{arrays['step']:08}.npz"), arrays)
  for step, path in checkpoints(workdir)[:-2]:
    if not keep_every or step % keep_every:
      tf.io.gfile.remove(path)


def restore_checkpoint(workdir, state, recipe, allow_changes=False):
  """The newest state in a workdir, or `state` itself if there is none; a damaged file is named, and the one before used.

  Args:
    workdir: any path that tf.io.gfile handles.
    state: a state with the names, shapes and dtypes to expect.
    recipe: {flag: value} of this run.
    allow_changes: resume although the recipe is not the checkpoint's.

  Raises:
    UserError: there are checkpoints, but none can be read, or the newest is of another recipe.
  """
  found = checkpoints(workdir)[::-1]
  for i, (_, path) in enumerate(found):
    try:
      entries = open_npz(path)
      missing = {"flags", *model.flatten(state)} - set(entries)
      if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing)[:3])}; expected a checkpoint of train.py")
      before = json.loads(read_small(entries, "flags").item())
      changes = [f"--{key}={before.get(key)} (now {value})" for key, value in recipe.items() if before.get(key) != value]
      if changes and not allow_changes:
        raise SystemExit(f"{path} was trained with {', '.join(changes)}. Give the same flags, or another --workdir, or "
                         "--allow_changes to go on with the new ones.")
      arrays = {}
      for name, like in model.flatten(state).items():
        shape, dtype, read = entries[name]
        if shape != like.shape:
          raise UserError(f"{path}: {name} has shape {shape}, expected {like.shape}")
        arrays[name] = read()
      log(f"Resuming after step {int(arrays['step'])} from {path}.")
      return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in model.flatten(state)])
    except UserError as error:
      if i + 1 == len(found):
        raise UserError(f"{error}. No checkpoint in {workdir} can be read; remove them to start again.") from None
      log(f"{error}. Trying the one before.")
  return state


def read_small(entries, name):
  """An array that stands beside the parameters, or None; 16 MB at most."""
  shape, dtype, read = entries.get(name, ((), None, None))
  if read and math.prod(shape) * dtype.itemsize > 2 ** 24:
    raise UserError(f"{name} is larger than anything that belongs there: {shape}")
  return read and read()


# --- Weights: --init, --predict, --export_timm ------------------------------------------------------------------------


def find_params(entries):
  """{name: (shape, dtype, function that reads it)} of the parameters in a file, in any flavour met in the wild."""
  prefix = next((p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in entries)), "")
  found = {}
  for name, (shape, dtype, read) in entries.items():
    if not name.startswith(prefix):
      continue
    name = name.removeprefix(prefix).replace("Transformer/posembed_input/pos_embedding", "pos_embedding")
    stacked = name.removeprefix("Transformer/encoderblock/")
    if stacked == name:
      found[name] = shape, dtype, read
    else:  # all blocks in one array
      for i in range(min(shape[0], 100) if shape else 0):
        found[f"Transformer/encoderblock_{i}/{stacked}"] = shape[1:], dtype, lambda read=read, i=i: read()[i]
  return found


def architecture(found):
  """The flags that describe the parameters of a file: variant, posemb, pool, head; and num_classes."""
  shapes = {name: shape for name, (shape, _, _) in found.items()}
  first = "Transformer/encoderblock_0/"
  try:
    P, _, _, D = shapes["embedding/kernel"]
    sizes = (D, sum(name.endswith("/query/bias") for name in shapes), shapes[first + "MlpBlock_0/Dense_0/bias"][0],
             shapes[first + "MultiHeadDotProductAttention_0/query/bias"][0])
    num_classes, = shapes["head/bias"]
    _, _, _ = shapes.get("pos_embedding", (1, 1, 1))
  except (KeyError, ValueError, IndexError) as error:
    raise UserError(f"no ViT in it: expected embedding/kernel [P, P, 3, D], {first}..., head/bias [C] and, if there is one, "
                    f"pos_embedding [1, L, D] ({error})") from None
  name = next((name for name, known in model.VARIANTS.items() if known == sizes), None)
  if name is None:
    raise UserError(f"width, depth, MLP width and heads are {sizes}, which is no variant of model.VARIANTS")
  return {"variant": f"{name}/{P}", "posemb": "learned" if "pos_embedding" in shapes else "sincos2d",
          "pool": "cls" if "cls" in shapes else "gap", "head": "mlp" if "pre_logits/kernel" in shapes else "linear",
          "num_classes": num_classes}


class Weights:
  """What --init names: parameters in any flavour, and what the file says of them.

  Attributes:
    found: as of `find_params`.
    num_classes: C of its head.
    names: the names of its classes, or None.

  The flags that describe the model are set to what the file holds.
  """

  def __init__(self, path):
    entries = open_npz(path)
    self.path, self.found = path, find_params(entries)
    try:
      described = architecture(self.found)
    except UserError as error:
      raise UserError(f"--init={path}: {error}") from None
    self.num_classes = described.pop("num_classes")
    for name, value in described.items():
      if FLAGS[name].present and FLAGS[name].value != value:
        raise UserError(f"--{name}={FLAGS[name].value} contradicts --init={path}, which holds {name}={value}")
      FLAGS[name].value = value
    names, recipe = read_small(entries, "label_names"), read_small(entries, "flags")
    self.names = names.tolist() if names is not None else None
    if not FLAGS["image_size"].present:
      if recipe is not None:
        FLAGS.image_size = json.loads(recipe.item())["image_size"]
      elif FLAGS.posemb == "learned":
        tokens = self.found["pos_embedding"][0][-2]
        FLAGS.image_size = math.isqrt(tokens) * int(FLAGS.variant.split("/")[1])

  def load(self, num_classes):
    """The parameters, {name: float32 array}, for a model of C classes and --image_size.

    Another number of classes leaves the head out; another image size resamples a learned position embedding.

    Raises:
      UserError: arrays are missing, unknown, misshapen or no numbers; lists them all.
    """
    table = flags_table(num_classes)
    found, wrong = dict(self.found), []
    if num_classes != self.num_classes:
      log(f"--init={self.path} has {self.num_classes} classes, the dataset {num_classes}: starting with a new head.")
      for name in ("head/kernel", "head/bias"):
        table.pop(name), found.pop(name, None)
    wanted = table.get("pos_embedding", ((),))[0]
    if wanted and wanted != found["pos_embedding"][0] and found["pos_embedding"][0][::2] == wanted[::2]:
      log(f"Resampling the position embedding from {found['pos_embedding'][0][1]} to {wanted[1]} tokens.")
      _, dtype, read = found["pos_embedding"]
      found["pos_embedding"] = wanted, dtype, lambda: resample_posemb(read(), wanted[1])
    wrong += [f"{name} missing" for name in table if name not in found]
    wrong += [f"{name} unknown" for name in found if name not in table]
    for name in table.keys() & found.keys():
      shape, dtype, _ = found[name]
      if shape != table[name][0]:
        wrong.append(f"{name} {shape}, expected {table[name][0]}")
      elif not (np.issubdtype(dtype, np.floating) or dtype == "V2"):
        wrong.append(f"{name} {dtype}, expected floats")
    if wrong:
      raise UserError(f"--init={self.path} does not fit: {'; '.join(sorted(wrong))}")
    return {name: found[name][2]().astype(np.float32) for name in table}


def resample_posemb(posemb, tokens):
  """A learned position embedding [1, h*h, D] for another square grid: linear between the points, corners on corners."""
  old, new = math.isqrt(posemb.shape[1]), math.isqrt(tokens)
  grid = posemb.astype(np.float32).reshape(old, old, -1)
  where = np.linspace(0, old - 1, new)
  weights = np.stack([np.interp(where, np.arange(old), row) for row in np.eye(old)], 1)  # [new, old]
  return np.einsum("yh,xw,hwd->yxd", weights, weights, grid).reshape(1, tokens, -1)


def flags_table(num_classes):
  """The parameter table that the flags describe."""
  try:
    return model.parameter_table(FLAGS.variant, FLAGS.image_size, FLAGS.posemb, FLAGS.pool, FLAGS.head, num_classes)
  except ValueError as error:
    raise UserError(f"--{error}") from None


def predict(weights, paths, dtype):
  """Prints the five most probable classes of pictures, and draws where the model looked."""
  params = model.unflatten(weights.load(weights.num_classes))
  names = weights.names or [f"class {i}" for i in range(weights.num_classes)]
  pictures, captions = [], []
  for path in paths:
    try:
      image = input_pipeline.eval_image(tf.io.read_file(path), FLAGS.image_size)
    except tf.errors.OpError as error:
      raise UserError(f"--predict={path}: not a picture that can be read: {error.message.splitlines()[0]}") from None
    images = image.numpy()[None].astype(np.float32) / 127.5 - 1
    probs = np.asarray(jax.nn.softmax(model.forward(params, images, dtype)))[0]
    best = probs.argsort()[::-1][:5]
    log(f"{path}: " + ", ".join(f"{names[c]} {probs[c]:.1%}" for c in best))
    heat = np.asarray(model.attention_map(params, images, dtype))[0, ..., None]
    heat = tf.image.resize(heat / heat.max(), image.shape[:2]).numpy()
    shown = np.stack([image, image.numpy() * (0.2 + 0.8 * heat)])
    pictures += [*np.uint8(tf.image.resize(shown, (224, 224), "nearest"))]
    captions += [f"{names[best[0]]} {probs[best[0]]:.0%}", "attention of the last block"]
  tf.io.gfile.makedirs(FLAGS.workdir)
  out = os.path.join(FLAGS.workdir, "predictions.png")
  augment.draw_grid(out, pictures, captions, columns=2 * min(4, len(paths)))
  log(f"Wrote {out}.")


def export_timm(weights, out):
  """Writes weights so that timm's VisionTransformer.load_pretrained reads them: README.md has the lines."""
  params = weights.load(weights.num_classes)
  if "pos_embedding" not in params:  # timm knows learned ones only
    P, _, _, D = params["embedding/kernel"].shape
    side = FLAGS.image_size // P
    params["pos_embedding"] = model.sincos2d(side, side, D)[None]
  write_npz(out, {f"params/{name}": array for name, array in params.items()})
  log(f"Wrote {out}.")
  if "pre_logits/kernel" in params:
    log("It has an MLP head, of which timm reads the last layer only: copy both layers, as README.md shows.")


# --- Benchmark --------------------------------------------------------------------------------------------------------


def benchmark(rounds=5):
  """Prints the speed of the update step on random data, against the best matrix product of this device."""
  dtype, B = jnp.dtype(FLAGS.dtype), FLAGS.batch_size
  table = flags_table(num_classes=1000)
  started = time.perf_counter()
  params = put_replicated(model.init_params(FLAGS.seed, table))
  tx = make_optimizer(make_schedule(FLAGS.warmup_steps, 10 ** 6), FLAGS.lr, FLAGS.weight_decay, FLAGS.grad_clip_norm)
  state = put_replicated({"params": params, "opt_state": tx.init(params), "step": jnp.int32(0)})
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (B, FLAGS.image_size, FLAGS.image_size, 3)).astype(dtype)
  batch = put_batch({"images": images, "labels": np.eye(1000, dtype=np.float32)[rng.integers(0, 1000, B)], "bad": 0})
  ready = time.perf_counter()
  update = make_update(tx, dtype, FLAGS.grad_accum, FLAGS.remat).lower(state, batch).compile()
  compiled = time.perf_counter()
  state, metrics = update(state, batch)
  jax.block_until_ready(state)
  log(f"Parameters after {ready - started:.1f} s, compiled in {compiled - ready:.1f} s, "
      f"first step {time.perf_counter() - compiled:.1f} s.")

  products = []
  for rows, inner in ((4096, 4096), (3136, 1536)):  # several shapes: the best one counts
    x, w = (put_replicated(rng.standard_normal(s, np.float32).astype(dtype)) for s in ((rows, inner), (inner, inner)))
    products.append((jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)), x, w))
  product_rates, step_times = [], []
  for _ in range(rounds):
    for multiply, x, w in products:
      rate = 2 * x.shape[0] * w.size * jax.device_count()
      times = []
      for _ in range(4):
        started = time.perf_counter()
        multiply(x, w).block_until_ready()
        times.append(time.perf_counter() - started)
      product_rates.append(rate / statistics.median(times))
    steps = 2 if jax.default_backend() == "cpu" else 20
    for i in range(steps + 1):  # the first one, after other work, is not like the steps of a run
      if i == 1:
        jax.block_until_ready((state, metrics))
        started = time.perf_counter()
      state, metrics = update(state, batch)
    jax.block_until_ready((state, metrics))
    step_times.append((time.perf_counter() - started) / steps)
  best = max(statistics.median(product_rates[i::len(products)]) for i in range(len(products)))
  flops = 3 * B * model.flops({name: shape for name, (shape, _) in table.items()}, FLAGS.image_size)
  step_time = statistics.median(step_times)
  memory = update.memory_analysis()
  log(f"{FLAGS.variant} at {FLAGS.image_size}, {FLAGS.dtype}, batch {B} on {jax.device_count()} x "
      f"{jax.devices()[0].device_kind}: {B / step_time:.2f} images/s, {flops / step_time / 1e9:,.0f} GFLOP/s, "
      f"{flops / step_time / best:.2f} of the best matrix product's {best / 1e9:,.0f} GFLOP/s; "
      f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30:.1f} GiB per device.")


# --- Training ---------------------------------------------------------------------------------------------------------


def check_run():
  """Raises UserError for what can be known to be wrong before any work."""
  for name in ("epochs", "lr", "weight_decay", "grad_clip_norm", "mixup", "randaug_magnitude"):
    if not math.isfinite(FLAGS[name].value):
      raise UserError(f"--{name}={FLAGS[name].value}: expected a finite number")
  if FLAGS.batch_size < 1 or FLAGS.batch_size % (jax.device_count() * FLAGS.grad_accum):
    raise UserError(f"--batch_size={FLAGS.batch_size}: expected a multiple of {jax.device_count()} devices times "
                    f"--grad_accum={FLAGS.grad_accum}")
  probe = os.path.join(FLAGS.workdir, f"writable_{jax.process_index()}")
  try:
    tf.io.gfile.makedirs(FLAGS.workdir)
    write_npz(probe, {})
    tf.io.gfile.remove(probe)
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f"--workdir={FLAGS.workdir} cannot be written: {error}") from None


def check_schedule(total_steps):
  """Raises UserError unless the warm-up is shorter than the run."""
  if total_steps <= FLAGS.warmup_steps:
    raise UserError(f"--warmup_steps={FLAGS.warmup_steps} is not shorter than the run of {total_steps} steps: pass "
                    f"--warmup_steps={total_steps // 10} or more --epochs")


class Journal:
  """The log of a run: a line every --log_every steps, and TensorBoard events in the workdir, on the first process."""

  def __init__(self, total_steps, num_examples, schedule):
    self.total_steps, self.num_examples, self.schedule = total_steps, num_examples, schedule
    self.writer = tf.summary.create_file_writer(FLAGS.workdir) if jax.process_index() == 0 else None
    self.bad = 0
    self.restart(None)

  def restart(self, step):
    """Measures speed from here on; None: from the next step, after compilation."""
    self.since, self.started, self.waited = step, time.perf_counter(), 0.0

  def wait_for(self, batches):
    """The next batch; takes the time."""
    started = time.perf_counter()
    batch = next(batches)
    self.waited += time.perf_counter() - started
    return batch

  def report(self, step, metrics):
    """Waits for a step; logs it if it is time to. Returns the number of a signal that some process got, or 0.

    Raises:
      UserError: the loss, the gradients or the new parameters are not finite.
    """
    loss, grad_norm, param_norm = (metrics[key].item() for key in ("loss", "grad_norm", "param_norm"))  # waits for the device
    if not all(map(math.isfinite, (loss, grad_norm, param_norm))):
      raise UserError(f"not finite at step {step}: loss {loss}, norm of the gradients {grad_norm}, of the parameters "
                      f"{param_norm}. The last checkpoint in {FLAGS.workdir} is from before; try a lower --lr or a longer "
                      "--warmup_steps")
    self.bad += metrics["bad"].item()
    if step % FLAGS.log_every == 0 or step == self.total_steps:
      elapsed, steps = time.perf_counter() - self.started, step - (self.since or step)
      scalars = {
          "epoch": step * FLAGS.batch_size / self.num_examples, "loss": loss,
          "learning_rate": FLAGS.lr * float(self.schedule(step - 1)), "grad_norm": grad_norm, "param_norm": param_norm,
          "images_per_second": steps * FLAGS.batch_size / elapsed, "data_wait": self.waited / elapsed, "bad_images": self.bad}
      left = (self.total_steps - step) * elapsed / steps if steps else math.nan
      log("step {step}/{total}  epoch {epoch:.2f}  loss {loss:.4f}  lr {learning_rate:.2e}  grad {grad_norm:.3f}  "
          "{images_per_second:.0f} images/s  waiting for data {data_wait:.0%}  {left} left".format(
              step=step, total=self.total_steps, left=_duration(left), **scalars)
          + f"  {self.bad} bad images left out" * bool(self.bad))
      self.events(step, scalars)
      self.restart(step)
    elif self.since is None:
      self.restart(step)
    return metrics["stop"].item()

  def events(self, step, scalars, images=None):
    """Writes TensorBoard events."""
    if self.writer:
      with self.writer.as_default(step):
        for name, value in scalars.items():
          tf.summary.scalar(name, value)
        if images is not None:
          tf.summary.image("first_batch", images[:16].astype(np.float32) / 2 + 0.5, max_outputs=16)
      self.writer.flush()

  def results(self, step, results):
    """Logs an evaluation."""
    log(f"Evaluation at step {step}:")
    show(results)
    self.events(step, {f"{name}/{key}": value for name, result in results.items() for key, value in result.items()})
    self.restart(step)


def _duration(seconds):
  if not math.isfinite(seconds):
    return "?"
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


class Saver:
  """Writes checkpoints in the background, one at a time, on the first process."""

  def __init__(self, extra):
    self.extra, self.pool, self.writing = extra, futures.ThreadPoolExecutor(1), None

  def save(self, state):
    """Copies the state off the device, and leaves the rest to the background."""
    self.wait()
    if jax.process_index() == 0:
      arrays = {name: np.array(x) for name, x in model.flatten(state).items()}  # a copy: the next step reuses the state
      self.writing = self.pool.submit(save_checkpoint, FLAGS.workdir, arrays | self.extra, FLAGS.keep_every)

  def wait(self, last=False):
    """Waits until everything is written. A full disk is no reason to stop, unless there is no next checkpoint."""
    try:
      self.writing and self.writing.result()
    except (OSError, tf.errors.OpError) as error:
      message = f"A checkpoint could not be written to {FLAGS.workdir} ({error}); the one before is kept"
      if last:
        raise UserError(message) from None
      log(f"{message}, training goes on.")
    self.writing = None


def main(_):
  logging.set_verbosity(logging.WARNING)  # TFDS and JAX have much to say
  start_processes()
  dtype, index, count = jnp.dtype(FLAGS.dtype), jax.process_index(), jax.process_count()
  if FLAGS.benchmark:
    return benchmark()
  weights = Weights(FLAGS.init) if FLAGS.init else None  # sets the flags of the model to what the file holds
  if FLAGS.eval_only or FLAGS.predict or FLAGS.export_timm:
    return use(weights, dtype)

  # Data
  recipe = {name: FLAGS[name].value for name in RECIPE}
  dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir)
  label = dataset.info.features["label"]
  num_examples = input_pipeline.split_size(dataset, FLAGS.train_split)
  check_run()
  total_steps = round(FLAGS.epochs * num_examples / FLAGS.batch_size)
  check_schedule(total_steps)
  evals = open_evals(dataset)
  batches = functools.partial(
      input_pipeline.train_batches, dataset, FLAGS.train_split, FLAGS.batch_size, image_size=FLAGS.image_size,
      randaug_layers=FLAGS.randaug_layers, randaug_magnitude=FLAGS.randaug_magnitude, mixup_p=FLAGS.mixup, dtype=dtype,
      seed=FLAGS.seed, process_index=index, process_count=count, skip_bad_images=FLAGS.skip_bad_images)

  # Parameters
  params = model.init_params(FLAGS.seed, flags_table(label.num_classes))
  if weights:
    params = model.unflatten(model.flatten(params) | weights.load(label.num_classes))

  # Optimiser
  schedule = make_schedule(FLAGS.warmup_steps, total_steps)
  tx = make_optimizer(schedule, FLAGS.lr, FLAGS.weight_decay, FLAGS.grad_clip_norm)
  state = {"params": params, "opt_state": tx.init(params), "step": np.int32(0)}
  state = put_replicated(restore_checkpoint(FLAGS.workdir, jax.device_get(state), recipe, FLAGS.allow_changes))
  step = int(state["step"])
  multihost_utils.assert_equal(np.int32(step), "The processes do not see the same checkpoints: --workdir must be shared.")

  # Step
  update, eval_step = make_update(tx, dtype, FLAGS.grad_accum, FLAGS.remat), make_eval_step(dtype)
  log(f"{FLAGS.variant} with {sum(x.size for x in jax.tree.leaves(params)):,} parameters on {jax.device_count()} x "
      f"{jax.devices()[0].device_kind}: {total_steps:,} steps of {FLAGS.batch_size}, {num_examples:,} images an epoch.")

  # Loop
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle_signal)
  journal, saver = Journal(total_steps, num_examples, schedule), Saver({
      "label_names": np.array(label.names), "flags": np.array(json.dumps(recipe))})
  batches, pending, stop = batches(start_step=step), collections.deque(), 0
  while step < total_steps and not stop:
    batch = journal.wait_for(batches)
    if step == 0:
      journal.events(step, {}, batch["images"])
    state, metrics = update(state, put_batch(batch))
    step += 1
    pending.append((step, metrics))
    evaluates, saves = step % FLAGS.eval_every == 0, step % FLAGS.checkpoint_every == 0
    # The device works on this step while the host reads the metrics of the one before.
    while len(pending) > (0 if evaluates or saves or stop or step == total_steps else 1):
      stop = journal.report(*pending.popleft()) or stop
    if saves or stop or step == total_steps:
      saver.save(state)
    if evaluates and not stop and step < total_steps:
      results, stop = evaluate(state["params"], eval_step, evals, dtype)
      if not stop:
        journal.results(step, results)
      elif not saves:
        saver.save(state)
  if not stop:
    results, stop = evaluate(state["params"], eval_step, evals, dtype)
    if not stop:  # else the results are of a part only
      journal.results(step, results)
  saver.wait(last=True)
  if stop:
    log(f"Stopped after step {step}; the same command goes on from there.")
    sys.exit(128 + stop)


def use(weights, dtype):
  """Evaluates, classifies or exports the weights of --init."""
  if weights is None:
    raise UserError("--eval_only, --predict and --export_timm need --init=FILE.npz")
  if FLAGS.predict:
    predict(weights, FLAGS.predict, dtype)
  if FLAGS.export_timm:
    export_timm(weights, FLAGS.export_timm)
  if FLAGS.eval_only:
    dataset = input_pipeline.open_dataset(FLAGS.dataset, FLAGS.data_dir)
    check_run()
    num_classes = dataset.info.features["label"].num_classes
    if weights.num_classes != num_classes:
      raise UserError(f"--init={FLAGS.init} has {weights.num_classes} classes, --dataset={FLAGS.dataset} {num_classes}")
    params = put_replicated(model.unflatten(weights.load(num_classes)))
    results, _ = evaluate(params, make_eval_step(dtype), open_evals(dataset), dtype)
    show(results)


def run(argv):
  """`main`, with a line instead of a traceback for what the user can mend."""
  try:
    return main(argv)
  except (UserError, input_pipeline.DatasetError, input_pipeline.BadImage) as error:
    message = f"Error: {error}"
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    message = (f"Error: another process of this run was lost ({str(error).splitlines()[0]}). Start all of them again with "
               "the same commands to go on from the last checkpoint.")
  if jax.process_count() > 1:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)  # a regular exit would wait for the others, which wait for this one
  sys.exit(message)


if __name__ == "__main__":
  app.run(run)
