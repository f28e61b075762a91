"""Which records are read, in which order, and batches of them, for arXiv 2205.01580.

A `dataset` is a TFDS builder or a `Folder`. A record's position is its place in a file or split as
stored. Its number, in training, is its place in the endless stream of a process: its share of the
records, shuffled, epoch after epoch. Batch k of b rows holds the numbers k*b to k*b + b - 1. What
is random follows from the run's seed and a number, which process i of n makes its own as
number * n + i: a run can start at any step.

Shapes: B batch, b this process's part of it, I image side, C classes; [] is a number.
"""

import contextlib
import math
import os
import pathlib
import random
import re
import types
import zlib

import numpy as np
import tensorflow as tf
from tensorflow.data import Dataset
import tensorflow_datasets as tfds

import augment

tf.config.set_visible_devices(tf.config.list_physical_devices("CPU"))  # or it takes GPUs' memory

THREADS = os.cpu_count() + 2
ENDINGS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".gif", ".bmp", ".webp")  # in a `Folder`


class DatasetError(ValueError):
  """A data set, a split or a record that cannot be used."""


# --- Batches ---


def train_batches(dataset, split, batch_size, train_image=augment.train_image, *, start_step=0,
                  mixup_p=0.2, dtype="bfloat16", seed=0, process_index=0, process_count=1):
  """The endless training batches from a step on: an iterator over dicts of numpy arrays.

  split: "train[:99%]" in the report.
  batch_size: B, a multiple of process_count, the number of processes that share the records.
  train_image: function(encoded image, seed) -> uint8 [I, I, 3].
  mixup_p: 0 leaves Mixup out. Each process mixes its own rows, all in one proportion.
  Yields images [b, I, I, 3] of the dtype in [-1, 1], labels float32 [b, C].
  DatasetError: the split is unknown or too small, or labels are sets; later, a bad record.
  """
  size, rows = split_size(dataset, split), batch_size // process_count
  if size < process_count or (mixup_p and rows == 1 < process_count):
    raise DatasetError(f"{process_count} processes are too many for {size} examples in batches of "
                       f"{batch_size}: each needs one and, unless --mixup=0, two rows")
  parse, C = record_parser(dataset), len(class_names(dataset))
  if not isinstance(dataset.info.features["label"], tfds.features.ClassLabel):
    raise DatasetError(f"{dataset.name}: its label is a set, and the loss needs exactly one")

  def records_from(step):
    number = step * rows
    records = shuffled_records(dataset, split, seed, number, process_index, process_count)
    return records.enumerate(number)

  def example(number, record):
    image_bytes, label = parse(record)
    image = train_image(image_bytes, (seed, number * process_count + process_index))
    return image, one_hot(label, C)

  def finish(step, batch):
    images, labels = batch
    if mixup_p:
      mixup_seed = augment.seed_for("mixup", (seed, step))  # the same on all processes
      images, labels = augment.mixup(images, labels, mixup_seed, mixup_p, dtype)
    else:
      images = tf.cast(augment.scale(images), dtype)
    return {"images": images, "labels": labels}

  ds = records_from(start_step).map(example, num_parallel_calls=THREADS)
  ds = ds.batch(rows, num_parallel_calls=2)
  ds = ds.enumerate(start_step).map(finish, num_parallel_calls=2).prefetch(2)
  return as_numpy(ds, lambda i: records_from(start_step + i).take(rows), example)


def eval_batches(dataset, split, batch_size, eval_image=augment.eval_image, *, label="label",
                 dtype="bfloat16", process_index=0, process_count=1):
  """Every example of a split once, over all processes, in the same number of batches on each.

  As `train_batches`, but with eval_image: function(encoded image) -> uint8 [I, I, 3].
  label: the feature that holds the label, or the set of right labels ("real_label").
  Yields labels with 1 for each right answer, and mask bool [b], False where a row only fills up.
  """
  parts, rows = split_parts(dataset, split), batch_size // process_count
  parse, C = record_parser(dataset, label), len(class_names(dataset, label))
  records = read_records(dataset, share(parts, process_index, process_count)).enumerate()

  def example(_, record):
    image_bytes, labels = parse(record)
    return {"images": eval_image(image_bytes), "labels": one_hot(labels, C), "mask": True}

  def finish(batch):
    return batch | {"images": tf.cast(augment.scale(batch["images"]), dtype)}

  ds = records.map(example, num_parallel_calls=THREADS)
  zeros = tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), ds.element_spec)
  ds = ds.concatenate(Dataset.from_tensors(zeros).repeat())
  ds = ds.batch(rows, num_parallel_calls=2).take(math.ceil(count(parts) / batch_size))
  ds = ds.map(finish, num_parallel_calls=2).prefetch(2)
  return as_numpy(ds, lambda i: records.skip(i * rows).take(rows), example)


