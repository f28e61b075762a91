"""Which records are read, in which order, and batches of them, for arXiv 2205.01580.

What happens to an image stands in augment.py; `train_batches` and `eval_batches` take it as a
function. Each process streams its own share of the records, epoch after epoch. Batch k of b rows
holds the places k*b to k*b + b - 1 of that stream, and all that is random is a function of the
run's seed and of the place: a run can start at any step, and threads change nothing.

A `dataset` is a TFDS builder or a `Folder`, of `open_dataset`.

Shapes: B batch, b this process's share of it, I image side, C classes; [] is a number.
"""

import contextlib
import functools
import itertools
import os
import random
import types

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import augment

for _kind in ("GPU", "TPU"):  # TensorFlow must not take an accelerator's memory
  tf.config.set_visible_devices([], _kind)

THREADS = os.cpu_count() + 2


class DatasetError(ValueError):
  """A data set, a split or a record that cannot be used."""


# --- Batches ---


def train_batches(dataset, split, batch_size, train_image=augment.train_image, *, start_step=0,
                  mixup_p=0.2, dtype="bfloat16", seed=0, process_index=0, process_count=1):
  """The endless training batches from a step on: an iterator over dicts of numpy arrays.

  Args:
    split: "train[:99%]" in the report.
    batch_size: B, a multiple of process_count.
    train_image: function(encoded image, seed) -> uint8 [I, I, 3].
    mixup_p: 0 leaves Mixup out. Each process mixes its own rows, all in one proportion.

  Yields:
    images [b, I, I, 3] of the dtype in [-1, 1], labels float32 [b, C].

  Raises:
    DatasetError: the split is unknown or too small; later, a record or file cannot be read.
  """
  size, rows = split_size(dataset, split), batch_size // process_count
  if size < process_count or mixup_p and rows == 1 < process_count:
    raise DatasetError(f"{process_count} processes are too many for {size} examples in batches of "
                       f"{batch_size}: each needs an example and, unless --mixup=0, two rows")
  read, num_classes = record_reader(dataset), len(class_names(dataset))
  # A fork whose loss takes sets of labels can delete this.
  if not isinstance(dataset.info.features["label"], tfds.features.ClassLabel):
    raise DatasetError(f"{dataset.name}: its label is a set, and the loss needs exactly one")

  def example(place, record):
    image_bytes, label = read(record)
    index = place * process_count + process_index  # no two processes draw the same
    return {"images": train_image(image_bytes, (seed, index)),
            "labels": label_vector(label, num_classes)}

  def finish(step, batch):
    images, labels = batch["images"], batch["labels"]
    if not mixup_p:
      return {"images": tf.cast(augment.scale(images), dtype), "labels": labels}
    mixup_seed = augment.seed_for("mixup", (seed, step))  # the same in all processes
    images, labels = augment.mixup(images, labels, mixup_seed, mixup_p, dtype)
    return {"images": images, "labels": labels}

  records_from = functools.partial(shuffled_records, dataset, split, seed,
                                   process_index=process_index, process_count=process_count)
  return _batches(records_from, example, finish, rows, start_step)