def one_hot(label, C):
  """A label [] or a set of labels [any] -> float32 [C], 1 at each; one that is no class fails."""
  labels = tf.reshape(label, [-1])
  tf.debugging.Assert(tf.reduce_all((0 <= labels) & (labels < C)), [
      f"label is none of {C} classes; in a folder, all SPLIT/CLASS/ must be as in --train_split"])
  return tf.minimum(tf.reduce_sum(tf.one_hot(labels, C), 0), 1)


def as_numpy(ds, records_of, example):
  """Yields the elements of `ds` in numpy; the i-th is made by `example` from records_of(i)."""
  options, i, OpError = tf.data.Options(), 0, tf.errors.OpError  # tf may be gone when Python ends
  options.autotune.enabled = False  # with it on, a process ends seconds after its work
  try:
    for element in ds.with_options(options).as_numpy_iterator():
      yield element
      i += 1
  except OpError as error:
    raise bad_record(error, records_of(i), example) from None


def bad_record(error, records, example):
  """The DatasetError for TensorFlow's; it names a record only if that fails once more."""
  noise = r".*}} |.*Iterator::\S+ |assertion failed: \[|\]$| \[Op:.*"
  reason = lambda error: re.sub(noise, "", error.message.splitlines()[0])
  again = "prepare or copy the data set again"
  try:
    for number, record in records:
      try:
        list(Dataset.from_tensors((number, record)).map(example))
      except tf.errors.OpError as found:
        path = record["path"].numpy().decode("utf-8", "backslashreplace")
        if record.get("example") == "":  # see `read_file`
          held = sum(1 for _ in tf.data.TFRecordDataset(path))
          return DatasetError(f"{path} holds {held} of {record['length']} records; {again}")
        path += f"#{record['position']}" if "position" in record else ""
        return DatasetError(f"bad record {path}: {reason(found)}; mend or remove it")
  except tf.errors.OpError as found:  # of reading, which does not say in which record
    return DatasetError(f"data cannot be read: {reason(found)}; {again}")
  return DatasetError(f"{reason(error)}; read once more, it was right: start again")


# --- Records and their order ---

ORDER = 2  # of records and draws; raise it when they change: a run resumes only in its own