def eval_batches(dataset, split, batch_size, eval_image=augment.eval_image, *, label="label",
                 dtype="bfloat16", process_index=0, process_count=1):
  """Every example of a split once, over all processes, in the same number of batches on each.

  Args:
    eval_image: function(encoded image) -> uint8 [I, I, 3].
    label: the feature that holds the label, or the set of right labels ("real_label").

  Yields: as `train_batches`, but labels are 1 for each right answer, and mask, bool [b], is False
    where a row only fills up.
  """
  rows, num_classes = batch_size // process_count, len(class_names(dataset, label))
  read, largest = record_reader(dataset, label), -(-split_size(dataset, split) // process_count)

  def example(_, record):
    image_bytes, labels = read(record)
    return {"images": eval_image(image_bytes), "labels": label_vector(labels, num_classes),
            "mask": True}

  def finish(_, batch):
    return batch | {"images": tf.cast(augment.scale(batch["images"]), dtype)}

  records = read_records(dataset, share(dataset, split, process_index, process_count))
  return _batches(records.skip, example, finish, rows, 0, -(-largest // rows))


def label_vector(label, num_classes):
  """A label [] or a set of labels [any] -> float32 [C], 1 at each; one that is no class fails."""
  labels = tf.gather(tf.range(num_classes), tf.reshape(label, [-1]))
  return tf.minimum(tf.reduce_sum(tf.one_hot(labels, num_classes), 0), 1)


def _batches(records_from, example, finish, rows, start_step, steps=-1):
  """Batches, as dicts of numpy arrays, of the Datasets records_from(place in a stream).

  example(place, record) and finish(step, batch) return dicts of tensors; a bad record is an error.
  steps: how many, filled up by zeros where there are no more records; -1: all.
  """
  numbered = lambda step: records_from(step * rows).enumerate(step * rows)
  ds = numbered(start_step).map(example, num_parallel_calls=THREADS)
  zeros = tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), ds.element_spec)
  ds = ds.concatenate(tf.data.Dataset.from_tensors(zeros).repeat())
  ds = ds.batch(rows, num_parallel_calls=2).enumerate(start_step).take(steps)
  ds = ds.map(finish, num_parallel_calls=2).prefetch(2)
  options = tf.data.Options()
  options.autotune.enabled = False  # with it on, a process ends seconds after its work
  batches = ds.with_options(options).as_numpy_iterator()
  for step in itertools.count(start_step):
    try:
      batch = next(batches, None)
    except tf.errors.OpError as error:
      raise _named(error, numbered(step).take(rows), example) from None
    if batch is None:
      return
    yield batch


def _named(error, records, example):
  """The DatasetError for an error of TensorFlow, which names the first bad record."""
  name = "in the files of the data set"
  try:
    for place, record in records:
      # The path of an image, or of a file of TFDS and the number in it.
      name = record["path"].numpy().decode("utf-8", "backslashreplace")
      name += f"#{record['number'].numpy()}" if "number" in record else ""
      example(place, record)
  except tf.errors.OpError as found:
    error = found
  reason = error.message.split("}} ")[-1].split(" [Op")[0].splitlines()[0]
  return DatasetError(f"bad record {name}: {reason}; mend or remove it")


# --- Records and their order ---

# The order of records; raise it when that changes: no run resumes in another one.
ORDER = 1


def shuffled_records(dataset, split, seed, start=0, process_index=0, process_count=1):
  """The endless stream of a process's share, from its start-th record on.

  Every epoch shuffles its files, and windows of records, of which the next one is read ahead.
  Unlike a shuffle buffer, a window is a function of its number.
  """
  window = window_size(dataset, split)
  split = share(dataset, split, process_index, process_count)
  size = split_size(dataset, split)

  def own_seed(stream, number):  # no two processes draw the same
    return augment.seed_for(stream, (seed, number * process_count + process_index))

  @tf.autograph.experimental.do_not_convert  # TFDS warns that it cannot be
  def shuffled_windows(epoch):
    windows = read_records(dataset, split, own_seed("files", epoch)).batch(window)
    def shuffle(number, records):
      number += epoch * (size // window + 1)  # counted through all epochs
      order = tf.random.experimental.stateless_shuffle(
          tf.range(tf.size(records["path"])), own_seed("windows", number), alg="philox")
      return {key: tf.gather(value, order) for key, value in records.items()}
    return windows.enumerate().map(shuffle)

  epochs = tf.data.Dataset.range(start // size, tf.int64.max)
  return epochs.flat_map(shuffled_windows).prefetch(1).unbatch().skip(start % size)


def window_size(dataset, split):
  """How many records are shuffled at a time: 4,096, or as many as are 512 MiB."""
  parts = [dataset.info.splits[name] for name, _ in _ranges(dataset, split)]
  mean = sum(part.num_bytes or 0 for part in parts) / sum(part.num_examples for part in parts)
  return max(1, min(4096, int(2 ** 29 // max(mean, 1))))


def share(dataset, split, i, n):
  """The split that process i of n reads: of N records, N*i // n to N*(i + 1) // n; maybe none."""
  size, before, parts = split_size(dataset, split), 0, []
  for name, numbers in _ranges(dataset, split):
    start, stop = (max(size * place // n - before, 0) for place in (i, i + 1))
    part = numbers[start:stop]
    parts.append(f"{name}[{part.start}:{part.stop}]")
    before += len(numbers)
  return "+".join(parts)


def split_size(dataset, split):
  """The number of examples of a split such as "train[:99%]"; DatasetError if there are none."""
  size = sum(len(numbers) for _, numbers in _ranges(dataset, split))
  if not size:
    raise DatasetError(f"{dataset.name} has nothing in {split!r}, only {[*dataset.info.splits]}: "
                       "see --train_split and --eval")
  return size


def _ranges(dataset, split):
  """[(name, range of numbers)] of the parts of a split; [] if it is unknown."""
  splits = dataset.info.splits
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    return [(p.splitname, range(splits[p.splitname].num_examples)[p.from_:p.to]) for p in parts]
  except (ValueError, KeyError, AssertionError, AttributeError, RuntimeError):
    return []


def read_records(dataset, split, seed=None):
  """Every record of a split once, as it is stored, for `record_reader`.

  seed: [2], for a random order of TFDS' files; folders have a fixed one.
  """
  if isinstance(dataset, Folder):
    return tf.data.Dataset.from_tensor_slices({
        key: tf.concat([dataset.files[name][key][numbers.start:numbers.stop]
                        for name, numbers in _ranges(dataset, split)], 0)
        for key in ("path", "label")})

  def read_file(path, skip, take):
    examples = tf.data.TFRecordDataset(path, buffer_size=1 << 20).skip(skip).take(take)
    paths = tf.data.Dataset.from_tensors(path).repeat()
    numbers = tf.data.Dataset.range(skip, tf.int64.max)
    return tf.data.Dataset.zip({"example": examples, "path": paths, "number": numbers})

  files = [(f.filename, f.skip, f.take) for f in dataset.info.splits[split].file_instructions]
  files = files or [("", 0, 0)]  # an empty split
  order = tf.range(len(files))
  if seed is not None:
    order = tf.random.experimental.stateless_shuffle(order, seed, alg="philox")
  ds = tf.data.Dataset.from_tensor_slices(
      tuple(tf.gather(np.array(column), order) for column in zip(*files)))
  return ds.interleave(read_file, cycle_length=16, block_length=16, num_parallel_calls=16)


def record_reader(dataset, label="label"):
  """function(record of `read_records`) -> encoded image, and its label, int64 [] or [any]."""
  if isinstance(dataset, Folder):
    return lambda record: (tf.io.read_file(record["path"]), record["label"])
  features = tfds.features.FeaturesDict({
      name: dataset.info.features[name] for name in ("image", label)})
  def read(record):
    example = features.deserialize_example(
        record["example"], decoders={"image": tfds.decode.SkipDecoding()})
    return example["image"], example[label]
  return read


# --- Data sets ---


def open_dataset(name, data_dir=None, prepare=True):
  """The builder of a TFDS name or of the built-in `patterns`, or a `Folder`.

  Args:
    name: a TFDS name, "patterns", or the path of a folder (with at least one "/").
    data_dir: where TFDS keeps data sets; None is its default, ~/tensorflow_datasets.
    prepare: whether TFDS may prepare what is not there: it downloads, or, for ImageNet, reads
      archives in data_dir/downloads/manual.

  Raises:
    DatasetError: there is no such data set, or it cannot be read or prepared.
  """
  make = Patterns if name == "patterns" else functools.partial(tfds.builder, name)
  try:
    if "/" in name and tf.io.gfile.isdir(name):
      return Folder(name)
    builder = make(data_dir=data_dir)
    if not builder.info.splits and prepare:
      print(f"Preparing {name} in {builder.data_dir} ...", flush=True)
      try:
        with contextlib.redirect_stdout(None):  # TFDS prints unknown sizes
          builder.download_and_prepare()
      except Exception:  # no error if another process has prepared it
        builder = make(data_dir=data_dir)
        if not builder.info.splits:
          raise
    if not builder.info.splits:
      raise ValueError("one process must prepare it for all: python -c \"import input_pipeline; "
                       f"input_pipeline.open_dataset({name!r}, {data_dir!r})\"")
  except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, OSError,
          tf.errors.OpError) as error:
    hint = f"; did you mean ./{name} ?" if "/" not in name and tf.io.gfile.isdir(name) else ""
    raise DatasetError(f"--dataset={name} --data_dir={data_dir}: {error!s:.300}; expected a name "
                       f"in TFDS, patterns, or a path of SPLIT/CLASS/IMAGE.jpg{hint}") from None
  if builder.info.disable_shuffling:
    print(f"{name} was prepared without shuffling: sorted by class, it trains badly.")
  return builder


def class_names(dataset, label="label"):
  """The names of the C classes of a label, or of a set of labels; DatasetError if it has none."""
  features = dict(dataset.info.features)
  feature = getattr(features.get(label), "feature", features.get(label))  # what a set is a set of
  if "image" not in features or not isinstance(feature, tfds.features.ClassLabel):
    raise DatasetError(f"{dataset.name} has no image with classes in {label!r}, but {[*features]}")
  return tuple(feature.names)


ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")  # what TensorFlow decodes


class Folder:
  """Images in SPLIT/CLASS/, at any depth, with the part of a TFDS builder that is used here.

  They are in a constant random order, so that a part such as train[99%:] is of all classes.
  """

  def __init__(self, root):
    def refuse(error):
      raise error

    found, self.files = {}, {}  # found: {split: {class: paths}}
    for folder, folders, names in tf.io.gfile.walk(root) if "://" in root else os.walk(
        root, onerror=refuse, followlinks=True):
      here = os.path.realpath(folder) + "/"  # a link to a folder above would never end
      folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX" and
                    not here.startswith(os.path.realpath(os.path.join(folder, name)) + "/")]
      split, *below = os.path.relpath(folder, root).split("/")
      if below:
        found.setdefault(split, {}).setdefault(below[0], []).extend(
            os.path.join(folder, name) for name in names
            if name.lower().endswith(ENDINGS) and not name.startswith("."))
    classes = set().union(*found.values())  # if they are numbers, 2 is before 10, as in TFDS
    classes = sorted(classes, key=int if all(map(str.isdecimal, classes)) else str)
    for split, paths in sorted(found.items()):
      files = [(os.fsencode(path), label) for label, name in enumerate(classes)
               for path in sorted(paths.get(name, ()))]
      random.Random(split).shuffle(files)
      self.files[split] = {"path": tf.constant([path for path, _ in files], tf.string),
                           "label": tf.constant([label for _, label in files], tf.int64)}
    sizes = {split: len(files["label"]) for split, files in self.files.items()}
    if not any(sizes.values()):
      raise DatasetError(f"no images found: expected SPLIT/CLASS/*({'|'.join(ENDINGS)})")
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=classes)}
    self.name, self.info = root, types.SimpleNamespace(features=features, splits={
        split: types.SimpleNamespace(num_examples=size, num_bytes=0)
        for split, size in sizes.items()})


# --- The demo data set ---

# Two-coloured textures of period 1, of u to the right and v down, from -1/2 to 1/2.
PATTERNS = {
    "checks": lambda u, v: u * v < 0,
    "columns": lambda u, v: u < 0,
    "dots": lambda u, v: np.hypot(u, v) < 0.25,
    "grid": lambda u, v: np.maximum(abs(u), abs(v)) > 0.4,
    "rings": lambda u, v: abs(np.hypot(u, v) - 0.33) < 0.1,
    "rows": lambda u, v: v < 0,
    "triangles": lambda u, v: u < v,
}


class Patterns(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Textures that stay what they are in a small crop, flipped, recoloured or sheared."""

  VERSION = tfds.core.Version("2.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=list(PATTERNS))}))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0, 8000),
            "validation": self._generate_examples(1, 1000)}

  def _generate_examples(self, seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
      name, pattern = list(PATTERNS.items())[i % len(PATTERNS)]
      v, u = np.mgrid[:96, :128] / rng.uniform(14, 24) + rng.uniform(0, 1, (2, 1, 1))
      dark, light = rng.uniform(0, 125, 3), rng.uniform(130, 255, 3)
      mask = pattern(u % 1 - 0.5, v % 1 - 0.5) ^ (rng.uniform() < 0.5)
      image = np.where(mask[..., None], dark, light) + rng.normal(0, 10, (96, 128, 3))
      yield i, {"image": image.clip(0, 255).astype(np.uint8), "label": name}