def shuffled_records(dataset, split, seed, start=0, process_index=0, process_count=1):
  """The endless stream of a process's share of a split, from the number `start` on.

  Every epoch shuffles TFDS' files, and windows of records, of which the next one is read ahead.
  Unlike a shuffle buffer, a window is a function of its number.
  """
  whole = split_parts(dataset, split)
  parts = share(whole, process_index, process_count)
  size, window = count(parts), window_size(dataset, whole)

  def own_seed(stream, number):
    return augment.seed_for(stream, (seed, number * process_count + process_index))

  def shuffle(number, records):
    window_seed = own_seed("windows", number)  # the same for all columns
    return {key: tf.random.experimental.stateless_shuffle(column, window_seed, alg="philox")
            for key, column in records.items()}

  @tf.autograph.experimental.do_not_convert  # TFDS warns that it cannot be
  def shuffled_windows(epoch):
    windows = read_records(dataset, parts, own_seed("files", epoch)).batch(window)
    return windows.enumerate(epoch * (size // window + 1)).map(shuffle)  # through all epochs

  epochs = Dataset.range(start // size, tf.int64.max)
  return epochs.flat_map(shuffled_windows).prefetch(1).unbatch().skip(start % size)


def window_size(dataset, parts):
  """How many records are shuffled at a time: a folder's all; 4,096, or what is 512 MiB."""
  if isinstance(dataset, Folder):
    return count(parts)
  splits = [dataset.info.splits[name] for name, _ in parts]
  size = sum(split.num_bytes or 0 for split in splits)
  return max(1, min(4096, 2 ** 29 * sum(split.num_examples for split in splits) // max(size, 1)))


def split_parts(dataset, split):
  """[(name, range of positions)] of a split such as "train[:99%]"; DatasetError if it is empty."""
  splits = dataset.info.splits
  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
    parts = [(p.splitname, range(splits[p.splitname].num_examples)[p.from_:p.to]) for p in parts]
  except Exception:  # it is unknown
    parts = []
  if not count(parts):
    raise DatasetError(f"{dataset.data_dir} has nothing in {split!r}, only {[*splits]}: see "
                       "--train_split and --eval, or, if TFDS prepared a part only, delete it")
  return parts


def count(parts):
  """The number of records in parts of splits."""
  return sum(len(positions) for _, positions in parts)


def split_size(dataset, split):
  """The number of records in a split; DatasetError if there are none."""
  return count(split_parts(dataset, split))


def share(parts, i, n):
  """The parts that process i of n reads: of N records, N*i // n to N*(i + 1) // n; maybe none."""
  begin, end = (count(parts) * process // n for process in (i, i + 1))
  own = []
  for name, positions in parts:
    own.append((name, positions[max(begin, 0):max(end, 0)]))
    begin, end = begin - len(positions), end - len(positions)
  return own


def read_records(dataset, parts, seed=None):
  """Every record of the parts once, for `record_parser`; a seed [2] shuffles TFDS' files."""
  if isinstance(dataset, Folder):
    return Dataset.from_tensor_slices({
        key: tf.concat([dataset.files[name][key][positions.start:positions.stop]
                        for name, positions in parts], 0) for key in ("path", "label")})

  def read_file(path, skip, take, length):
    examples = tf.data.TFRecordDataset(path, buffer_size=1 << 20).skip(skip)
    # Where the file ends too early, empty examples fill up, which cannot be parsed.
    examples = examples.concatenate(Dataset.from_tensors("").repeat()).take(take)
    return examples.enumerate(skip).map(lambda position, example: {
        "example": example, "position": position, "path": path, "length": length})

  splits = [f"{name}[{part.start}:{part.stop}]" for name, part in parts if part]
  files = [(file.filename, file.skip, file.take, file.examples_in_shard)
           for split in splits for file in dataset.info.splits[split].file_instructions]
  files = files or [("", 0, 0, 0)]  # nothing to read
  columns = map(np.array, zip(*files))
  if seed is not None:
    columns = (tf.random.experimental.stateless_shuffle(x, seed, alg="philox") for x in columns)
  ds = Dataset.from_tensor_slices(tuple(columns))
  return ds.interleave(read_file, cycle_length=16, block_length=16, num_parallel_calls=16)


def record_parser(dataset, label="label"):
  """function(record of `read_records`) -> encoded image, and its label, int64 [] or [any]."""
  if isinstance(dataset, Folder):
    return lambda record: (tf.io.read_file(record["path"]), record["label"])

  def parse(record):
    example = dataset.info.features.deserialize_example(
        record["example"], decoders={"image": tfds.decode.SkipDecoding()})
    return example["image"], example[label]

  return parse


# --- Data sets ---


def open_dataset(name, data_dir=None, prepare=True, train_split=None):
  """A TFDS builder or a `Folder`. DatasetError: there is none, or it cannot be read or prepared.

  name: a TFDS name, "patterns" for those below, or the path of a folder (with at least one "/").
  data_dir: where TFDS keeps data sets; None is its default, ~/tensorflow_datasets.
  prepare: whether TFDS may download, or read archives in data_dir/downloads/manual.
  train_split: of a folder, the split whose classes count; None: all.
  """
  def make():
    return patterns(data_dir) if name == "patterns" else tfds.builder(name, data_dir=data_dir)

  try:
    if "/" in name and tf.io.gfile.isdir(name):
      return Folder(name, train_split)
    builder = make()
    if not builder.info.splits:
      if not prepare:
        raise ValueError("one process must prepare it: python -c \"import input_pipeline; "
                         f"input_pipeline.open_dataset({name!r}, {data_dir!r})\"")
      print(f"Preparing {name} in {builder.data_dir} ...", flush=True)
      try:
        with contextlib.redirect_stdout(None):  # TFDS prints unknown sizes
          builder.download_and_prepare()
      except Exception:  # no error if another process has prepared it
        builder = make()
        if not builder.info.splits:
          raise
  except Exception as error:  # of TFDS, archives and disks
    reason = re.sub("(?s)Available datasets:.*imported\n", "", str(error))  # an alphabet
    hint = f"; did you mean ./{name} ?" if "/" not in name and os.path.isdir(name) else ""
    raise DatasetError(
        f"--dataset={name} --data_dir={data_dir}: {reason:.300}; expected a name in TFDS (archives "
        f"are in {data_dir or '~/tensorflow_datasets'}/downloads/manual), patterns, or a path of "
        f"SPLIT/CLASS/IMAGE.jpg{hint}") from None
  if builder.info.disable_shuffling:
    print(f"{name} was prepared without shuffling: sorted by class, it trains badly.")
  return builder


def class_names(dataset, label="label"):
  """The names of the C classes of a label, or of a set of labels; DatasetError if it has none."""
  features = dict(dataset.info.features)
  image, feature = features.get("image"), features.get(label)
  feature = getattr(feature, "feature", feature)  # what a set is a set of
  if not (isinstance(feature, tfds.features.ClassLabel) and isinstance(image, tfds.features.Image)
          and image.tf_dtype.is_integer):
    raise DatasetError(f"{dataset.name} has no image with classes in {label!r}, but "
                       f"{features!s:.300}")
  return tuple(feature.names)


def fingerprint(dataset, split):
  """A checksum of TFDS' version and the sizes of a split's files, or of the paths in a folder."""
  files = [dataset.info.full_name]
  for name in sorted({name for name, _ in split_parts(dataset, split)}):
    if isinstance(dataset, Folder):
      files += sorted(path[len(dataset.name):] for path in dataset.files[name]["path"].numpy())
    else:
      files += dataset.info.splits[name].shard_lengths
  return zlib.crc32(str(files).encode())


class Folder:
  """Images in SPLIT/CLASS/, at any depth, with the part of a TFDS builder that is used here.

  Classes have an image in a split that `train_split` names, or in any; other images have the label
  -1. The order is random, but constant: a part such as train[99%:] is of all classes.
  """

  def __init__(self, root, train_split=None):
    def refuse(error):
      raise error

    self.name = self.data_dir = os.path.join(root, "")
    self.files, found, left_out = {}, {}, []
    walk = os.walk(root, onerror=refuse, followlinks=True)
    for folder, folders, names in tf.io.gfile.walk(root) if "://" in root else walk:
      here = pathlib.Path(folder).resolve()  # a link to a folder above would never end
      folders[:] = [name for name in folders if name[0] != "." and name != "__MACOSX" and
                    not here.is_relative_to((here / name).resolve())]
      split, *below = os.path.relpath(folder, root).split("/")
      for path in (os.path.join(folder, name) for name in names if name[0] != "."):
        if below and path.lower().endswith(ENDINGS):
          found.setdefault(split, []).append((below[0], path))  # class, path
        else:
          left_out.append(path)
    if left_out:
      print(f"{len(left_out)} files are left out, such as {left_out[0]}: not {ENDINGS} in a class")
    self.info = types.SimpleNamespace(full_name="", splits={
        split: types.SimpleNamespace(num_examples=len(found[split])) for split in sorted(found)})
    splits = {name for name, _ in split_parts(self, train_split)} if train_split else found
    classes = {name: path for split in splits for name, path in found[split]}
    if len(classes) < (2 if train_split else 1):
      raise DatasetError(f"no images of two classes found, only {classes}")
    # If all names are numbers, 2 is before 10, as in TFDS.
    classes = sorted(classes, key=int if all(map(str.isdecimal, classes)) else str)
    self.info.features = {"image": tfds.features.Image(),
                          "label": tfds.features.ClassLabel(names=classes)}
    labels = {name: label for label, name in enumerate(classes)}
    for split, images in found.items():
      images = sorted((labels.get(name, -1), path) for name, path in images)
      random.Random(split).shuffle(images)
      images.sort(key=lambda image: image[0] >= 0)  # -1 comes first, where it is found at once
      self.files[split] = {"path": tf.constant([os.fsencode(path) for _, path in images]),
                           "label": tf.constant([label for label, _ in images], tf.int64)}


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


def patterns(data_dir=None):
  """A builder of textures that stay what they are in a small crop, flipped, recoloured, sheared."""

  def draw(seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
      name, pattern = list(PATTERNS.items())[i % len(PATTERNS)]
      v, u = np.mgrid[:96, :128] / rng.uniform(14, 24) + rng.uniform(0, 1, (2, 1, 1))
      dark, light = rng.uniform(0, 125, 3), rng.uniform(130, 255, 3)
      mask = pattern(u % 1 - 0.5, v % 1 - 0.5) ^ (rng.uniform() < 0.5)
      image = np.where(mask[..., None], dark, light) + rng.normal(0, 10, (96, 128, 3))
      yield i, {"image": image.clip(0, 255).astype(np.uint8), "label": name}

  return tfds.dataset_builders.AdhocBuilder(
      name="patterns", version="2.0.0", data_dir=data_dir,
      features=tfds.features.FeaturesDict({
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=list(PATTERNS))}),
      split_datasets={"train": draw(0, 8000), "validation": draw(1, 1000)})
